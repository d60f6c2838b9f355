//! The program as its users meet it: exit statuses, messages of one line, clean stdout, pipes and Ctrl-C.
//! Everything runs on the CPU with the small model.

#![cfg(feature = "cli")]
// A helper that panics fails its test, as it should.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use peregrine::tokenizer::Tokenizer;

/// Longest time anything here may take; a hang is a failure.
const PATIENCE: Duration = Duration::from_secs(120);

struct Outcome {
    code: i32,
    out: String,
    err: String,
}

fn model() -> String {
    format!("{}/models/tiny-falcon-tales", env!("CARGO_MANIFEST_DIR"))
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_peregrine"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn wait(child: &mut Child) -> ExitStatus {
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

fn run_with_stdin(args: &[&str], stdin: &[u8]) -> Outcome {
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

fn run(args: &[&str]) -> Outcome {
    run_with_stdin(args, b"")
}

/// `generate` on the CPU with the small model.
fn generate(args: &[&str]) -> Outcome {
    let model = model();
    let mut all = vec!["generate", "-m", &model, "--device", "cpu"];
    all.extend(args);
    run(&all)
}

/// An empty folder of this test's own.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cli-{name}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Asserts that `outcome` is a refusal: status, nothing on stdout, one line on stderr that has every word.
#[track_caller]
fn assert_refused(outcome: &Outcome, code: i32, words: &[&str]) {
    assert_eq!(outcome.code, code, "stderr: {}", outcome.err);
    assert_eq!(outcome.out, "");
    assert!(outcome.err.starts_with("peregrine: "), "{:?}", outcome.err);
    assert_eq!(outcome.err.matches('\n').count(), 1, "not one line: {:?}", outcome.err);
    for word in words {
        assert!(outcome.err.contains(word), "{word:?} is not in {:?}", outcome.err);
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    for args in [&[][..], &["--help"], &["-h"], &["help"], &["help", "chat"], &["--version"], &["-V"]] {
        let outcome = run(args);
        assert_eq!(outcome.code, 0, "{args:?}");
        assert_eq!(outcome.err, "", "{args:?}");
        assert!(outcome.out.contains("peregrine"), "{args:?}");
    }
    for name in ["generate", "chat", "logits", "inspect", "synth"] {
        let outcome = run(&[name, "--help"]);
        assert_eq!((outcome.code, outcome.err.as_str()), (0, ""), "{name}");
        assert!(outcome.out.contains(&format!("Usage: peregrine {name}")), "{name}");
        assert!(outcome.out.lines().all(|line| line.chars().count() <= 110), "{name}: a line is too long");
        assert!(outcome.out.contains("\n  -h, --help "), "{name}: the options are not aligned");
    }
    assert!(run(&["--version"]).out.contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_is_refused_with_advice() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["generat"], &["generat", "'generate'"]),
        (&["frobnicate"], &["frobnicate", "chat"]),
        (&["--frobnicate"], &["--frobnicate", "--help"]),
        (&["generate", "--temprature", "1"], &["--temprature", "--temperature", "generate --help"]),
        (&["generate", "--max_new_tokens", "1"], &["--max-new-tokens"]),
        (&["chat", "--reset"], &["--reset", "chat --help"]),
        (&["generate", "-x"], &["-x"]),
        (&["generate", "Hello"], &["Hello", "unexpected"]),
        (&["generate", "-n"], &["-n", "needs a value"]),
        (&["generate", "-n", "many"], &["-n", "many", "expected"]),
        (&["generate", "-n", "-3"], &["-n", "-3", "expected"]),
        (&["generate", "--seed", "1.5"], &["--seed", "1.5"]),
        (&["generate", "--temperature=-1", "-p", "x"], &["temperature", "-1"]),
        (&["generate", "--temperature", "nan", "-p", "x"], &["temperature", "NaN"]),
        (&["generate", "--temperature", "1", "--top-p", "2", "-p", "x"], &["top-p", "2"]),
        (&["generate", "--repetition-penalty", "0", "-p", "x"], &["repetition-penalty", "0"]),
        (&["generate", "--json=yes"], &["--json", "yes"]),
        (&["generate", "--template", "alpaca"], &["alpaca", "card, upstream or none"]),
        (&["generate", "--device", "tpu"], &["tpu", "cuda:N"]),
        (&["generate", "--device", "cuda:x"], &["cuda:x", "cuda:N"]),
        (&["generate", "-p", "a", "--file", "b"], &["more than one prompt"]),
        (&["generate", "-f", "no-such-file"], &["no-such-file", "No such file"]),
        (&["logits", "-p", "a"], &["-o"]),
        (&["synth", "--like", "falcon-7c", "somewhere"], &["falcon-7c", "falcon-7b"]),
        (&["synth", "--like", "falcon-7b"], &["folder"]),
        (&["inspect", "a", "b"], &["two models"]),
    ];
    for (args, words) in cases {
        println!("peregrine {args:?}");
        assert_refused(&run(args), 2, words);
    }
}

#[test]
fn a_missing_or_hostile_model_is_refused_on_one_line() {
    for args in [
        &["generate", "-p", "x", "-m", "no/such/folder"][..],
        &["chat", "-m", "no/such/folder"],
        &["logits", "-p", "x", "-o", "never", "-m", "no/such/folder"],
        &["inspect", "no/such/folder"],
    ] {
        assert_refused(&run(args), 4, &["no/such/folder"]);
    }
    let evil = "evil\n\u{1b}[31mname";
    let outcome = run(&["inspect", evil]);
    assert_refused(&outcome, 4, &["evil"]);
    assert!(!outcome.err.contains('\u{1b}'), "{:?}", outcome.err);

    let empty = folder("empty-model");
    assert_refused(&run(&["inspect", empty.to_str().unwrap()]), 4, &["cli-empty-model"]);
}

#[test]
fn cuda_without_a_gpu_is_exit_status_3() {
    // A GPU that works is seen by `auto`, which then says nothing about a fallback.
    let auto = run(&["generate", "-m", &model(), "-p", "Once", "-n", "1", "--json"]);
    assert_eq!(auto.code, 0, "{}", auto.err);
    if !auto.err.contains("running on the CPU") {
        eprintln!("SKIPPED this machine has a GPU: the refusal of --device cuda cannot be seen");
        return;
    }
    let model = model();
    let outcome = run(&["generate", "-m", &model, "-p", "Once", "--device", "cuda"]);
    assert_refused(&outcome, 3, &["--device cpu"]);
    assert_refused(&run(&["generate", "-p", "Once", "--device", "cuda:3"]), 3, &["--device cpu"]);
}

#[test]
fn text_goes_to_stdout_and_figures_to_stderr() {
    let first = generate(&["-p", "Once upon a time", "-n", "24"]);
    assert_eq!(first.code, 0, "{}", first.err);
    assert!(first.out.ends_with('\n') && first.out.trim().len() > 20, "{:?}", first.out);
    assert!(!first.out.contains("peregrine:"));
    let figures = first.err.lines().last().unwrap();
    for word in
        ["prompt tokens", "24 new tokens", "tokens/s", "first token after", "peak memory", "greedy on cpu"]
    {
        assert!(figures.contains(word), "{word:?} is not in {figures:?}");
    }
    let echo = generate(&["-q", "--echo", "-p", "Once upon a time", "-n", "24"]);
    assert_eq!(echo.out, format!("Once upon a time{}", first.out));
    let quiet = generate(&["-q", "-p", "Once upon a time", "-n", "24"]);
    assert_eq!((quiet.out, quiet.err.as_str()), (first.out, ""));
}

#[test]
fn a_seed_repeats_its_text_and_only_its_own() {
    let sample = |seed| {
        let args = ["-q", "-p", "Once upon a time", "-n", "24", "--temperature", "1.2", "--seed", seed];
        let outcome = generate(&args);
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        outcome.out
    };
    assert_eq!(sample("1"), sample("1"));
    assert_ne!(sample("1"), sample("2"));
}

#[test]
fn sampling_options_without_temperature_are_called_out() {
    let outcome = generate(&["-p", "Once", "-n", "1", "--top-p", "0.9", "--seed", "4"]);
    assert_eq!(outcome.code, 0);
    assert!(
        outcome.err.contains("--top-p, --seed") && outcome.err.contains("--temperature"),
        "{}",
        outcome.err
    );
}

#[test]
fn json_lines_parse_and_agree_with_the_text() {
    let plain = generate(&["-q", "-p", "The fox said", "-n", "16"]);
    let outcome = generate(&["--json", "-p", "The fox said", "-n", "16"]);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let lines: Vec<serde_json::Value> =
        outcome.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (figures, tokens) = lines.split_last().unwrap();
    assert_eq!(tokens.len(), 16);
    let text: String = tokens.iter().map(|token| token["text"].as_str().unwrap()).collect();
    assert_eq!(text.trim_end_matches('\n'), plain.out.trim_end_matches('\n'));
    assert!(tokens.iter().all(|token| token["id"].is_u64() && token["logprob"].as_f64().unwrap() <= 0.0));
    assert_eq!(figures["new_tokens"], 16);
    assert_eq!(figures["stop_reason"], "max_new_tokens");
    assert_eq!(figures["mode"], "greedy");
    for key in ["prompt_tokens", "first_token_seconds", "decode_tokens_per_second", "peak_memory_bytes"] {
        assert!(figures[key].is_number(), "{key} in {figures}");
    }
}

#[test]
fn the_prompt_may_come_from_anywhere() {
    let prompt = "Once upon a time there was a\nfox";
    let expected = generate(&["-q", "-p", prompt, "-n", "8"]).out;
    let folder = folder("prompt");
    let (text_file, ids_file) = (folder.join("prompt.txt"), folder.join("ids.json"));
    fs::write(&text_file, format!("{prompt}\n")).unwrap();
    let json = fs::read(format!("{}/tokenizer.json", model())).unwrap();
    let ids =
        Tokenizer::from_json(&json, Path::new("tokenizer.json")).unwrap().encode(prompt, false).unwrap();
    fs::write(&ids_file, format!("{ids:?}")).unwrap();

    assert_eq!(generate(&["-q", "-f", text_file.to_str().unwrap(), "-n", "8"]).out, expected);
    assert_eq!(generate(&["-q", "--ids", ids_file.to_str().unwrap(), "-n", "8"]).out, expected);
    let model = model();
    for dash in [&[][..], &["-p", "-"]] {
        let mut args = vec!["generate", "-m", &model, "--device", "cpu", "-q", "-n", "8"];
        args.extend(dash);
        assert_eq!(run_with_stdin(&args, format!("{prompt}\n").as_bytes()).out, expected, "{dash:?}");
    }
}

#[test]
fn prompts_that_cannot_be_used_are_refused() {
    let folder = folder("bad-prompts");
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_string()
    };
    let model = model();
    let bad: &[(&str, String, &str)] = &[
        ("-f", file("latin1.txt", b"caf\xe9"), "not UTF-8 at byte 3"),
        ("-f", file("empty.txt", b""), "empty"),
        ("--ids", file("text.json", b"hello"), "JSON list of token ids"),
        ("--ids", file("negative.json", b"[1, -2]"), "JSON list of token ids"),
        ("--ids", file("beyond.json", b"[70000]"), "70000"),
        ("--ids", file("none.json", b"[]"), "empty"),
    ];
    for (option, path, word) in bad {
        println!("{option} {path}");
        assert_refused(&run(&["generate", "-m", &model, "--device", "cpu", option, path]), 2, &[word]);
    }
    let long = generate(&["-c", "8", "-p", "one two three four five six seven eight nine ten eleven twelve"]);
    assert_refused(&long, 2, &["8"]);
    let stdin = run_with_stdin(&["generate", "-m", &model, "--device", "cpu"], &[0xff, 0xfe]);
    assert_refused(&stdin, 2, &["stdin", "not UTF-8"]);
}

#[test]
fn a_stop_string_ends_the_text_and_is_not_printed() {
    let whole = generate(&["-q", "-p", "Once upon a time", "-n", "40"]).out;
    // A word from the middle of the text, cut in two places by the tokens or not: it must not matter.
    let stop = whole.split_whitespace().nth(8).unwrap();
    let cut = whole.find(stop).unwrap();
    let outcome = generate(&["-p", "Once upon a time", "-n", "40", "--stop", stop]);
    assert_eq!(outcome.out.trim_end_matches('\n'), whole[..cut].trim_end_matches('\n'));
    assert!(outcome.err.contains("stop: stop string"), "{}", outcome.err);
}

#[test]
fn special_tokens_in_a_prompt_are_text_unless_asked() {
    let count = |args: &[&str]| {
        let outcome = generate(&[&["--json", "-n", "1", "-p", "a<|endoftext|>b"], args].concat());
        let figures: serde_json::Value = serde_json::from_str(outcome.out.lines().last().unwrap()).unwrap();
        figures["prompt_tokens"].as_u64().unwrap()
    };
    let special = count(&["--special"]);
    assert_eq!(special, 3);
    assert!(count(&[]) > special);
}

#[test]
fn without_a_model_the_built_in_one_runs() {
    let outcome = run(&["generate", "--device", "cpu", "-p", "Once upon a time", "-n", "8"]);
    if cfg!(feature = "demo") {
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        assert!(outcome.err.contains("built-in"), "{}", outcome.err);
        assert_eq!(outcome.out, generate(&["-p", "Once upon a time", "-n", "8"]).out);
    } else {
        assert_refused(&outcome, 2, &["-m MODEL"]);
    }
}

/// `(ids, logits, vocab)` of a file written by `peregrine logits`.
fn read_logits(path: &Path) -> (Vec<i32>, Vec<f32>, usize) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (ids, logits) = (file.tensor("ids").unwrap(), file.tensor("logits").unwrap());
    assert_eq!((ids.dtype(), logits.dtype()), (safetensors::Dtype::I32, safetensors::Dtype::F32));
    let vocab = logits.shape()[1];
    assert_eq!(logits.shape(), [ids.shape()[0], vocab]);
    let words = |bytes: &[u8]| bytes.chunks_exact(4).map(|w| [w[0], w[1], w[2], w[3]]).collect::<Vec<_>>();
    (
        words(ids.data()).into_iter().map(i32::from_le_bytes).collect(),
        words(logits.data()).into_iter().map(f32::from_le_bytes).collect(),
        vocab,
    )
}

#[test]
fn logits_are_written_whole_or_not_at_all() {
    let folder = folder("logits");
    let (model, prompt) = (model(), "Once upon a time there was a king");
    let path = |name: &str| folder.join(name);
    let logits = |name: &str, args: &[&str]| {
        let out = path(name);
        let mut all = vec!["logits", "-m", &model, "--device", "cpu", "-o", out.to_str().unwrap()];
        all.extend(args);
        run(&all)
    };
    let outcome = logits("prefill.safetensors", &["-p", prompt]);
    assert_eq!((outcome.code, outcome.out.as_str()), (0, ""), "{}", outcome.err);
    assert_eq!(logits("decode.safetensors", &["-p", prompt, "--decode"]).code, 0);
    let (ids, prefill, vocab) = read_logits(&path("prefill.safetensors"));
    let (decode_ids, decode, _) = read_logits(&path("decode.safetensors"));
    assert_eq!((ids.len(), vocab, prefill.len()), (decode_ids.len(), 4096, ids.len() * vocab));
    assert_eq!(ids, decode_ids);
    // Exactly: the reference sums each row in the same order either way.
    let differ = prefill.iter().zip(&decode).position(|(a, b)| a != b);
    assert_eq!(differ, None, "prefill and decode differ");
    // The likeliest token after the last position is the one that greedy generation takes.
    let last = &prefill[prefill.len() - vocab..];
    let best = (0..vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
    let next = generate(&["--json", "-p", prompt, "-n", "1"]);
    let next: serde_json::Value = serde_json::from_str(next.out.lines().next().unwrap()).unwrap();
    assert_eq!(next["id"], best);

    assert_refused(&logits("refused.safetensors", &["-p", ""]), 2, &["empty"]);
    assert_refused(&logits("no/such/folder.safetensors", &["-p", "a"]), 1, &["cannot write"]);
    let mut left: Vec<_> = fs::read_dir(&folder).unwrap().map(|file| file.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["decode.safetensors", "prefill.safetensors"], "something was left behind");
}

#[test]
fn inspect_describes_the_checkpoint() {
    let text = run(&["inspect", &model()]);
    assert_eq!(text.code, 0, "{}", text.err);
    assert!(text.out.contains("4096") && text.out.contains("320"), "{}", text.out);
    let json = run(&["inspect", &model(), "--json"]);
    assert_eq!(json.code, 0, "{}", json.err);
    let _: serde_json::Value = serde_json::from_str(&json.out).unwrap();
}

#[test]
fn a_synthetic_checkpoint_runs_on_ids() {
    let folder = folder("synth");
    let (dir, ids) = (folder.join("tiny"), folder.join("ids.json"));
    let dir = dir.to_str().unwrap();
    fs::write(&ids, "[300, 301, 302]").unwrap();
    let made =
        run(&["synth", "--like", "tiny", dir, "--seed", "3", "--group-size", "32", "--asym", "--desc-act"]);
    assert_eq!((made.code, made.out.as_str()), (0, ""), "{}", made.err);
    assert!(made.err.contains("wrote") && !made.err.contains('\r'), "{:?}", made.err);
    // There is no tokenizer: ids in, ids out; text is refused by name.
    let args = ["generate", "-q", "-m", dir, "--device", "cpu", "--ignore-eos", "-n", "4"];
    let text = run(&[&args[..], &["--ids", ids.to_str().unwrap()]].concat());
    assert_eq!(text.code, 0, "{}", text.err);
    assert_eq!(
        text.out.split_whitespace().filter(|id| id.parse::<u32>().is_ok()).count(),
        4,
        "{:?}",
        text.out
    );
    assert_refused(&run(&[&args[..], &["-p", "Once"]].concat()), 4, &["tokenizer.json"]);
    // A model is never overwritten.
    assert_refused(&run(&["synth", "--like", "tiny", dir]), 2, &["exists"]);
    assert_refused(
        &run(&["synth", "--like", "tiny", &format!("{dir}2"), "--tokenizer", "no/file"]),
        2,
        &["no/file"],
    );
}

/// Starts a generation that would go on for long, and waits for its first text.
fn start_long(extra: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
    let model = model();
    let mut args = vec!["generate", "-m", &model, "--device", "cpu", "-p", "Once upon a time"];
    args.extend(["--ignore-eos", "-n", "2000"]);
    args.extend(extra);
    let mut child = command(&args).spawn().unwrap();
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
    assert!(err.contains("new tokens") && err.contains("stop: interrupted"), "{err}");
    assert!(!err.contains("panicked"), "{err}");
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
    let mut stdin = child.stdin.take().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut err = BufReader::new(child.stderr.take().unwrap());
    stdin.write_all(b"Once upon a time\n").unwrap();
    let mut first = [0; 1];
    out.read_exact(&mut first).unwrap();
    interrupt(&child);
    let figures = line_with(&mut err, "new tokens");
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
