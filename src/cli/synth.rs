//! `peregrine synth`: a random checkpoint of Falcon-7B's shape, for measuring without the real one.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use peregrine::checkpoint::FloatType;
use peregrine::error::one_line;
use peregrine::synth::{PART, SynthOptions, SynthShape, synth};
use peregrine::{Error, Result};

use super::args::{Args, Word};
use super::temporary::Temporary;
use super::{interrupt, output};

pub(super) const HELP: &[&str] = &["\
Writes a random checkpoint in AutoGPTQ's format into a new folder: the shapes, bytes and arithmetic of a
real one, and no sense. falcon-7b takes 4.8 GB.

Usage: peregrine synth --like SHAPE DIR [OPTIONS]

      --like SHAPE          falcon-7b, or tiny for tests
      --seed N              of the random numbers (0); the same seed writes the same bytes
      --layers N            decoder layers, instead of the shape's
      --group-size N        inputs that share a scale: 32, 64 (default), 128, or -1 for all
      --desc-act            assign groups to inputs at random, as act-order does
      --asym                random zero points instead of 8
      --dtype TYPE          of the embedding and norms: f16 (default) or f32
      --tokenizer FILE      copy this tokenizer.json into the folder
  -q, --quiet               errors only
  -h, --help                print this
"];

/// Runs the command.
pub(super) fn run(mut args: Args) -> Result<()> {
    let mut shape: Option<SynthShape> = None;
    let mut options = SynthOptions::default();
    let mut folder: Option<PathBuf> = None;
    let mut tokenizer: Option<PathBuf> = None;
    let mut quiet = false;
    while let Some(word) = args.next()? {
        let option = match word {
            Word::Option(option) => option,
            Word::Value(value) if folder.is_none() => {
                folder = Some(value.into());
                continue;
            }
            other => return Err(args.unknown(other)),
        };
        match option.as_str() {
            "-h" | "--help" => return args.print_help(),
            "--like" => shape = Some(shape_named(&mut args)?),
            "--seed" => options.seed = args.parse("a whole number from 0 up")?,
            "--layers" => options.layers = Some(args.parse("a number of layers")?),
            "--group-size" => options.group_size = group_size(&mut args)?,
            "--desc-act" => options.act_order = true,
            "--asym" => options.sym = false,
            "--dtype" => options.tables = dtype(&mut args)?,
            "--tokenizer" => tokenizer = Some(args.path()?),
            "-q" | "--quiet" => quiet = true,
            _ => return Err(args.unknown(Word::Option(option))),
        }
    }
    let shape = shape.ok_or_else(|| args.wrong("no shape: give --like falcon-7b"))?;
    let folder = folder.ok_or_else(|| args.wrong("no folder to write to: give DIR"))?;
    // Opened first: a mistyped name should not be found after gigabytes are written.
    let tokenizer = tokenizer.map(|file| open_tokenizer(&file)).transpose()?;
    interrupt::install()?;
    let start = Instant::now();
    let _part = Temporary::new(folder.join(PART));
    let progress = output::progress_wanted(quiet).then_some(output::progress as fn(u64, u64));
    let bytes = synth(shape, &folder, &options, progress)?;
    if let Some(mut tokenizer) = tokenizer {
        File::create(folder.join("tokenizer.json"))
            .and_then(|mut copy| io::copy(&mut tokenizer, &mut copy))
            .map_err(|error| Error::Io(format!("cannot copy the tokenizer: {error}")))?;
    }
    if !quiet {
        let seconds = start.elapsed().as_secs_f64();
        let name = one_line(&folder.display().to_string());
        output::note(&format!("wrote {name}: {:.1} MB in {seconds:.1} s", bytes as f64 / 1e6));
    }
    Ok(())
}

fn shape_named(args: &mut Args) -> Result<SynthShape> {
    let name = args.text()?;
    SynthShape::named(&name).ok_or_else(|| args.bad_value(&name, "falcon-7b or tiny"))
}

/// `None` is -1: one group over all inputs.
fn group_size(args: &mut Args) -> Result<Option<usize>> {
    let text = args.text()?;
    match text.as_str() {
        "-1" => Ok(None),
        size => size.parse().map(Some).map_err(|_| args.bad_value(size, "32, 64, 128 or -1")),
    }
}

fn dtype(args: &mut Args) -> Result<FloatType> {
    let text = args.text()?;
    match text.as_str() {
        "f16" => Ok(FloatType::F16),
        "f32" => Ok(FloatType::F32),
        other => Err(args.bad_value(other, "f16 or f32")),
    }
}

fn open_tokenizer(file: &Path) -> Result<File> {
    let name = one_line(&file.display().to_string());
    File::open(file).map_err(|error| Error::Usage(format!("--tokenizer: cannot read {name}: {error}")))
}
