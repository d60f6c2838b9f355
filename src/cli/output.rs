//! stdout and stderr: results are flushed as they come, notes never fail, nothing panics on a closed pipe.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use peregrine::error::one_line;
use peregrine::{Error, Result};

/// Writes a result to stdout at once.
///
/// # Errors
/// [`Error::Io`] when the reader has gone or the disk is full.
pub(super) fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| stdout_error(&error))
}

fn stdout_error(error: &io::Error) -> Error {
    Error::Io(match error.kind() {
        io::ErrorKind::BrokenPipe => "stdout was closed before the output was complete".to_string(),
        _ => format!("stdout: {error}"),
    })
}

/// Refuses a file that could not be written in the end, before anything long begins.
///
/// # Errors
/// [`Error::Usage`] when there is no such folder.
pub(super) fn require_folder(file: &Path) -> Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    match folder {
        Some(folder) if !folder.is_dir() => Err(Error::Usage(format!(
            "cannot write {}: there is no such folder",
            one_line(&file.display().to_string())
        ))),
        _ => Ok(()),
    }
}

/// Writes a line to stderr. Failure is ignored: there is nowhere left to report it.
pub(super) fn note(line: &str) {
    let _ = writeln!(io::stderr().lock(), "peregrine: {line}");
}

/// Writes to stderr without a line end, for the chat's prompt.
pub(super) fn ask(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Generated text for stdout. A terminal would obey escape sequences in it, so control characters other than line
/// ends and tabs become U+FFFD there; files and pipes get the text as it is.
pub(super) fn printable(text: &str) -> std::borrow::Cow<'_, str> {
    let harmful = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if io::stdout().is_terminal() && text.contains(harmful) {
        text.replace(harmful, "\u{fffd}").into()
    } else {
        text.into()
    }
}

/// Shows the progress of loading or writing on stderr, one line that overwrites itself. Wanted only on a terminal. Plain
/// characters, no escape sequences: `NO_COLOR` has nothing to turn off.
pub(super) fn progress(done_bytes: u64, total_bytes: u64) {
    const CELLS: u64 = 30;
    let total = total_bytes.max(1);
    let filled = (done_bytes.min(total) as u128 * u128::from(CELLS) / u128::from(total)) as usize;
    let bar = "#".repeat(filled) + &".".repeat(CELLS as usize - filled);
    let mib = |bytes: u64| bytes >> 20;
    let mut stderr = io::stderr().lock();
    let line = format!("[{bar}] {} / {} MiB", mib(done_bytes), mib(total_bytes));
    let end =
        if done_bytes >= total_bytes { format!("\r{}\r", " ".repeat(line.len())) } else { String::new() };
    let _ = write!(stderr, "\r{line}{end}");
    let _ = stderr.flush();
}

/// Whether [`progress`] should be shown.
pub(super) fn progress_wanted(quiet: bool) -> bool {
    !quiet && io::stderr().is_terminal()
}

/// Whether stdout is a terminal that wants colours.
pub(super) fn coloured() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    io::stdout().is_terminal() && !refused
}
