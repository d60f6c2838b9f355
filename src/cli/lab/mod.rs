//! `peregrine lab`: kernels one by one, and kernels of somebody's own.
//!
//! `attempt` runs a stranger's kernel in a process of its own (`child`), so that a fault or a hang is a sentence and not a dead
//! terminal.

#[cfg(feature = "cuda")]
mod attempt;
#[cfg(feature = "cuda")]
mod child;
#[cfg(feature = "cuda")]
mod new;
#[cfg(feature = "cuda")]
mod ops;

use std::path::PathBuf;

use peregrine::{Error, Result};

use super::args::{Args, Word};
use super::model::{self, ModelFlags};

pub(super) const HELP: &[&str] = &[
    "\
Looks at kernels one by one, and at kernels of your own, without building this program again.

Usage: peregrine lab list              every op with its shapes, bytes, operations, floor
       peregrine lab check [OP]        against the reference: real shapes and edges, twice for equal bits
       peregrine lab bench [OP]        time with a cold and a warm L2 beside the floor and the last record
       peregrine lab new OP [DIR]      a folder to begin in: the built-in kernel, its headers, a README
       peregrine lab try OP FILE       FILE is a .cu that exports OP's launcher, or a library made of one:
                                       checked, then timed in turns with the built-in kernel. A .cu needs
                                       nvcc: $NVCC, $CUDA_HOME, the PATH, or .cuda/ of the working folder
       peregrine lab report [OP]       registers, shared memory, spills, occupancy of the built-in kernels

      --in-model            try: run the whole model with it too: logits, tokens a second
      --load-format FORMAT  try --in-model: auto, or dummy for random weights (as in peregrine bench)
      --time-limit SECONDS  try: without a sign of life for so long it hangs (20)
      --save FILE           bench: write the times as a record
      --record FILE         bench: the record to compare with (benches/records/lab-GPU.json)
      --sass                try, report: show the machine code, where cuobjdump is
",
    model::HELP,
];

/// What was asked for.
pub(super) struct Options {
    pub(super) model: ModelFlags,
    pub(super) words: Vec<String>,
    pub(super) in_model: bool,
    pub(super) dummy: bool,
    pub(super) seconds: f64,
    pub(super) save: Option<PathBuf>,
    pub(super) record: Option<PathBuf>,
    pub(super) sass: bool,
}

/// Runs the command.
pub(super) fn run(mut args: Args) -> Result<()> {
    let mut options = Options {
        model: ModelFlags::new(),
        words: Vec::new(),
        in_model: false,
        dummy: false,
        seconds: 20.0,
        save: None,
        record: None,
        sass: false,
    };
    while let Some(word) = args.next()? {
        let option = match word {
            Word::Option(option) => option,
            Word::Value(value) => {
                options.words.push(args.utf8(value, "a word")?);
                continue;
            }
        };
        match option.as_str() {
            "-h" | "--help" => return args.print_help(),
            "--in-model" => options.in_model = true,
            "--load-format" => options.dummy = super::bench::dummy(&mut args)?,
            "--time-limit" => options.seconds = args.parse("seconds")?,
            "--save" => options.save = Some(args.path()?),
            "--record" => options.record = Some(args.path()?),
            "--sass" => options.sass = true,
            _ if options.model.take(&option, &mut args)? => {}
            _ => return Err(args.unknown(Word::Option(option))),
        }
    }
    let words: Vec<String> = options.words.clone();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if words.is_empty() {
        return args.print_help();
    }
    if !(options.seconds > 0.0 && options.seconds < 1e6) {
        return Err(args.wrong("--time-limit: wanted seconds above 0"));
    }
    dispatch(&args, &options, &words)
}

#[cfg(feature = "cuda")]
fn dispatch(args: &Args, options: &Options, words: &[&str]) -> Result<()> {
    match *words {
        ["list"] => ops::list(options),
        ["check"] => ops::check(options, None),
        ["check", op] => ops::check(options, Some(op)),
        ["bench"] => ops::bench(options, None),
        ["bench", op] => ops::bench(options, Some(op)),
        ["report"] => ops::report(options, None),
        ["report", op] => ops::report(options, Some(op)),
        ["new", op] => new::new(op, op),
        ["new", op, folder] => new::new(op, folder),
        ["try", op, file] => attempt::attempt(options, op, file),
        ["child", op, library] => child::run(options, op, library),
        ["try", ..] => Err(args.wrong("try: wanted OP and FILE")),
        ["new", ..] => Err(args.wrong("new: wanted OP, and perhaps DIR")),
        ["list", ..] => Err(args.wrong("list: wanted nothing more")),
        [word @ ("check" | "bench" | "report"), ..] => {
            Err(args.wrong(&format!("{word}: wanted one OP, or none for all")))
        }
        [other, ..] => {
            let known = ["list", "check", "bench", "new", "try", "report"];
            let hint = super::args::nearest(other, known.into_iter())
                .map_or(format!("wanted {}", known.join(", ")), |near| format!("did you mean {near}?"));
            Err(args.wrong(&format!("'{other}': {hint}")))
        }
        [] => args.print_help(),
    }
}

#[cfg(not(feature = "cuda"))]
fn dispatch(_: &Args, _: &Options, _: &[&str]) -> Result<()> {
    Err(Error::NoGpu("lab: this build has no CUDA; build with --features cuda".into()))
}

/// The ops that have calls, for checks before anything is done.
#[cfg(feature = "cuda")]
pub(super) fn known(op: &str) -> Result<()> {
    let names: Vec<&str> = peregrine::lab::calls::OPS.iter().map(|op| op.0).collect();
    if names.contains(&op) {
        return Ok(());
    }
    let hint = super::args::nearest(op, names.iter().copied());
    let hint = hint.map_or(format!("it has {}", names.join(", ")), |near| format!("did you mean {near}?"));
    Err(Error::Usage(format!("the lab has no op '{}': {hint}", peregrine::error::one_line(op))))
}
