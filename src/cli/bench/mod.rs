//! `peregrine bench`: how fast a model is, in the manner of llama-bench, and how far from what the machine can do.
//!
//! `load` (a model and how long it took) < `measure` (tests to rows) < `table`, `compare`; `vs` runs two programs in turns.

mod compare;
mod load;
mod measure;
mod table;
mod vs;

use std::ffi::OsString;
use std::path::PathBuf;

use peregrine::measure::machine::{Ceilings, Instruments};
use peregrine::measure::row::{self, Row};
use peregrine::measure::run::Test;
use peregrine::measure::stats;
use peregrine::{Error, Result};

use super::args::{Args, Word};
use super::model::{self, ModelFlags};
use super::{interrupt, output};
#[cfg(feature = "cuda")]
pub(super) use measure::{commit, time_of_day};

pub(super) const HELP: &[&str] = &[
    "\
Measures prompts and answers as llama-bench does: pp512 is a prompt of 512 tokens, tg128 an answer of 128.

Usage: peregrine bench [-m MODEL] [OPTIONS]

  -p, --n-prompt LIST       lengths of prompts (512); 0: none. A list is 128,512,2048
  -n, --n-gen LIST          lengths of answers (128); 0: none
  -d, --n-depth LIST        tokens in the cache before (0)
  -b, --n-seqs LIST         texts together (1), up to 64
  -r, --repetitions N       of each test, after one that does not count (5)
  -o, --output FORMAT       md (default), json, jsonl or csv
      --load-format FORMAT  auto: MODEL's files; dummy: random weights, and MODEL is a shape, falcon-7b
                            (default) or tiny
      --temperature T       sample with the card's other settings, instead of greedily
      --save FILE           write the results as a record, for --compare
      --compare FILE        compare with a record: ratio of times, 95 % interval, verdict
      --vs OTHER            run two programs in turns, so that drift does not decide: OTHER is another
                            peregrine binary, or settings NAME=VALUE,... of the environment for this one
      --resolution PERCENT  smaller differences are none (1)
      --breakdown           each op of a decode step and of a prompt beside its floor (GPU)
      --plot FILE           pictures, as one .svg or .html file
",
    model::HELP,
    "
What is in a number. Prompt: from the call to the host's having the first token of every text. Answer: from
the first token's arrival to the last's, choosing tokens and bringing them to the host included. Tokenising
is in neither: prompts are random ids. Texts are processed one after the other in a prompt, and together in
a step. 'of floor' is the time the model's bytes or operations take at the ceilings measured in the same run,
over the time measured.
",
];

/// What was asked for.
pub(super) struct Options {
    model: ModelFlags,
    tests: Vec<Test>,
    repetitions: usize,
    format: Format,
    /// Random weights of this shape.
    dummy: bool,
    temperature: f32,
    save: Option<PathBuf>,
    compare: Option<PathBuf>,
    vs: Option<String>,
    resolution: f64,
    breakdown: bool,
    plot: Option<PathBuf>,
    /// Tests are read from stdin, one repetition each: the other side of `--vs`.
    worker: bool,
    /// The words these came from, for a worker.
    words: Vec<OsString>,
}

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Md,
    Json,
    JsonLines,
    Csv,
}

/// Runs the command.
pub(super) fn run(mut args: Args, words: Vec<OsString>) -> Result<()> {
    let Some(options) = parse(&mut args, words)? else { return Ok(()) };
    interrupt::install()?;
    if options.worker {
        return vs::work(&options);
    }
    if let Some(other) = &options.vs {
        return vs::run(&options, other);
    }
    options.save.iter().chain(&options.plot).try_for_each(|file| output::require_folder(file))?;
    let earlier = options.compare.as_deref().map(row::read).transpose()?;
    let loaded = load::load(&options)?;
    let ceilings = loaded.instruments.ceilings()?;
    if options.breakdown && !(ceilings.is_some() && loaded.engine.device_name().contains("cuda")) {
        return Err(Error::NoGpu("--breakdown: the model does not run on a GPU".into()));
    }
    let rows = measure::all(&options, &loaded, ceilings)?;
    print(&options, &rows)?;
    if options.format == Format::Md {
        output::print(&table::foot(&rows, ceilings))?;
    }
    warn(&options, &rows);
    if let Some(file) = &options.save {
        row::save(file, &rows)?;
    }
    if let Some(earlier) = earlier {
        output::print(&compare::with(&earlier, &rows, options.resolution))?;
    }
    pictures(&options, loaded, ceilings, &rows)
}

fn parse(args: &mut Args, words: Vec<OsString>) -> Result<Option<Options>> {
    let (mut prompts, mut answers, mut depths, mut texts) = (vec![512], vec![128], vec![0], vec![1]);
    let mut options = Options {
        model: ModelFlags::new(),
        tests: Vec::new(),
        repetitions: 5,
        format: Format::Md,
        dummy: false,
        temperature: 0.0,
        save: None,
        compare: None,
        vs: None,
        resolution: stats::RESOLUTION,
        breakdown: false,
        plot: None,
        worker: false,
        words,
    };
    while let Some(word) = args.next()? {
        let option = match word {
            Word::Option(option) => option,
            other => return Err(args.unknown(other)),
        };
        match option.as_str() {
            "-h" | "--help" => return args.print_help().map(|()| None),
            "-p" | "--n-prompt" => prompts = list(args)?,
            "-n" | "--n-gen" => answers = list(args)?,
            "-d" | "--n-depth" => depths = list(args)?,
            "-b" | "--n-seqs" => texts = list(args)?,
            "-r" | "--repetitions" => options.repetitions = args.parse("a number from 1 up")?,
            "-o" | "--output" => options.format = format(args)?,
            "--load-format" => options.dummy = dummy(args)?,
            "--temperature" => options.temperature = args.parse("a number from 0 up")?,
            "--save" => options.save = Some(args.path()?),
            "--compare" => options.compare = Some(args.path()?),
            "--vs" => options.vs = Some(args.text()?),
            "--resolution" => options.resolution = args.parse::<f64>("a percentage")? / 100.0,
            "--breakdown" => options.breakdown = true,
            "--plot" => options.plot = Some(args.path()?),
            "--worker" => options.worker = true,
            _ if options.model.take(&option, args)? => {}
            _ => return Err(args.unknown(Word::Option(option))),
        }
    }
    check(args, &options, &texts)?;
    options.tests = Test::all(&prompts, &answers, &depths, &texts);
    Ok(Some(options))
}

fn check(args: &Args, options: &Options, texts: &[usize]) -> Result<()> {
    if options.repetitions == 0 {
        return Err(args.wrong("-r is 0: wanted 1 or more"));
    }
    if let Some(bad) = texts.iter().find(|&&b| b == 0 || b > 64) {
        return Err(args.wrong(&format!("-b is {bad}: wanted 1 to 64 texts")));
    }
    if !(0.0..1.0).contains(&options.resolution) {
        return Err(args.wrong("--resolution: wanted 0 to 99 percent"));
    }
    if let Some(file) = &options.plot
        && !file.extension().is_some_and(|e| e == "svg" || e == "html")
    {
        return Err(args.wrong("--plot: wanted a file that ends in .svg or .html"));
    }
    Ok(())
}

/// `128,512,2048`.
fn list(args: &mut Args) -> Result<Vec<usize>> {
    let text = args.text()?;
    let numbers: std::result::Result<Vec<usize>, _> = text.split(',').map(|n| n.trim().parse()).collect();
    numbers.map_err(|_| args.bad_value(&text, "numbers with commas between them: 128,512"))
}

fn format(args: &mut Args) -> Result<Format> {
    let text = args.text()?;
    match text.as_str() {
        "md" => Ok(Format::Md),
        "json" => Ok(Format::Json),
        "jsonl" => Ok(Format::JsonLines),
        "csv" => Ok(Format::Csv),
        other => Err(args.bad_value(other, "md, json, jsonl or csv")),
    }
}

/// `auto` or `dummy`.
pub(super) fn dummy(args: &mut Args) -> Result<bool> {
    let text = args.text()?;
    match text.as_str() {
        "dummy" => Ok(true),
        "auto" => Ok(false),
        other => Err(args.bad_value(other, "auto or dummy")),
    }
}

/// Prints what was not printed as it came.
fn print(options: &Options, rows: &[Row]) -> Result<()> {
    match options.format {
        Format::Md => output::print(&table::md(rows)),
        Format::Json => output::print(&row::to_json(rows)),
        Format::JsonLines => Ok(()),
        Format::Csv => {
            let lines = rows.iter().map(|row| row.csv() + "\n").collect::<String>();
            output::print(&format!("{}\n{lines}", row::COLUMNS.join(",")))
        }
    }
}

/// Says what makes a number doubtful.
fn warn(options: &Options, rows: &[Row]) {
    for row in rows {
        for doubt in table::doubts(row) {
            options.model.say(&format!("warning: {doubt}"));
        }
    }
}

/// The breakdown and the plot, which need the GPU's memory for a second model.
#[cfg(feature = "cuda")]
fn pictures(options: &Options, loaded: load::Loaded, ceilings: Option<Ceilings>, rows: &[Row]) -> Result<()> {
    use peregrine::measure::{breakdown, plot};
    if !options.breakdown && options.plot.is_none() {
        return Ok(());
    }
    let load::Loaded { engine, instruments, .. } = loaded;
    let ops = match (instruments.gpu(), ceilings) {
        (Some((gpu, stream)), Some(ceilings)) if engine.device_name().contains("cuda") => {
            options.model.say("each op apart ...");
            breakdown::measure(&engine, gpu, stream, ceilings)?
        }
        _ => Vec::new(),
    };
    if options.breakdown {
        let columns = if output::coloured() { 100 } else { 80 };
        output::print(&breakdown::table(&ops, columns))?;
    }
    match &options.plot {
        Some(file) => plot::write(file, rows, &ops, ceilings),
        None => Ok(()),
    }
}

/// The plot alone.
#[cfg(not(feature = "cuda"))]
fn pictures(options: &Options, _: load::Loaded, ceilings: Option<Ceilings>, rows: &[Row]) -> Result<()> {
    match &options.plot {
        Some(file) => peregrine::measure::plot::write(file, rows, &[], ceilings),
        None => Ok(()),
    }
}

/// The model's checkpoint, or a random one.
#[cfg(feature = "cuda")]
pub(super) fn checkpoint(model: &ModelFlags, dummy: bool) -> Result<peregrine::checkpoint::Checkpoint> {
    load::checkpoint(model, dummy)
}

/// What measures the GPU the model is on; nothing on the CPU.
fn instruments(options: &Options) -> Instruments {
    match options.model.ordinal() {
        Some(ordinal) => Instruments::open(ordinal),
        None => Instruments::default(),
    }
}
