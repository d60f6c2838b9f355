//! What `generate` prints.

use std::fs;
use std::path::Path;

use peregrine::tokenizer::Tokenizer;

use crate::program::{assert_refused, folder, generate, model, run, run_with_stdin};

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
fn speculation_says_the_same_in_fewer_steps() {
    let song = "The fox said no. The crow said no. The fox said yes. The crow said yes. The fox said";
    let run = |args: &[&str]| {
        let outcome = generate(&[&["--json", "-p", song, "-n", "40"], args].concat());
        let mut lines: Vec<serde_json::Value> =
            outcome.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        (lines.pop().unwrap(), lines)
    };
    let ((plain, tokens), (speculated, same)) = (run(&[]), run(&["--speculate"]));
    assert_eq!(tokens, same);
    assert_eq!((&plain["decode_steps"], &plain["drafts"]), (&39.into(), &0.into()));
    let count = |key: &str| speculated[key].as_u64().unwrap();
    assert_eq!(count("decode_steps") + count("accepted_drafts"), 39);
    assert!(count("decode_steps") < 20 && count("drafts") >= count("accepted_drafts"), "{speculated}");
    let line = generate(&["-p", song, "-n", "40", "--speculate"]).err;
    assert!(line.contains(" steps, ") && line.contains(" drafts right"), "{line}");
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
