//! What the CPU does around the kernels: `cargo bench --bench cpu [NAME]`. Needs no GPU.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::Path;

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use peregrine::checkpoint::Checkpoint;
use peregrine::engine::{Device, Engine, LoadOptions};
use peregrine::repack::{self, InputOrder};
use peregrine::sampler::{self, Sampling};
use peregrine::synth::{SynthOptions, SynthShape, synth};
use peregrine::tokenizer::Tokenizer;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-falcon-tales");
const VOCAB: usize = 65024;

fn main() {
    divan::main();
}

fn tokenizer() -> Tokenizer {
    let file = Path::new(TINY).join("tokenizer.json");
    Tokenizer::from_json(&fs::read(&file).unwrap(), &file).unwrap()
}

/// Some pages of the kind of text the small model knows.
fn text() -> String {
    "Once upon a time there lived a king who had three daughters, and the youngest was called Rose.\n"
        .repeat(200)
}

#[divan::bench]
fn tokenizer_encodes(bencher: Bencher) {
    let (tokenizer, text) = (tokenizer(), text());
    bencher.counter(BytesCount::of_str(&text)).bench(|| tokenizer.encode(black_box(&text), false).unwrap());
}

#[divan::bench]
fn tokenizer_decodes(bencher: Bencher) {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode(&text(), false).unwrap();
    bencher.counter(ItemsCount::new(ids.len())).bench(|| tokenizer.decode(black_box(&ids), true));
}

#[divan::bench]
fn tokenizer_loads(bencher: Bencher) {
    let file = Path::new(TINY).join("tokenizer.json");
    let bytes = fs::read(&file).unwrap();
    bencher
        .counter(BytesCount::new(bytes.len()))
        .bench(|| Tokenizer::from_json(black_box(&bytes), &file).unwrap());
}

/// The plain loops that the kernel `gptq_repack` is tested against.
#[divan::bench]
fn repack_a_layer(bencher: Bencher) {
    let checkpoint = Checkpoint::open(TINY).unwrap();
    let layer = checkpoint.layer(0);
    let w = &layer.dense_h_to_4h;
    bencher.counter(BytesCount::new(w.qweight.len())).bench(|| {
        let order = InputOrder::of(black_box(w)).unwrap();
        repack::gptq_repack(w, &order, order.scales_per_row, false)
    });
}

/// Logits as a model's are: a bell of deviation 2.5.
fn logits() -> Vec<f32> {
    let mut state = 3u64;
    let mut unit = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..VOCAB).map(|_| (unit() + unit() + unit() + unit()) * 4.3).collect()
}

#[divan::bench(args = ["greedy", "card"])]
fn sampler_chooses(bencher: Bencher, how: &str) {
    let card = Sampling { top_k: 50, top_p: 0.95, repetition_penalty: 1.15, ..Sampling::greedy() };
    let sampling = if how == "card" { card.temperature(0.7) } else { Sampling::greedy() };
    let (logits, history) = (logits(), (0..1000).map(|i| i % 7).collect::<Vec<u32>>());
    bencher.bench(|| sampler::sample(black_box(&logits), &history, &sampling).unwrap());
}

#[divan::bench]
fn checkpoint_opens(bencher: Bencher) {
    bencher.bench(|| Checkpoint::open(black_box(TINY)).unwrap());
}

#[divan::bench]
fn engine_loads(bencher: Bencher) {
    let options = LoadOptions { device: Device::Cpu, ..LoadOptions::default() };
    bencher.bench(|| Engine::load(black_box(TINY), &options).unwrap());
}

#[divan::bench]
fn synth_writes(bencher: Bencher) {
    let folder = std::env::temp_dir().join(format!("peregrine-bench-{}", std::process::id()));
    bencher.counter(BytesCount::new(1_500_000usize)).bench(|| {
        let _ = fs::remove_dir_all(&folder);
        synth(SynthShape::TINY, &folder, &SynthOptions::default(), None).unwrap()
    });
    let _ = fs::remove_dir_all(&folder);
}
