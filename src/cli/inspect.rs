//! `peregrine inspect`: what a checkpoint holds and what it needs, without loading it.

use peregrine::Result;

use super::args::{Args, Word};
use super::model::ModelFlags;
use super::output;

pub(super) const HELP: &[&str] = &["\
Says what a checkpoint holds: architecture, quantisation, tensors, bytes, and the memory it needs.
Nothing is loaded; every check that loading makes is made.

Usage: peregrine inspect [MODEL] [--json]

  -m, --model MODEL         the same as MODEL; without either the built-in model
      --json                one JSON object
  -h, --help                print this
"];

/// Runs the command.
pub(super) fn run(mut args: Args) -> Result<()> {
    let mut model = ModelFlags::new();
    let mut json = false;
    while let Some(word) = args.next()? {
        match word {
            Word::Option(option) if option == "-h" || option == "--help" => return args.print_help(),
            Word::Option(option) if option == "--json" => json = true,
            Word::Option(option) if option == "-m" || option == "--model" => model.set_model(args.text()?)?,
            Word::Value(value) => model.set_model(args.utf8(value, "MODEL")?)?,
            other => return Err(args.unknown(other)),
        }
    }
    let report = peregrine::inspect::inspect(&model.open()?, gpu_free_bytes());
    output::print(&if json { format!("{}\n", report.to_json()) } else { report.to_string() })
}

/// Free memory of the first GPU, if there is one.
#[cfg(feature = "cuda")]
fn gpu_free_bytes() -> Option<u64> {
    let (free, _total) = peregrine::gpu::Gpu::open(0).ok()?.memory().ok()?;
    Some(free)
}

/// Free memory of the first GPU: this build knows none.
#[cfg(not(feature = "cuda"))]
fn gpu_free_bytes() -> Option<u64> {
    None
}
