//! Subcommands of `peregrine`, one file each, and what they share.
//!
//! `args` (options and their errors) < `output` (stdout and stderr), `temporary` < `interrupt` (Ctrl-C) < `model` (loading, with
//! the built-in model) < `generate`, `chat`, `logits`, `inspect`, `synth`, `bench`, `lab`.

mod args;
mod bench;
mod builtin;
mod chat;
mod generate;
mod inspect;
mod interrupt;
mod lab;
mod logits;
mod model;
mod output;
mod prompt;
mod report;
mod sampling;
mod synth;
mod temporary;

use std::ffi::OsString;
use std::process::ExitCode;

use peregrine::{Error, Result};

use args::Args;

const HELP: &str = "\
Runs Falcon-7B-Instruct GPTQ (4 bit) with hand-written CUDA kernels, or, slowly, on the CPU.

Usage: peregrine COMMAND [OPTIONS]

Commands:
  generate   continue a text, streamed
  chat       talk, turn by turn
  logits     write the logits of every position to a .safetensors file
  inspect    say what a checkpoint holds and what it needs
  synth      write a random checkpoint of Falcon-7B's shape, for measuring
  bench      measure prompts and answers, and how far they are from what the machine can do
  lab        look at kernels one by one, and at kernels of your own

  peregrine COMMAND --help lists the options of a command.
  --version  print the version

MODEL is a folder, a .safetensors file, or a name in the local Hugging Face cache
(TheBloke/falcon-7b-instruct-GPTQ). Nothing is ever downloaded.

Exit status: 0 fine, 1 failure while running, 2 wrong usage, 3 no driver or GPU,
4 bad model or file, 5 out of GPU memory, 130 Ctrl-C.
";

const COMMANDS: [&str; 7] = ["generate", "chat", "logits", "inspect", "synth", "bench", "lab"];

/// Runs the program; every failure is one line on stderr and an exit status.
pub(crate) fn main() -> ExitCode {
    model::seconds_running();
    match run(std::env::args_os().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&error.to_string());
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(mut words: Vec<OsString>) -> Result<()> {
    if words.is_empty() {
        return output::print(HELP);
    }
    let command = words.remove(0);
    match command.to_string_lossy().as_ref() {
        "generate" => generate::run(Args::new("generate", generate::HELP, words)),
        "chat" => chat::run(Args::new("chat", chat::HELP, words)),
        "logits" => logits::run(Args::new("logits", logits::HELP, words)),
        "inspect" => inspect::run(Args::new("inspect", inspect::HELP, words)),
        "synth" => synth::run(Args::new("synth", synth::HELP, words)),
        "bench" => bench::run(Args::new("bench", bench::HELP, words.clone()), words),
        "lab" => lab::run(Args::new("lab", lab::HELP, words)),
        "help" if !words.is_empty() => {
            words.truncate(1);
            words.push("--help".into());
            run(words)
        }
        "help" | "-h" | "--help" => output::print(HELP),
        "-V" | "--version" => output::print(&version()),
        other => Err(unknown_command(other)),
    }
}

fn unknown_command(word: &str) -> Error {
    let kind = if word.starts_with('-') { "option" } else { "command" };
    let hint = match args::nearest(word, COMMANDS.into_iter()) {
        Some(near) => format!("did you mean '{near}'?"),
        None if kind == "option" => "options come after a command".to_string(),
        None => format!("the commands are {}", COMMANDS.join(", ")),
    };
    Error::Usage(format!("unknown {kind} '{}': {hint} (peregrine --help)", peregrine::error::one_line(word)))
}

fn version() -> String {
    let kernels = if cfg!(feature = "cuda") { "with CUDA kernels" } else { "CPU only" };
    let demo = if cfg!(feature = "demo") { ", with the built-in model" } else { "" };
    format!("peregrine {} ({kernels}{demo})\n", env!("CARGO_PKG_VERSION"))
}
