//! `start`, `sample`, and what they keep on the GPU.

use super::super::Gpu;
use super::super::buffer::{DevBuf, MappedTokens};
use super::super::context::Stream;
use super::super::ffi;
use super::STATE_WORDS;
use super::{call, check, launch_on, u32_of};
use crate::error::Result;
use crate::sampler::Sampling;

/// What the sampler keeps on the GPU from step to step.
pub struct SamplerState {
    /// Position, token, step, length of the history.
    pub state: DevBuf<u32>,
    /// Every token so far.
    history: DevBuf<u32>,
    /// One bit an id: it is in the history.
    seen: DevBuf<u32>,
    /// Processed logits.
    scratch: DevBuf<f32>,
    /// Where tokens arrive on the host.
    pub tokens: MappedTokens,
}

impl SamplerState {
    /// For a history of up to `history_capacity` tokens.
    pub fn new(gpu: &Gpu, stream: &Stream, vocab: usize, history_capacity: usize) -> Result<SamplerState> {
        Ok(SamplerState {
            state: DevBuf::zeros(stream, "decode state", STATE_WORDS)?,
            history: DevBuf::zeros(stream, "history", history_capacity)?,
            seen: DevBuf::zeros(stream, "seen tokens", vocab.div_ceil(32))?,
            scratch: DevBuf::zeros(stream, "sampler scratch", vocab)?,
            tokens: MappedTokens::new(gpu, 64)?,
        })
    }
}

/// `start`: makes `history` the sampler's history, for a generation whose first token follows what was prefilled.
#[allow(unsafe_code)]
pub fn start(stream: &Stream, sampler: &mut SamplerState, history: &[u32], vocab: usize) -> Result<()> {
    let op = "start";
    sampler.history.upload(stream, 0, history)?;
    sampler.seen.require(op, vocab.div_ceil(32))?;
    sampler.state.require(op, STATE_WORDS)?;
    let length = u32_of(op, history.len())?;
    let params = ffi::StartParams {
        history: sampler.history.ptr(stream),
        seen: sampler.seen.ptr_mut(stream),
        state: sampler.state.ptr_mut(stream).cast(),
        length,
        // `sample` counts up: after the first token the position is that of the token, the length of the history.
        position: length.wrapping_sub(1),
        vocab: u32_of(op, vocab)?,
    };
    call!(start, stream, params)
}

/// `sample`: chooses a token from row 0 of `logits [vocab]` and advances the state.
#[allow(unsafe_code)]
pub fn sample(
    stream: &Stream,
    sampler: &mut SamplerState,
    logits: &DevBuf<f32>,
    vocab: usize,
    sampling: &Sampling,
) -> Result<()> {
    let op = "sample";
    logits.require(op, vocab)?;
    sampler.scratch.require(op, vocab)?;
    sampler.seen.require(op, vocab.div_ceil(32))?;
    sampler.state.require(op, STATE_WORDS)?;
    let params = ffi::SampleParams {
        logits: logits.ptr(stream),
        scratch: sampler.scratch.ptr_mut(stream),
        history_capacity: u32_of(op, sampler.history.len())?,
        history: sampler.history.ptr_mut(stream),
        seen: sampler.seen.ptr_mut(stream),
        state: sampler.state.ptr_mut(stream).cast(),
        out_capacity: u32_of(op, sampler.tokens.capacity())?,
        out: sampler.tokens.ptr_mut()?.cast(),
        vocab: u32_of(op, vocab)?,
        top_k: u32::try_from(sampling.top_k).unwrap_or(u32::MAX),
        no_repeat_ngram_size: u32::try_from(sampling.no_repeat_ngram_size).unwrap_or(u32::MAX),
        seed_low: sampling.seed as u32,
        seed_high: (sampling.seed >> 32) as u32,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
    };
    call!(sample, stream, params)
}
