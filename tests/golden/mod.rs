//! The goldens, and the checks that any device must pass against them.
//!
//! `tests/fixtures/goldens/{a,d}` hold what Hugging Face transformers 4.38.2 computed in f32 on the CPU from the
//! same checkpoints: `a` is the built-in model (symmetric), `d` the same one quantised asymmetrically.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]
#![allow(missing_docs, clippy::expect_used, clippy::panic, reason = "a test's helper fails by panicking")]

#[path = "../common/gpu.rs"]
mod gpu;

use std::path::{Path, PathBuf};

use peregrine::Result;
use peregrine::engine::{Device, Engine, LoadOptions, SessionOptions};
use peregrine::sampler::Sampling;
use safetensors::SafeTensors;

#[cfg(feature = "cuda")]
#[allow(unused_imports, reason = "each test binary uses a part")]
pub use gpu::gpu;
#[allow(unused_imports, reason = "each test binary uses a part")]
pub use gpu::unless_no_gpu;

/// The prompts of every golden file.
pub const PROMPTS: [&str; 4] = ["card", "one_token", "long", "non_ascii"];

/// The repository. A test binary may run on another machine than it was built on, from the repository's root.
fn root() -> PathBuf {
    let here = Path::new(".");
    if here.join("models").exists() { here.to_owned() } else { PathBuf::from(env!("CARGO_MANIFEST_DIR")) }
}

/// The checkpoint of golden set `a` or `d`.
pub fn model_path(set: &str) -> String {
    let path = match set {
        "a" => root().join("models/tiny-falcon-tales"),
        _ => root().join("tests/fixtures").join(set),
    };
    path.display().to_string()
}

/// A copy of a checkpoint in which `edit(name, bytes)` has changed tensors.
pub fn edited(from: &Path, to: &Path, mut edit: impl FnMut(&str, &mut [u8])) {
    std::fs::create_dir_all(to).expect("folder");
    for file in ["config.json", "quantize_config.json"] {
        std::fs::copy(from.join(file), to.join(file)).expect("copy");
    }
    let mut bytes = std::fs::read(from.join("model.safetensors")).expect("read");
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&bytes[8..data]).expect("header");
    for (name, tensor) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let offset = |i: usize| data + tensor["data_offsets"][i].as_u64().expect("offset") as usize;
        edit(name, &mut bytes[offset(0)..offset(1)]);
    }
    std::fs::write(to.join("model.safetensors"), bytes).expect("write");
}

pub fn load(set: &str, device: Device) -> Result<Engine> {
    Engine::load(&model_path(set), &LoadOptions { device, progress: None })
}

/// What was computed for one prompt of n tokens.
pub struct Golden {
    pub name: String,
    /// [n]
    pub ids: Vec<u32>,
    /// [vocab], after the last token.
    pub last_logits: Vec<f32>,
    /// [n, 20], falling.
    pub top_ids: Vec<u32>,
    pub top_logits: Vec<f32>,
    /// [64]
    pub greedy: Continuation,
    /// The same with repetition penalty 1.15.
    pub penalised: Continuation,
    /// [n, hidden] after the first layer; of the first prompt only.
    pub hidden0: Option<Vec<f32>>,
}

/// A greedy continuation that goes on after end-of-text.
pub struct Continuation {
    pub ids: Vec<u32>,
    /// Largest minus second largest logit of each step.
    pub margins: Vec<f32>,
}

/// The goldens of set `a` or `d`.
pub fn goldens(set: &str) -> Vec<Golden> {
    let file = root().join("tests/fixtures/goldens").join(set).join("goldens.safetensors");
    let bytes = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let file = SafeTensors::deserialize(&bytes).expect("goldens.safetensors");
    let words = |name: String| -> Option<Vec<[u8; 4]>> {
        let tensor = file.tensor(&name).ok()?;
        Some(tensor.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]).collect())
    };
    let ids = |name: String| -> Vec<u32> {
        words(name).expect("a golden tensor").into_iter().map(u32::from_le_bytes).collect()
    };
    let floats = |name: String| -> Option<Vec<f32>> {
        Some(words(name)?.into_iter().map(f32::from_le_bytes).collect())
    };
    let continuation = |prompt: &str, kind: &str| Continuation {
        ids: ids(format!("{prompt}.{kind}_ids")),
        margins: floats(format!("{prompt}.{kind}_margin")).expect("margins"),
    };
    let golden = |prompt: &str| Golden {
        name: format!("{set}/{prompt}"),
        ids: ids(format!("{prompt}.ids")),
        last_logits: floats(format!("{prompt}.last_logits")).expect("last_logits"),
        top_ids: ids(format!("{prompt}.top20_ids")),
        top_logits: floats(format!("{prompt}.top20_logits")).expect("top20_logits"),
        greedy: continuation(prompt, "greedy"),
        penalised: continuation(prompt, "greedy_rp"),
        hidden0: floats(format!("{prompt}.hidden0")),
    };
    PROMPTS.into_iter().map(golden).collect()
}

/// Logits [n, vocab] of `ids` in a new session.
pub fn logits(engine: &Engine, ids: &[u32], token_by_token: bool) -> Vec<f32> {
    let mut all = Vec::new();
    let mut session = engine.session(SessionOptions::default()).expect("session");
    let mut sink = |logits: &[f32]| {
        all.extend_from_slice(logits);
        Ok(())
    };
    session.logits(ids, token_by_token, &mut sink).expect("logits");
    assert_eq!(all.len(), ids.len() * engine.config().vocab_size);
    all
}

/// The largest difference between two rows. NaN counts as infinity.
pub fn worst(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let differences = got.iter().zip(want).map(|(g, w)| (g - w).abs());
    differences.fold(0.0, |worst, d| if d.is_nan() { f32::INFINITY } else { worst.max(d) })
}

/// Compares all that the goldens say of logits with `engine`'s, by prefill or token by token, and asserts
/// `tolerance`.
pub fn check_logits(engine: &Engine, set: &str, token_by_token: bool, tolerance: f32) {
    let how = if token_by_token { "token by token" } else { "prefill" };
    check_logits_of(set, how, tolerance, |ids| logits(engine, ids, token_by_token));
}

/// The same of the logits [n, vocab] that `logits` gives for n ids.
pub fn check_logits_of(set: &str, how: &str, tolerance: f32, logits: impl Fn(&[u32]) -> Vec<f32>) {
    let mut failed = Vec::new();
    for golden in goldens(set) {
        let all = logits(&golden.ids);
        let vocab = golden.last_logits.len();
        let last = worst(&all[all.len() - vocab..], &golden.last_logits);
        let tops = all.chunks_exact(vocab).zip(golden.top_ids.chunks_exact(20));
        let got: Vec<f32> = tops.flat_map(|(row, ids)| ids.iter().map(|&id| row[id as usize])).collect();
        let top = worst(&got, &golden.top_logits);
        println!(
            "{} {how}: last_logits differ by {last:.2e}, top20 of all positions by {top:.2e}",
            golden.name
        );
        if last > tolerance || top > tolerance {
            failed.push(golden.name);
        }
    }
    assert!(failed.is_empty(), "{how}: wanted differences of at most {tolerance:e}, not so for {failed:?}");
}

/// Compares greedy continuations. They may part only where the goldens' best two logits are nearer to each other
/// than two errors of `tolerance`; such steps are listed.
pub fn check_greedy(engine: &Engine, set: &str, tolerance: f32) {
    for golden in goldens(set) {
        for (penalty, want) in [(1.0, &golden.greedy), (1.15, &golden.penalised)] {
            let sampling = Sampling {
                repetition_penalty: penalty,
                max_new_tokens: want.ids.len(),
                ignore_eos: true,
                ..Sampling::default()
            };
            let got = generate(engine, &golden.ids, &sampling);
            assert_eq!(got.len(), want.ids.len());
            let parted = (0..got.len()).find(|&i| got[i] != want.ids[i]);
            for (step, &margin) in want.margins.iter().enumerate() {
                if margin <= 2.0 * tolerance && parted.is_none_or(|p| step <= p) {
                    let name = &golden.name;
                    println!("{name} penalty {penalty}: near-tie at step {step}, margin {margin:.1e}");
                }
            }
            if let Some(step) = parted {
                let (name, margin) = (&golden.name, want.margins[step]);
                println!(
                    "{name} penalty {penalty}: parted at step {step} of {}, margin {margin:.1e}",
                    got.len()
                );
                assert!(
                    margin <= 2.0 * tolerance,
                    "{name} penalty {penalty} step {step}: got {} wanted {}, margin {margin}",
                    got[step],
                    want.ids[step]
                );
            }
        }
    }
}

/// The ids of an answer in a new session.
pub fn generate(engine: &Engine, ids: &[u32], sampling: &Sampling) -> Vec<u32> {
    let mut session = engine.session(SessionOptions::default()).expect("session");
    let answer = session.generate_ids(ids, sampling).expect("generate");
    answer.map(|token| token.expect("token").id).collect()
}
