//! sample, start: the same tokens as `src/sampler.rs`, over many seeds, histories and settings.

use peregrine::gpu::DevBuf;
use peregrine::gpu::ops::{self, SamplerState};
use peregrine::sampler::{self, Sampling};

use crate::kit::*;

/// Log probabilities: f32 sums of 65024 terms against f64. Measured: 9.5e-7.
const LOGPROB_TOLERANCE: f32 = 3e-6;

fn settings() -> Vec<Sampling> {
    let greedy = Sampling::default();
    let sampled = Sampling { temperature: 0.8, top_k: 0, ..Sampling::default() };
    vec![
        greedy.clone(),
        Sampling { repetition_penalty: 1.3, ..greedy.clone() },
        Sampling { no_repeat_ngram_size: 2, ..greedy.clone() },
        Sampling { repetition_penalty: 1.15, no_repeat_ngram_size: 3, ..greedy },
        sampled.clone(),
        Sampling { top_k: 50, ..sampled.clone() },
        Sampling { top_k: 1, ..sampled.clone() },
        Sampling { top_p: 0.9, ..sampled.clone() },
        Sampling { top_p: 0.05, ..sampled.clone() },
        Sampling { min_p: 0.1, ..sampled.clone() },
        Sampling { temperature: 0.7, top_k: 50, top_p: 0.95, repetition_penalty: 1.15, ..sampled.clone() },
        Sampling { temperature: 3.0, top_p: 0.99, min_p: 0.001, no_repeat_ngram_size: 1, ..sampled },
    ]
}

#[test]
fn sample_matches_reference() {
    let Some((gpu, stream)) = gpu() else { return };
    for vocab in [16usize, 4096, 65024] {
        let mut state = SamplerState::new(&gpu, &stream, vocab, 4096).unwrap();
        let mut worst = 0f32;
        for (case, setting) in settings().into_iter().enumerate() {
            for trial in 0..6u64 {
                let mut random = Random::new(case as u64 * 1000 + trial);
                let sampling = Sampling { seed: random.bits(), ..setting.clone() };
                let length = [1, 2, 3, 50, 500, 2047][trial as usize];
                // Few distinct ids, so that n-grams do repeat.
                let mut history: Vec<u32> =
                    (0..length).map(|_| (random.bits() % 9) as u32 * (vocab as u32 / 16).max(1)).collect();
                ops::start(&stream, &mut state, &history, vocab).unwrap();
                // Several tokens in a row: the state, history and set of seen ids must advance too.
                for step in 1..=4 {
                    let logits = random.values(vocab, 2.5);
                    let want = sampler::sample(&logits, &history, &sampling).unwrap();
                    let logits = DevBuf::from_host(&stream, "logits", &logits).unwrap();
                    ops::sample(&stream, &mut state, &logits, vocab, &sampling).unwrap();
                    stream.synchronize().unwrap();
                    let got = state.tokens.read(step).unwrap();
                    assert_eq!(
                        got.id, want.id,
                        "vocab {vocab} case {case} {sampling:?} trial {trial} step {step}"
                    );
                    worst = worst.max((got.logprob - want.logprob).abs());
                    history.push(want.id);
                    let words = state.state.download(&stream, 4, 6).unwrap();
                    let length = history.len() as u32;
                    assert_eq!(words, [want.id, length - 1, 0, 0, step, length]);
                }
            }
        }
        eprintln!("MEASURED sample vocab {vocab}: worst log probability difference {worst:.2e}");
        assert!(worst <= LOGPROB_TOLERANCE, "log probability differs by {worst:.2e}");
    }
}

#[test]
fn sample_names_a_logit_that_is_no_number() {
    let Some((gpu, stream)) = gpu() else { return };
    let mut state = SamplerState::new(&gpu, &stream, 4096, 64).unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut logits = Random::new(1).values(4096, 1.0);
        logits[3000] = bad;
        logits[77] = bad;
        ops::start(&stream, &mut state, &[1, 2], 4096).unwrap();
        let logits = DevBuf::from_host(&stream, "logits", &logits).unwrap();
        ops::sample(&stream, &mut state, &logits, 4096, &Sampling::default()).unwrap();
        stream.synchronize().unwrap();
        let message = state.tokens.read(1).unwrap_err().to_string();
        assert!(message.contains("token 77 "), "{message}");
    }
}
