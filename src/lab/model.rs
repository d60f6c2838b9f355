//! The whole model with a kernel of somebody's own in it: what it does to the logits and to the speed.

use std::sync::Arc;
use std::time::Instant;

use crate::checkpoint::Checkpoint;
use crate::cuda::{CudaModel, CudaTimeline};
use crate::error::Result;
use crate::gpu::swap::Swap;
use crate::sampler::Sampling;

/// Tokens of the prompt whose logits are compared.
const PROMPT: usize = 128;
/// Tokens that go through decode steps.
const STEPS: usize = 16;
/// Tokens of a timed answer.
const ANSWER: usize = 96;
/// Times each is timed, in turns.
const ROUNDS: usize = 6;

/// What the other kernel changes. Decode steps are one kernel an op: the persistent kernel holds none that could be swapped.
#[derive(Debug, Clone, PartialEq)]
pub struct InModel {
    /// Largest difference of a logit.
    pub worst_logit: f32,
    /// Mean KL divergence of the built-in's next-token distributions from the other's.
    pub mean_kl: f64,
    /// Positions whose most likely token is the same, of all.
    pub same_top: (usize, usize),
    /// Seconds a token in decoding: built-in and other, in pairs.
    pub decode: [Vec<f64>; 2],
    /// Seconds of the prompt: built-in and other, in pairs.
    pub prompt: [Vec<f64>; 2],
}

/// Runs a model with the built-in kernel and with the other.
///
/// # Errors
/// As [`CudaModel::load`]; a driver failure.
pub fn in_model(checkpoint: &Checkpoint, ordinal: usize, swap: &Swap) -> Result<InModel> {
    let model = Arc::new(CudaModel::load(checkpoint, ordinal, None)?.without_persistent());
    let vocab = checkpoint.config().vocab_size as u64;
    let id = |i: u64| ((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % vocab;
    let ids: Vec<u32> = (0..PROMPT as u64).map(|i| id(i) as u32).collect();
    swap.out();
    let plain = logits(&model, &ids)?;
    swap.in_place();
    let other = logits(&model, &ids)?;
    let mut found = InModel {
        worst_logit: 0.0,
        mean_kl: 0.0,
        same_top: (0, plain.len()),
        decode: Default::default(),
        prompt: Default::default(),
    };
    for (a, b) in plain.iter().zip(&other) {
        let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let missing = b.iter().any(|v| !v.is_finite());
        found.worst_logit = if missing { f32::INFINITY } else { found.worst_logit.max(worst) };
        found.mean_kl += divergence(a, b) / plain.len() as f64;
        found.same_top.0 += usize::from(crate::reference::argmax(a) == crate::reference::argmax(b));
    }
    for round in 0..=ROUNDS {
        for turn in 0..2 {
            let which = (round + turn) % 2;
            if which == 1 {
                swap.in_place()
            } else {
                swap.out()
            }
            let (prompt, decode) = timed(&model, &ids)?;
            if round > 0 {
                found.prompt[which].push(prompt);
                found.decode[which].push(decode);
            }
        }
    }
    swap.out();
    Ok(found)
}

/// Logits of a prompt, by one pass, and of some tokens behind it, step by step.
fn logits(model: &Arc<CudaModel>, ids: &[u32]) -> Result<Vec<Vec<f32>>> {
    let mut timeline = CudaTimeline::new(Arc::clone(model), ids.len() + STEPS)?;
    let mut all = Vec::new();
    let mut keep = |row: &[f32]| {
        all.push(row.to_vec());
        Ok(())
    };
    timeline.logits(ids, false, &mut keep)?;
    timeline.logits(&ids[..STEPS], true, &mut keep)?;
    Ok(all)
}

/// Seconds of a prompt to its first token, and of a token after that. A timeline of its own: its graph holds the kernels of now.
fn timed(model: &Arc<CudaModel>, ids: &[u32]) -> Result<(f64, f64)> {
    let mut timeline = CudaTimeline::new(Arc::clone(model), ids.len() + ANSWER + 1)?;
    let sampling = Sampling::greedy().ignore_eos(true).max_new_tokens(ANSWER + 1);
    let start = Instant::now();
    timeline.prefill(ids)?;
    timeline.begin(&sampling, &[], ids)?;
    timeline.next_token()?;
    let first = Instant::now();
    for _ in 0..ANSWER {
        timeline.next_token()?;
    }
    Ok(((first - start).as_secs_f64(), first.elapsed().as_secs_f64() / ANSWER as f64))
}

/// KL divergence of the distribution of logits `b` from that of `a`.
fn divergence(a: &[f32], b: &[f32]) -> f64 {
    let normaliser = |x: &[f32]| {
        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(most) + x.iter().map(|&v| f64::from(v - most).exp()).sum::<f64>().ln()
    };
    let (za, zb) = (normaliser(a), normaliser(b));
    let term = |(&a, &b): (&f32, &f32)| {
        let (a, b) = (f64::from(a) - za, f64::from(b) - zb);
        a.exp() * (a - b)
    };
    a.iter().zip(b).map(term).sum()
}
