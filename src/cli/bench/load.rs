//! A model to be measured, and how long each part of loading it took.

use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use peregrine::checkpoint::Checkpoint;
use peregrine::engine::{Engine, LoadOptions};
use peregrine::error::one_line;
use peregrine::measure::machine::Instruments;
use peregrine::synth::{SynthOptions, SynthShape, synth};
use peregrine::{Error, Result};

use super::super::model::{ModelFlags, or_cpu};
use super::super::output;
use super::super::temporary::Temporary;
use super::Options;

/// A loaded model.
pub(super) struct Loaded {
    pub(super) engine: Engine,
    pub(super) instruments: Instruments,
    /// Name and seconds of each part of loading, in order; making a dummy is none of them.
    pub(super) parts: Vec<(&'static str, f64)>,
    /// Bytes of GPU memory in use after loading, by everybody.
    pub(super) gpu_bytes: Option<u64>,
}

/// When the weights' upload began and when it was last heard of.
static UPLOAD: Mutex<Option<(Instant, Instant)>> = Mutex::new(None);

fn heard(done_bytes: u64, total_bytes: u64) {
    let now = Instant::now();
    if let Ok(mut upload) = UPLOAD.lock() {
        let began = upload.map_or(now, |(began, _)| began);
        *upload = Some((began, now));
    }
    if output::progress_wanted(false) {
        output::progress(done_bytes, total_bytes);
    }
}

/// Loads the model, or a random one.
pub(super) fn load(options: &Options) -> Result<Loaded> {
    let dummy = options.dummy.then(|| Dummy::make(&options.model)).transpose()?;
    let start = Instant::now();
    let checkpoint = match &dummy {
        Some(dummy) => Checkpoint::open(&dummy.0.path().to_string_lossy())?,
        None => options.model.open()?,
    };
    let opened = Instant::now();
    let instruments = super::instruments(options);
    let context = Instant::now();
    let load = LoadOptions { device: options.model.device(), progress: Some(heard) };
    let engine = Engine::from_checkpoint(checkpoint, &load).map_err(or_cpu)?;
    let end = Instant::now();
    // The mapping outlives the files' names.
    drop(dummy);
    for warning in engine.checkpoint().warnings() {
        options.model.say(&format!("warning: {}", one_line(warning)));
    }
    if let Some(reason) = engine.fallback_reason() {
        options.model.say(&format!("running on the CPU: {reason}"));
    }
    let seconds = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64();
    let mut parts = vec![("open and check files", seconds(start, opened))];
    match UPLOAD.lock().ok().and_then(|mut upload| upload.take()) {
        Some((began, last)) => parts.extend([
            ("make the GPU's context", seconds(opened, context)),
            ("tokenizer, buffers", seconds(context, began)),
            ("upload and repack", seconds(began, last)),
            ("finish, run each kernel once", seconds(last, end)),
        ]),
        None => parts.push(("tokenizer", seconds(context, end))),
    }
    let gpu_bytes = engine.memory().gpu_used_bytes;
    Ok(Loaded { engine, instruments, parts, gpu_bytes })
}

/// The model's checkpoint, or a random one: the mapping outlives the files' names.
#[cfg(feature = "cuda")]
pub(super) fn checkpoint(model: &ModelFlags, dummy: bool) -> Result<Checkpoint> {
    if !dummy {
        return model.open();
    }
    let made = Dummy::make(model)?;
    Checkpoint::open(&made.0.path().to_string_lossy())
}

/// A folder with a random checkpoint.
struct Dummy(Temporary);

impl Dummy {
    /// In memory if there is room, else in the folder for temporary files.
    fn make(model: &ModelFlags) -> Result<Dummy> {
        let name = model.name().unwrap_or("falcon-7b");
        let shape = SynthShape::named(name).ok_or_else(|| {
            Error::Usage(format!(
                "--load-format dummy: -m is '{}': expected falcon-7b or tiny",
                one_line(name)
            ))
        })?;
        let made = Dummy::make_in(Path::new("/dev/shm"), shape);
        let made = match made {
            Err(Error::Io(_)) => Dummy::make_in(&std::env::temp_dir(), shape),
            other => other,
        };
        made.map_err(|e| Error::Io(format!("a dummy checkpoint: {e}; TMPDIR names another folder")))
    }

    fn make_in(folder: &Path, shape: SynthShape) -> Result<Dummy> {
        let start = Instant::now();
        let dummy = Dummy(Temporary::new(folder.join(format!("peregrine-dummy-{}", std::process::id()))));
        let bytes = synth(shape, dummy.0.path(), &SynthOptions::default(), None)?;
        if output::progress_wanted(false) {
            let seconds = start.elapsed().as_secs_f64();
            output::note(&format!("made {:.1} MB of random weights in {seconds:.1} s", bytes as f64 / 1e6));
        }
        Ok(dummy)
    }
}
