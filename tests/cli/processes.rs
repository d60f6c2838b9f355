//! Closed pipes, Ctrl-C, and the chat.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use crate::program::{command, end_in_time, folder, model, run_with_stdin, wait};

/// Starts a generation that would go on for long, and waits for its first text.
fn start_long(extra: &[&str]) -> (Child, BufReader<ChildStdout>) {
    let model = model();
    let mut args = vec!["generate", "-m", &model, "--device", "cpu", "-p", "Once upon a time"];
    args.extend(["--ignore-eos", "-n", "2000"]);
    args.extend(extra);
    let mut child = command(&args).spawn().unwrap();
    end_in_time(&child);
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut first = [0; 1];
    out.read_exact(&mut first).unwrap();
    (child, out)
}

fn interrupt(child: &Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

fn stderr_of(child: &mut Child) -> String {
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_closed_pipe_is_one_line_and_status_1() {
    let (mut child, out) = start_long(&["-q"]);
    drop(out);
    let status = wait(&mut child);
    let err = stderr_of(&mut child);
    assert_eq!(status.code(), Some(1), "{err}");
    assert!(err.contains("stdout was closed") && err.matches('\n').count() == 1, "{err:?}");
}

#[test]
fn a_closed_stderr_does_no_harm() {
    let mut child = command(&["generate", "-m", "no/such/model", "-p", "x"]).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(wait(&mut child).code(), Some(4));
}

#[test]
fn ctrl_c_ends_a_generation_with_its_figures() {
    let (mut child, mut out) = start_long(&[]);
    interrupt(&child);
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    let status = wait(&mut child);
    let err = stderr_of(&mut child);
    assert_eq!(status.code(), Some(130), "{err}");
    assert!(rest.ends_with('\n'), "the text does not end its line: {rest:?}");
    assert!(err.contains(" new token") && err.contains("stop: interrupted"), "{err}");
    assert!(!err.contains("panicked"), "{err}");
}

#[test]
fn ctrl_c_leaves_no_half_of_a_checkpoint() {
    let folder = folder("interrupted");
    let dir = folder.to_str().unwrap();
    let dummy = ["bench", "--load-format", "dummy", "--device", "cpu"];
    for args in [&["synth", "--like", "falcon-7b", dir][..], &dummy] {
        let mut child = command(args).spawn().unwrap();
        end_in_time(&child);
        let name = format!("peregrine-dummy-{}", child.id());
        let places = [folder.clone(), Path::new("/dev/shm").join(&name), std::env::temp_dir().join(&name)];
        let parts = places.map(|place| place.join("model.safetensors.part"));
        while !parts.iter().any(|part| part.exists()) {
            assert!(child.try_wait().unwrap().is_none(), "{}", stderr_of(&mut child));
            std::thread::sleep(Duration::from_millis(1));
        }
        interrupt(&child);
        assert_eq!(wait(&mut child).code(), Some(130));
        assert_eq!(stderr_of(&mut child), "peregrine: interrupted\n");
        assert!(!parts.iter().any(|part| part.exists()), "{args:?}");
        assert!(!parts[1].parent().unwrap().exists() && !parts[2].parent().unwrap().exists());
    }
}

#[test]
fn chat_answers_each_line_and_keeps_to_its_streams() {
    let folder = folder("chat");
    let saved = folder.join("talk.txt");
    let model = model();
    let input = format!(
        "Once upon a time\n/save {}\n/nonsense\n\nAnd then\n/reset\n/exit\nnever read\n",
        saved.display()
    );
    let args = ["chat", "-m", &model, "--device", "cpu", "-n", "6"];
    let outcome = run_with_stdin(&args, input.as_bytes());
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(!outcome.out.contains('>'), "prompt characters on stdout: {:?}", outcome.out);
    assert!(outcome.out.ends_with('\n') && outcome.out.lines().count() >= 2, "{:?}", outcome.out);
    assert_eq!(outcome.err.matches("6 new tokens").count(), 2, "{}", outcome.err);
    assert!(outcome.err.contains("unknown command /nonsense"), "{}", outcome.err);
    let text = fs::read_to_string(&saved).unwrap();
    assert!(text.starts_with("User: Once upon a time\nAssistant: "), "{text:?}");

    // A second save does not overwrite, and the chat goes on.
    let again = run_with_stdin(&args, format!("/save {}\n", saved.display()).as_bytes());
    assert_eq!(again.code, 0);
    assert!(again.err.contains("cannot save"), "{}", again.err);
    assert_eq!(fs::read_to_string(&saved).unwrap(), text);
}

#[test]
fn chat_tells_a_conversation_that_no_longer_fits() {
    let model = model();
    let long = "word ".repeat(60);
    let args = ["chat", "-m", &model, "--device", "cpu", "-n", "2", "-c", "32"];
    let outcome = run_with_stdin(&args, format!("{long}\nHello\n").as_bytes());
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(outcome.err.contains("/reset"), "{}", outcome.err);
    assert!(outcome.err.contains("2 new tokens"), "the chat did not go on: {}", outcome.err);
}

#[test]
fn ctrl_c_stops_an_answer_and_then_the_chat() {
    let model = model();
    let args = ["chat", "-m", &model, "--device", "cpu", "-n", "2000", "--ignore-eos", "--stop", "\u{1}"];
    let mut child = command(&args).stdin(Stdio::piped()).spawn().unwrap();
    end_in_time(&child);
    let mut stdin = child.stdin.take().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut err = BufReader::new(child.stderr.take().unwrap());
    stdin.write_all(b"Once upon a time\n").unwrap();
    let mut first = [0; 1];
    out.read_exact(&mut first).unwrap();
    interrupt(&child);
    let figures = line_with(&mut err, " new token");
    assert!(figures.contains("interrupted"), "{figures}");
    assert!(child.try_wait().unwrap().is_none(), "the chat ended with the answer");
    // The answer's end is printed before its figures; now the chat waits for the next line.
    std::thread::sleep(Duration::from_millis(100));
    interrupt(&child);
    assert_eq!(wait(&mut child).code(), Some(130));
}

/// The next line that contains `word`.
fn line_with(from: &mut impl BufRead, word: &str) -> String {
    loop {
        let mut line = String::new();
        assert_ne!(from.read_line(&mut line).unwrap(), 0, "no line with {word:?}");
        if line.contains(word) {
            return line;
        }
    }
}
