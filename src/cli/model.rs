//! The options that choose a model and a device, and loading with them.

use std::sync::OnceLock;
use std::time::Instant;

use peregrine::checkpoint::Checkpoint;
use peregrine::engine::{Device, Engine, LoadOptions, Session, SessionOptions};
use peregrine::error::one_line;
use peregrine::{Error, Result};

use super::args::Args;
use super::{builtin, output};

/// When the program began.
static BEGAN: OnceLock<Instant> = OnceLock::new();

/// Seconds since the program began, which the first call marks.
pub(super) fn seconds_running() -> f64 {
    BEGAN.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// `-m`, `--device`, `-c`, `-q`, `-v`.
pub(super) struct ModelFlags {
    model: Option<String>,
    device: Device,
    /// Positions in the KV cache; `None` is what the model was trained for.
    context: Option<usize>,
    /// No notes, no progress, no figures: results and errors only.
    pub(super) quiet: bool,
    /// Say what happens.
    pub(super) verbose: bool,
}

/// The help of these options.
pub(super) const HELP: &str =
    "  -m, --model MODEL         folder, .safetensors file or name in the local Hugging Face cache;
                            without it the built-in model
      --device DEVICE       auto (default): a GPU if there is one, else the CPU; cuda, cuda:N, cpu
  -c, --ctx-size N          positions in the KV cache (default: all the model has)
  -q, --quiet               results and errors only
  -v, --verbose             say more on stderr
  -h, --help                print this
";

impl ModelFlags {
    pub(super) fn new() -> ModelFlags {
        ModelFlags { model: None, device: Device::Auto, context: None, quiet: false, verbose: false }
    }

    /// Takes `option` if it is one of these.
    pub(super) fn take(&mut self, option: &str, args: &mut Args) -> Result<bool> {
        match option {
            "-m" | "--model" => self.model = Some(args.text()?),
            "--device" => self.device = device(args)?,
            "-c" | "--ctx-size" => self.context = Some(args.parse("a number of positions, or 0 for all")?),
            "-q" | "--quiet" => self.quiet = true,
            "-v" | "--verbose" => self.verbose = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Gives the model without `-m`.
    pub(super) fn set_model(&mut self, model: String) -> Result<()> {
        match self.model.replace(model) {
            None => Ok(()),
            Some(first) => {
                Err(Error::Usage(format!("two models given; the first is '{}'", one_line(&first))))
            }
        }
    }

    /// What `-m` says.
    pub(super) fn name(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// What `--device` says.
    pub(super) fn device(&self) -> Device {
        self.device
    }

    /// The GPU that is used, if there is one.
    pub(super) fn ordinal(&self) -> Option<usize> {
        match self.device {
            Device::Auto => Some(0),
            Device::Cuda(ordinal) => Some(ordinal),
            Device::Cpu => None,
        }
    }

    /// Opens the checkpoint without loading it.
    pub(super) fn open(&self) -> Result<Checkpoint> {
        match &self.model {
            Some(model) => Checkpoint::open(model),
            None => builtin::checkpoint(),
        }
    }

    /// Loads the model; says on stderr what the user should know about it.
    pub(super) fn load(&self) -> Result<Engine> {
        let start = Instant::now();
        let options = LoadOptions {
            device: self.device,
            progress: output::progress_wanted(self.quiet).then_some(output::progress as fn(u64, u64)),
        };
        let checkpoint = self.open()?;
        let opened_seconds = start.elapsed().as_secs_f64();
        let engine = Engine::from_checkpoint(checkpoint, &options).map_err(or_cpu)?;
        if self.model.is_none() {
            self.say(&format!("no -m MODEL given: {} tells little stories and nothing else", builtin::NAME));
        }
        for warning in engine.checkpoint().warnings() {
            self.say(&format!("warning: {warning}"));
        }
        if let Some(reason) = engine.fallback_reason() {
            self.say(&format!("running on the CPU: {reason}"));
        }
        if self.verbose {
            let weights = engine.memory().weight_bytes as f64 / f64::from(1 << 20);
            let seconds = start.elapsed().as_secs_f64();
            self.say(&format!(
                "loaded {weights:.1} MiB of weights onto {} in {seconds:.2} s",
                engine.device_name()
            ));
            self.say(&format!("  {:7.1} ms  opening and checking the files", opened_seconds * 1e3));
            for part in engine.load_parts() {
                let indent = if part.within { "    of these, beside each other: " } else { "" };
                self.say(&format!("  {:7.1} ms  {indent}{}", part.seconds * 1e3, part.name));
            }
        }
        Ok(engine)
    }

    /// A timeline of the size asked for.
    pub(super) fn session(&self, engine: &Engine) -> Result<Session> {
        engine.session(SessionOptions { max_context: self.context.filter(|&positions| positions > 0) })
    }

    /// A note that `--quiet` silences.
    pub(super) fn say(&self, line: &str) {
        if !self.quiet {
            output::note(line);
        }
    }
}

/// Where there is no GPU, says what runs without one.
pub(super) fn or_cpu(error: Error) -> Error {
    match error {
        Error::NoGpu(why) => Error::NoGpu(format!("{why}; or use --device cpu")),
        other => other,
    }
}

fn device(args: &mut Args) -> Result<Device> {
    let text = args.text()?;
    match text.as_str() {
        "auto" => return Ok(Device::Auto),
        "cpu" => return Ok(Device::Cpu),
        "cuda" => return Ok(Device::Cuda(0)),
        _ => {}
    }
    match text.strip_prefix("cuda:").map(str::parse) {
        Some(Ok(ordinal)) => Ok(Device::Cuda(ordinal)),
        _ => Err(args.bad_value(&text, "auto, cpu, cuda or cuda:N")),
    }
}
