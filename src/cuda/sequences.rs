//! Sequences that are decoded together: their caches, what a pass works in, the sampler, and the decode step. A timeline is one of
//! them, a batch several.
//!
//! ```text
//! prompt -> pass (one kernel an op) -> logits row of its slot -> start -> sample -+-> step -> sample -+-> step -> ...
//!                                                                                 +-> token           +-> tokens, in host memory
//! ```
//!
//! A decode step is the persistent kernel `decode_step`, or one kernel an op where that does not fit (see `persistent`); with the
//! sampler it is one graph (of more than 8 texts one for short contexts, and one for any), and the GPU can be steps ahead of the host: the
//! sampler leaves the step's tokens on the device.

use std::sync::Arc;

use super::{CudaModel, persistent};
use crate::error::{Error, Result};
use crate::forward::{Pass, Tokens};
use crate::gpu::context::Event;
use crate::gpu::ops::{
    self, ATTN_SHORT, DecodeScratch, GEMV_TOKENS, HEAD_TOKENS, SamplerShape, SamplerState,
};
use crate::gpu::{Arrival, StepFault, StepGraph, Stream};
use crate::kv_cache::KvCache;
use crate::sampler::Sampling;
use crate::scratch::Scratch;

/// Most tokens of one prefill call; longer prompts go in several.
const PREFILL_TOKENS: usize = 2048;
/// Steps the GPU may be ahead of the host.
pub(super) const AHEAD: usize = 2;

/// How the tokens of a generation are chosen, and the steps captured for that.
struct Plan {
    sampling: Sampling,
    stop_ids: Vec<u32>,
    /// The step of many texts that are short, see [`ATTN_SHORT`], and the one of any.
    graphs: [Option<StepGraph>; 2],
}

pub(super) struct Sequences {
    model: Arc<CudaModel>,
    slots: usize,
    cache: KvCache,
    scratch: Scratch,
    /// `Some`: decode steps are persistent.
    decode: Option<DecodeScratch>,
    sampler: SamplerState,
    plan: Option<Plan>,
    /// No less than where each slot's next token comes: a queued step counts, whether or not the slot has ended.
    ends: Vec<usize>,
}

impl Drop for Sequences {
    fn drop(&mut self) {
        // Weights and pinned memory must outlive what is queued. A failure was or will be reported by the call that caused it.
        let _ = self.model.stream().synchronize();
    }
}

impl Sequences {
    /// `slots` empty sequences of up to `max_context` tokens. A single slot may speculate if its steps are persistent.
    ///
    /// # Errors
    /// [`Error::OutOfGpuMemory`]; [`Error::Usage`] if the model has fewer positions, or there are too many slots.
    pub(super) fn new(model: Arc<CudaModel>, slots: usize, max_context: usize) -> Result<Sequences> {
        let (config, stream) = (model.config(), model.stream());
        if max_context == 0 || max_context > config.max_positions {
            return Err(Error::Usage(format!(
                "context size {max_context}: wanted 1 to {}",
                config.max_positions
            )));
        }
        if slots == 0 || slots > HEAD_TOKENS {
            return Err(Error::Usage(format!("{slots} sequences at once: wanted 1 to {HEAD_TOKENS}")));
        }
        let cache = KvCache::new(stream, config.num_layers, slots, max_context)?;
        let tokens = max_context.min(PREFILL_TOKENS).max(slots);
        let scratch = Scratch::new(stream, config, max_context, tokens, slots, model.weights().act_order())?;
        let decode = match model.persistent_blocks() {
            Some(blocks) if slots <= GEMV_TOKENS => {
                let shape = persistent::shape(config, model.weights(), blocks, slots, max_context);
                Some(DecodeScratch::new(model.gpu(), stream, shape)?)
            }
            _ => None,
        };
        if slots > GEMV_TOKENS {
            model.weights().lay_near(model.gpu(), stream)?;
        }
        let rows = if slots == 1 && decode.is_some() { GEMV_TOKENS } else { slots };
        let shape = SamplerShape { slots, rows, vocab: config.vocab_size, max_context };
        let sampler = SamplerState::new(model.gpu(), stream, shape)?;
        Ok(Sequences { slots, cache, scratch, decode, sampler, plan: None, ends: vec![0; slots], model })
    }

    /// Positions of each.
    pub(super) fn max_context(&self) -> usize {
        self.cache.max_context
    }

    /// Most tokens [`Sequences::append`] takes.
    pub(super) fn room(&self) -> usize {
        self.scratch.tokens
    }

    /// A pass over tokens whose positions are less than `reach`.
    fn pass(&mut self, reach: usize) -> Pass<'_> {
        Pass {
            reach,
            stream: self.model.stream(),
            config: self.model.config(),
            weights: self.model.weights(),
            cache: &mut self.cache,
            scratch: &mut self.scratch,
            decode: self.decode.as_mut(),
            step: &self.sampler.step,
        }
    }

    fn check(&self, ids: &[u32], position: usize) -> Result<()> {
        let room = self.cache.max_context - position.min(self.cache.max_context);
        if ids.len() > room {
            return Err(Error::Usage(format!(
                "{} tokens do not fit the {room} positions left of the context",
                ids.len()
            )));
        }
        let vocab = self.model.config().vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab) {
            Some(id) => Err(Error::Usage(format!("token id {id}: the vocabulary has {vocab}"))),
            None => Ok(()),
        }
    }

    /// Runs `ids` through the layers, as the tokens of `slot` from `position` on.
    pub(super) fn append(&mut self, slot: usize, position: usize, ids: &[u32]) -> Result<()> {
        self.check(ids, position)?;
        let words = ops::step_token_words(ids, position, slot)?;
        self.scratch.step_tokens.upload(self.model.stream(), 0, &words)?;
        self.pass(position + ids.len()).run(Tokens::Prompt(ids.len()))
    }

    /// Appends `ids` in as few passes as there is room for; the logits of the last one become row `slot`, which the slot's first
    /// token is chosen from.
    pub(super) fn prefill(&mut self, slot: usize, position: usize, ids: &[u32]) -> Result<()> {
        self.check(ids, position)?;
        let mut at = position;
        for chunk in ids.chunks(self.room()) {
            self.append(slot, at, chunk)?;
            at += chunk.len();
            if at == position + ids.len() {
                self.head(chunk.len() - 1, 1, slot)?;
            }
        }
        Ok(())
    }

    /// Logits of tokens `first .. first + count` (at most [`HEAD_TOKENS`]) of the last append, into rows `row ..`.
    pub(super) fn head(&mut self, first: usize, count: usize, row: usize) -> Result<()> {
        self.pass(0).head(first, count, row)
    }

    /// Rows of the logits, `[count, vocab]`, after everything queued.
    pub(super) fn logits(&self, row: usize, count: usize) -> Result<Vec<f32>> {
        let vocab = self.model.config().vocab_size;
        self.scratch
            .logits
            .download(self.model.stream(), row * vocab, count * vocab)
            .map_err(|e| self.explained(e))
    }

    /// One decode step whose tokens are given: `tokens[slot]` is an id and its position. Row `slot` of the logits is what follows.
    pub(super) fn decode(&mut self, tokens: &[(u32, usize)]) -> Result<()> {
        if tokens.len() != self.slots {
            return Err(Error::Usage(format!("{} tokens for {} sequences", tokens.len(), self.slots)));
        }
        let mut words = vec![0; ops::STEP_FIRST];
        for (slot, &(id, position)) in tokens.iter().enumerate() {
            self.check(&[id], position)?;
            words.extend(ops::step_token_words(&[id], position, slot)?);
        }
        words[0] = tokens.len() as u32;
        for (token, first) in words[ops::STEP_FIRST..].chunks_exact_mut(ops::STEP_TOKEN_WORDS).zip(0..) {
            token[3] = first;
        }
        self.sampler.step.upload(self.model.stream(), 0, &words)?;
        let (rows, last) = (self.slots, tokens.iter().map(|&(_, position)| position).max());
        self.pass(last.unwrap_or(0) + 1).step(rows)
    }

    /// Sets how tokens are chosen. Steps captured for something else are forgotten.
    pub(super) fn plan(&mut self, sampling: &Sampling, stop_ids: &[u32]) -> Result<()> {
        let speculate = sampling.speculate && self.slots == 1 && self.decode.is_some();
        let sampling = Sampling { speculate, ..sampling.clone() };
        if self.plan.as_ref().is_some_and(|plan| plan.sampling == sampling && plan.stop_ids == stop_ids) {
            return Ok(());
        }
        // A graph that is still running is freed when it is done.
        self.plan = Some(Plan { sampling, stop_ids: stop_ids.to_vec(), graphs: [None, None] });
        Ok(())
    }

    /// A step: the tokens chosen last are appended, and the next ones chosen. As a graph, unless that is switched off: the first one is
    /// captured, while the GPU is busy with the prompt or with steps in front.
    fn step(&mut self, plan: &mut Plan) -> Result<()> {
        let longest = self.ends.iter().copied().max().unwrap_or(0);
        self.ends.iter_mut().for_each(|end| *end += 1);
        let short = self.slots > GEMV_TOKENS && longest < ATTN_SHORT;
        let reach = if short { ATTN_SHORT.min(self.cache.max_context) } else { self.cache.max_context };
        let model = Arc::clone(&self.model);
        let Plan { sampling, stop_ids, graphs: [of_short, of_any] } = plan;
        let switches = crate::trace::switches();
        if switches.no_graph || switches.sync {
            return self.step_on(model.stream(), reach, sampling, stop_ids);
        }
        let graph = if short { of_short } else { of_any };
        match graph {
            Some(graph) => graph.launch(),
            None => {
                let step = |stream: &Stream| self.step_on(stream, reach, sampling, stop_ids);
                graph.insert(StepGraph::capture(model.stream(), step)?).launch()
            }
        }
    }

    fn step_on(
        &mut self,
        stream: &Stream,
        reach: usize,
        sampling: &Sampling,
        stop_ids: &[u32],
    ) -> Result<()> {
        let rows = self.slots;
        Pass { stream, ..self.pass(reach) }.step(rows)?;
        ops::sample(stream, &mut self.sampler, &self.scratch.logits, sampling, stop_ids)
    }

    /// Makes `history` a slot's history, and row `slot` of the logits what its first token is chosen from.
    pub(super) fn start(&mut self, slot: usize, history: &[u32]) -> Result<()> {
        self.ends[slot] = history.len();
        ops::start(self.model.stream(), &mut self.sampler, slot, history)
    }

    /// A slot of `position` tokens gives none until it is started again. Steps of the others write behind them.
    pub(super) fn stop(&mut self, slot: usize, position: usize) -> Result<()> {
        self.ends[slot] = position;
        ops::stop(self.model.stream(), &mut self.sampler, slot, position)
    }

    /// Queues the choice of the first tokens (`appends` false), or a step: the tokens chosen last are appended, and the next ones
    /// chosen. The event is behind it.
    pub(super) fn queue(&mut self, appends: bool) -> Result<Event> {
        let model = Arc::clone(&self.model);
        let stream = model.stream();
        let Some(mut plan) = self.plan.take() else {
            return Err(Error::Usage("no generation was begun".into()));
        };
        let queued = if appends {
            self.step(&mut plan)
        } else {
            ops::sample(stream, &mut self.sampler, &self.scratch.logits, &plan.sampling, &plan.stop_ids)
        };
        self.plan = Some(plan);
        queued?;
        stream.record(false)
    }

    /// Waits for a queued step.
    pub(super) fn wait(&self, event: &Event) -> Result<()> {
        event.wait().map_err(|e| self.explained(e))
    }

    /// The tokens a slot was given by the step that was waited for, of which token `first` (from 1) of its generation is the first.
    pub(super) fn arrived(&self, slot: usize, first: usize) -> Result<Vec<Arrival>> {
        self.sampler.tokens.arrived(slot, first).collect()
    }

    /// An error with what the persistent kernel said of itself.
    fn explained(&self, error: Error) -> Error {
        match self.decode.as_ref().and_then(DecodeScratch::fault) {
            Some(fault) => fault_error(fault),
            None => error,
        }
    }
}

/// Most tokens of a generation after `start` tokens: the last one need not fit into the context.
pub(super) fn most_tokens(sampling: &Sampling, start: usize, max_context: usize) -> usize {
    sampling.max_new_tokens.max(1).min(max_context - start + 1)
}

fn fault_error(StepFault { fault, layer, block }: StepFault) -> Error {
    let awaited = match fault {
        1 => "the residual stream",
        2 => "activations",
        _ => "queries, keys and values",
    };
    Error::Cuda {
        op: "decode_step".into(),
        what: format!(
            "block {block} waited too long for {awaited} of layer {layer}; the GPU is unusable for this process now, restart it"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_names_block_and_layer() {
        let text = fault_error(StepFault { fault: 2, layer: 5, block: 17 }).to_string();
        let wanted = "decode_step: block 17 waited too long for activations of layer 5; \
                      the GPU is unusable for this process now, restart it";
        assert_eq!(text, wanted);
    }
}
