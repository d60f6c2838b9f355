//! `lab try`: compiles a kernel file, and has a process of its own check and time it.
//!
//! That process says what it is about to do before it does it, a line each; when it falls silent or ends too early, the last of these
//! lines says where.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use peregrine::error::one_line;
use peregrine::lab::{compile, report};
use peregrine::{Error, Result};

use super::super::temporary::Temporary;
use super::super::{interrupt, output};
use super::{Options, known, ops};

/// Runs the command.
pub(super) fn attempt(options: &Options, op: &str, file: &str) -> Result<()> {
    known(op)?;
    interrupt::install()?;
    let path = Path::new(file);
    if !path.is_file() {
        return Err(Error::Usage(format!("no such file: {}", one_line(file))));
    }
    // Before nvcc is asked for anything: without a GPU there is nothing to try.
    let capability = ops::gpu(options)?.0.capability();
    let folder = Temporary::new(std::env::temp_dir().join(format!("peregrine-lab-{}", std::process::id())));
    std::fs::create_dir_all(folder.path())
        .map_err(|e| Error::Io(format!("cannot make a temporary folder: {e}")))?;
    let library = if path.extension().is_some_and(|e| e == "cu") {
        let compiled = compile::compile(op, path, folder.path(), capability)?;
        output::print(&report::table(&report::kernels(&compiled.ptxas)))?;
        compiled.library
    } else {
        path.to_path_buf()
    };
    if options.sass {
        ops::sass(&library, None)?;
    }
    let library =
        std::fs::canonicalize(&library).map_err(|e| Error::Io(format!("{}: {e}", one_line(file))))?;
    watch(options, op, &library)
}

fn start(options: &Options, op: &str, library: &Path) -> Result<Child> {
    let here = std::env::current_exe().map_err(|e| Error::Io(format!("cannot find this program: {e}")))?;
    let mut command = Command::new(here);
    command.arg("lab").arg("child").arg(op).arg(library);
    let ordinal = options.model.ordinal().unwrap_or(0);
    command.arg("--device").arg(format!("cuda:{ordinal}"));
    if options.in_model {
        command.arg("--in-model");
        command.args(options.dummy.then_some(["--load-format", "dummy"]).into_iter().flatten());
        command.args(options.model.name().map(|model| ["-m", model]).into_iter().flatten());
    }
    command.args(options.model.verbose.then_some("-v"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().map_err(|e| Error::Io(format!("cannot start a process: {e}")))
}

/// Follows the child to its end.
fn watch(options: &Options, op: &str, library: &Path) -> Result<()> {
    let mut child = start(options, op, library)?;
    let (sender, lines) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
    }
    let mut at = "its start".to_owned();
    let mut patience = options.seconds;
    let mut verdict = None;
    let fault = loop {
        match lines.recv_timeout(Duration::from_secs_f64(patience)) {
            Ok(line) => match line.split_once('\t') {
                Some(("at", what)) => (at, patience) = (what.to_owned(), options.seconds),
                // What takes long and is none of the kernel's doing.
                Some(("slow", what)) => (at, patience) = (what.to_owned(), options.seconds.max(300.0)),
                Some(("say", text)) => output::print(&format!("{text}\n"))?,
                Some(("end", text)) => verdict = Some(text.to_owned()),
                // The library may print.
                _ => output::note(&format!("the kernel's library says: {}", one_line(&line))),
            },
            Err(RecvTimeoutError::Timeout) => {
                // The driver takes a kernel that spins off the GPU when its process ends.
                let _ = child.kill();
                let _ = child.wait();
                break Some(format!(
                    "{op} hangs: no sign of life for {patience:.0} s in {at}; it was stopped"
                ));
            }
            Err(RecvTimeoutError::Disconnected) => break None,
        }
    };
    if let Some(fault) = fault {
        return Err(Error::Io(fault));
    }
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        // What it said is for the message alone.
        let _ = stderr.read_to_string(&mut said);
    }
    let status = child.wait().map_err(|e| Error::Io(format!("waiting for a process: {e}")))?;
    let last = said.lines().last().map(|line| one_line(line.trim_start_matches("peregrine: ")));
    let last = last.unwrap_or(format!("it ended without a word ({status})"));
    match verdict.as_deref() {
        Some("right") if status.success() => Ok(()),
        Some(wrong) if status.success() => Err(Error::Io(format!("{op} is not accepted: {wrong}"))),
        _ => Err(Error::Io(format!("{op} failed in {at}: {last}"))),
    }
}
