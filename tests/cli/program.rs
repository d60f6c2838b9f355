//! Running the program.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longest time anything here may take; a hang is a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

pub(crate) fn model() -> String {
    format!("{}/models/tiny-falcon-tales", env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_peregrine"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(crate) fn wait(child: &mut Child) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("the program did not end in {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Kills `child` if it is still there in [`PATIENCE`], so that a read of its output cannot wait for ever.
pub(crate) fn end_in_time(child: &Child) {
    let id = child.id().to_string();
    std::thread::spawn(move || {
        std::thread::sleep(PATIENCE);
        let _ = Command::new("kill").args(["-KILL", &id]).stderr(Stdio::null()).status();
    });
}

pub(crate) fn run_with_stdin(args: &[&str], stdin: &[u8]) -> Outcome {
    let mut child = command(args).stdin(Stdio::piped()).spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    // The program may rightly end without reading: a broken pipe here is no failure.
    let _ = pipe.write_all(stdin);
    drop(pipe);
    let output = child.wait_with_output().unwrap();
    Outcome {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

pub(crate) fn run(args: &[&str]) -> Outcome {
    run_with_stdin(args, b"")
}

/// `generate` on the CPU with the small model.
pub(crate) fn generate(args: &[&str]) -> Outcome {
    let model = model();
    let mut all = vec!["generate", "-m", &model, "--device", "cpu"];
    all.extend(args);
    run(&all)
}

/// An empty folder of this test's own.
pub(crate) fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cli-{name}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Asserts that `outcome` is a refusal: status, nothing on stdout, one line on stderr that has every word.
#[track_caller]
pub(crate) fn assert_refused(outcome: &Outcome, code: i32, words: &[&str]) {
    assert_eq!(outcome.code, code, "stderr: {}", outcome.err);
    assert_eq!(outcome.out, "");
    assert!(outcome.err.starts_with("peregrine: "), "{:?}", outcome.err);
    assert_eq!(outcome.err.matches('\n').count(), 1, "not one line: {:?}", outcome.err);
    for word in words {
        assert!(outcome.err.contains(word), "{word:?} is not in {:?}", outcome.err);
    }
}
