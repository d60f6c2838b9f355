//! The files the program writes.

use std::fs;
use std::path::Path;

use crate::program::{assert_refused, folder, generate, model, run};

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
