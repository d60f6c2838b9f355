//! What is refused, and how.

use std::fs;

use crate::program::{assert_refused, folder, generate, model, run, run_with_stdin};

#[test]
fn help_and_version_go_to_stdout() {
    for args in [&[][..], &["--help"], &["-h"], &["help"], &["help", "chat"], &["--version"], &["-V"]] {
        let outcome = run(args);
        assert_eq!(outcome.code, 0, "{args:?}");
        assert_eq!(outcome.err, "", "{args:?}");
        assert!(outcome.out.contains("peregrine"), "{args:?}");
    }
    for name in ["generate", "chat", "logits", "inspect", "synth", "bench", "lab"] {
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
        eprintln!("SKIPPED cuda_without_a_gpu_is_exit_status_3: this machine has a GPU");
        return;
    }
    let model = model();
    let outcome = run(&["generate", "-m", &model, "-p", "Once", "--device", "cuda"]);
    assert_refused(&outcome, 3, &["CUDA"]);
    assert!(outcome.err.to_lowercase().contains("cpu"), "no remedy in {:?}", outcome.err);
    assert_refused(&run(&["generate", "-p", "Once", "--device", "cuda:3"]), 3, &["CUDA"]);
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
fn inspect_describes_the_checkpoint() {
    let text = run(&["inspect", &model()]);
    assert_eq!(text.code, 0, "{}", text.err);
    assert!(text.out.contains("4096") && text.out.contains("320"), "{}", text.out);
    let json = run(&["inspect", &model(), "--json"]);
    assert_eq!(json.code, 0, "{}", json.err);
    let _: serde_json::Value = serde_json::from_str(&json.out).unwrap();
}
