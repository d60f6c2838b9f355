//! The `peregrine` program: text, token ids and files in; streamed text, JSON lines and files out.
//!
//! Results go to stdout, everything else to stderr. Exit status: 0 fine, 1 failure while running, 2 wrong usage,
//! 3 no driver or GPU, 4 bad model or file, 5 out of GPU memory, 130 Ctrl-C (see [`peregrine::Error`]).

// `println!` panics when the reader of a pipe has gone; `cli::output` reports it instead.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
