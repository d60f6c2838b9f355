//! `start`, `sample`, and what they keep on the GPU.

use super::super::Gpu;
use super::super::buffer::{DevBuf, MappedTokens};
use super::super::context::Stream;
use super::super::ffi;
use super::step::{STEP_FIRST, STEP_TOKEN_WORDS, STEP_WORDS};
use super::{call, check, launch_on, u32_of};
use crate::error::{Error, Result};
use crate::sampler::Sampling;

/// Words of a slot's `DecodeState`: position, step, length, done, wait and backoff of drafts.
const STATE_WORDS: usize = 6;
/// Which of them is `done`.
const STATE_DONE: usize = 3;
/// Floats of the surveys of one row.
const ROW_SURVEY_FLOATS: usize =
    (ffi::PEREGRINE_SAMPLE_BLOCKS * ffi::PEREGRINE_SAMPLE_WARPS * ffi::PEREGRINE_SURVEY_FLOATS) as usize;
/// Tokens of a slot that may wait for the host: several steps of drafts.
const TOKEN_CAPACITY: usize = 128;

/// What a sampler is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplerShape {
    /// Sequences.
    pub slots: usize,
    /// Most tokens of a step: `slots`, or for a single slot 1 and its drafts.
    pub rows: usize,
    /// Logits a row.
    pub vocab: usize,
    /// Positions of a slot's cache.
    pub max_context: usize,
}

/// What the sampler keeps on the GPU from step to step.
pub struct SamplerState {
    shape: SamplerShape,
    /// `[slots]` `DecodeState`.
    state: DevBuf<u32>,
    /// `[slots, max_context + 1]`: every token so far.
    history: DevBuf<u32>,
    /// `[slots, ceil(vocab / 32)]`: one bit an id, it is in the history.
    seen: DevBuf<u32>,
    /// `[rows, vocab]`: processed logits.
    scratch: DevBuf<f32>,
    surveys: DevBuf<f32>,
    /// `[rows + slots]`
    arrivals: DevBuf<u32>,
    /// A `Step`, the tokens of the next decode step: their number is word 0, token m begins at word 4 + 4 m.
    pub step: DevBuf<u32>,
    /// Where tokens arrive on the host.
    pub tokens: MappedTokens,
}

impl SamplerState {
    /// Slots that are done until [`start`] is called for them.
    pub fn new(gpu: &Gpu, stream: &Stream, shape: SamplerShape) -> Result<SamplerState> {
        let SamplerShape { slots, rows, vocab, max_context } = shape;
        let mut state = vec![0; slots * STATE_WORDS];
        state.chunks_exact_mut(STATE_WORDS).for_each(|slot| slot[STATE_DONE] = 1);
        let mut step = vec![0; STEP_WORDS];
        if slots > 1 {
            step[0] = u32_of("sampler", slots)?;
        }
        // A slot that nobody uses works on its own part of the cache.
        for (slot, token) in (0u32..).zip(step[STEP_FIRST..].chunks_exact_mut(STEP_TOKEN_WORDS)) {
            token[2] = if (slot as usize) < slots { slot } else { 0 };
            token[3] = slot;
        }
        Ok(SamplerState {
            shape,
            state: DevBuf::from_host(stream, "decode state", &state)?,
            history: DevBuf::zeros(stream, "history", slots * (max_context + 1))?,
            seen: DevBuf::zeros(stream, "seen tokens", slots * vocab.div_ceil(32))?,
            scratch: DevBuf::zeros(stream, "sampler scratch", rows * vocab)?,
            surveys: DevBuf::zeros(stream, "surveys of logits", rows * ROW_SURVEY_FLOATS)?,
            arrivals: DevBuf::zeros(stream, "sampler arrivals", rows + slots)?,
            step: DevBuf::from_host(stream, "step", &step)?,
            tokens: MappedTokens::new(gpu, slots, TOKEN_CAPACITY)?,
        })
    }

    /// What it was made for.
    #[must_use]
    pub fn shape(&self) -> SamplerShape {
        self.shape
    }

    /// Bytes of device memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let floats = self.scratch.bytes() + self.surveys.bytes();
        let words = [&self.state, &self.history, &self.seen, &self.arrivals, &self.step];
        floats + words.iter().map(|buffer| buffer.bytes()).sum::<u64>()
    }

    /// A slot's decode state, after everything queued: position, step, length of the history, done, and of drafts how many steps
    /// to wait and how many after the next failure.
    pub fn state(&self, stream: &Stream, slot: usize) -> Result<Vec<u32>> {
        self.state.download(stream, slot * STATE_WORDS, STATE_WORDS)
    }

    fn require(&self, op: &str) -> Result<()> {
        let SamplerShape { slots, rows, vocab, max_context } = self.shape;
        self.state.require(op, slots * STATE_WORDS)?;
        self.history.require(op, slots * (max_context + 1))?;
        self.seen.require(op, slots * vocab.div_ceil(32))?;
        self.scratch.require(op, rows * vocab)?;
        self.surveys.require(op, rows * ROW_SURVEY_FLOATS)?;
        self.arrivals.require(op, rows + slots)?;
        self.step.require(op, STEP_WORDS)
    }
}

/// Ends a slot's generation, if there is one: until [`start`] it gives no tokens. Its token of the step becomes id 0 at `position`, the
/// first that is free: a step computes it with the others', and must not write over what the slot's cache holds.
pub fn stop(stream: &Stream, sampler: &mut SamplerState, slot: usize, position: usize) -> Result<()> {
    let op = "stop";
    let SamplerShape { slots, max_context, .. } = sampler.shape;
    if slot >= slots || position >= max_context {
        return Err(Error::Cuda {
            op: op.into(),
            what: format!("position {position} of {max_context} in slot {slot} of {slots}"),
        });
    }
    sampler.state.upload(stream, slot * STATE_WORDS + STATE_DONE, &[1])?;
    let slot_word = u32_of(op, slot)?;
    let token = [0, u32_of(op, position)?, slot_word, slot_word];
    sampler.step.upload(stream, STEP_FIRST + slot * STEP_TOKEN_WORDS, &token)
}

/// `start`: makes `history` a slot's history, for a generation whose first token follows what was prefilled. The first [`sample`] reads
/// row `slot` of the logits.
#[allow(unsafe_code)]
pub fn start(stream: &Stream, sampler: &mut SamplerState, slot: usize, history: &[u32]) -> Result<()> {
    let op = "start";
    let SamplerShape { slots, vocab, max_context, .. } = sampler.shape;
    if slot >= slots || history.is_empty() || history.len() > max_context {
        return Err(Error::Cuda {
            op: op.into(),
            what: format!(
                "{} tokens in slot {slot}: wanted 1 to {max_context} in one of {slots} slots",
                history.len()
            ),
        });
    }
    sampler.require(op)?;
    let (first, seen_words) = (slot * (max_context + 1), vocab.div_ceil(32));
    sampler.history.upload(stream, first, history)?;
    let length = u32_of(op, history.len())?;
    let params = ffi::StartParams {
        history: sampler.history.ptr(stream).wrapping_add(first),
        seen: sampler.seen.ptr_mut(stream).wrapping_add(slot * seen_words),
        state: sampler.state.ptr_mut(stream).wrapping_add(slot * STATE_WORDS).cast(),
        step: sampler.step.ptr_mut(stream).cast(),
        out: sampler.tokens.slot_mut(slot)?.cast(),
        length,
        // As after a step of the last token: `sample` moves on by the tokens it gives.
        position: length - 1,
        vocab: u32_of(op, vocab)?,
        slot: u32_of(op, slot)?,
        slots: u32_of(op, slots)?,
        out_capacity: u32_of(op, sampler.tokens.capacity())?,
    };
    call!(start, stream, params)
}

/// `sample`: chooses tokens from `logits [rows, vocab]`, those of the step's tokens, tells the host, and sets up the next step. `stop_ids`
/// end a generation on the device; beyond the sixteenth only the caller knows them, and the device works on in vain.
#[allow(unsafe_code)]
pub fn sample(
    stream: &Stream,
    sampler: &mut SamplerState,
    logits: &DevBuf<f32>,
    sampling: &Sampling,
    stop_ids: &[u32],
) -> Result<()> {
    let op = "sample";
    let SamplerShape { slots, vocab, max_context, .. } = sampler.shape;
    sampler.require(op)?;
    // A slot of its own that drafts nothing has one row.
    let rows = if slots == 1 && !sampling.speculate { 1 } else { sampler.shape.rows };
    logits.require(op, rows * vocab)?;
    let mut stops = [0; ffi::PEREGRINE_STOP_IDS as usize];
    let stop_count = stop_ids.len().min(stops.len());
    stops[..stop_count].copy_from_slice(&stop_ids[..stop_count]);
    let saturated = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let params = ffi::SampleParams {
        logits: logits.ptr(stream),
        scratch: sampler.scratch.ptr_mut(stream),
        surveys: sampler.surveys.ptr_mut(stream),
        arrivals: sampler.arrivals.ptr_mut(stream),
        history: sampler.history.ptr_mut(stream),
        seen: sampler.seen.ptr_mut(stream),
        state: sampler.state.ptr_mut(stream).cast(),
        step: sampler.step.ptr_mut(stream).cast(),
        out: sampler.tokens.slot_mut(0)?.cast(),
        rows: u32_of(op, rows)?,
        slots: u32_of(op, slots)?,
        vocab: u32_of(op, vocab)?,
        history_capacity: u32_of(op, max_context + 1)?,
        out_capacity: u32_of(op, sampler.tokens.capacity())?,
        max_context: u32_of(op, max_context)?,
        max_new_tokens: saturated(sampling.max_new_tokens),
        stop_ids: stops,
        stop_count: u32_of(op, stop_count)?,
        drafts: if sampling.speculate && slots == 1 { u32_of(op, rows - 1)? } else { 0 },
        top_k: saturated(sampling.top_k),
        no_repeat_ngram_size: saturated(sampling.no_repeat_ngram_size),
        seed_low: sampling.seed as u32,
        seed_high: (sampling.seed >> 32) as u32,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
    };
    call!(sample, stream, params)
}
