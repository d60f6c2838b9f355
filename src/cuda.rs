//! The `cuda` device: a model on a GPU and its timelines. Same methods as [`crate::cpu`], which is its truth.
//!
//! A timeline owns a stream, a cache and a scratch. While tokens are generated the GPU is one step ahead of the host: the
//! sampler leaves the token on the device, where the next step finds it, and writes it to pinned memory, where the host does.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::forward::{Pass, Tokens};
use crate::gpu::context::Event;
use crate::gpu::ops::{self, BATCH_TOKENS, SamplerShape, SamplerState};
use crate::gpu::{Gpu, StepGraph, Stream};
use crate::kv_cache::KvCache;
use crate::sampler::{Sampled, Sampling};
use crate::scratch::Scratch;
use crate::speculate::Tally;
use crate::weights::Weights;

/// Most tokens of one prefill call; longer prompts go in several.
const PREFILL_TOKENS: usize = 2048;
/// Prompts that take `gptq_gemm`, each size of `gptq_batch`, and `gptq_gemv`.
const WARM_UP_TOKENS: [usize; 5] = [65, 33, 17, 9, 1];
/// Steps the GPU may be ahead of the host.
const AHEAD: usize = 2;

/// A model whose weights are on a GPU.
pub struct CudaModel {
    gpu: Gpu,
    ordinal: usize,
    config: ModelConfig,
    weights: Weights,
    gemv_works: bool,
}

impl CudaModel {
    /// Opens GPU `ordinal`, uploads and repacks the weights.
    ///
    /// # Errors
    /// [`Error::NoGpu`], [`Error::OutOfGpuMemory`], or a driver failure.
    pub fn load(
        checkpoint: &Checkpoint,
        ordinal: usize,
        progress: Option<fn(u64, u64)>,
    ) -> Result<CudaModel> {
        let gpu = Gpu::open(ordinal)?;
        let stream = gpu.stream()?;
        let gemv_works = ops::unpack_check(&stream)? == 0;
        let weights = Weights::load(&gpu, &stream, checkpoint, progress)?;
        Ok(CudaModel { gpu, ordinal, config: checkpoint.config().clone(), weights, gemv_works })
    }

    /// For example `NVIDIA H200 (cuda:0)`.
    #[must_use]
    pub fn device_name(&self) -> String {
        format!("{} (cuda:{})", self.gpu.name(), self.ordinal)
    }

    /// Bytes of the resident weights.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// Bytes of GPU memory in use, by anybody.
    pub fn gpu_used_bytes(&self) -> Result<u64> {
        let (free, total) = self.gpu.memory()?;
        Ok(total - free)
    }

    fn act_order(&self) -> bool {
        self.weights
            .layers
            .iter()
            .any(|l| l.qkv_source.is_some() || l.up_source.is_some() || l.down_dense_source.is_some())
    }
}

/// A generation under way.
struct Running {
    sampling: Sampling,
    stop_ids: Vec<u32>,
    tally: Tally,
    /// Tokens before the generation.
    start: usize,
    /// Tokens handed to the caller.
    returned: usize,
    /// Steps queued but not handed out: an event behind each.
    queued: VecDeque<Event>,
}

/// One sequence: its cache, its position, and the logits of its last token.
pub struct CudaTimeline {
    model: Arc<CudaModel>,
    stream: Stream,
    cache: KvCache,
    scratch: Scratch,
    sampler: SamplerState,
    step: Option<StepGraph>,
    position: usize,
    /// `scratch.logits` row 0 belongs to the last token.
    logits_held: bool,
    running: Option<Running>,
}

impl Drop for CudaTimeline {
    fn drop(&mut self) {
        // Weights and buffers must outlive what is queued. A failure was or will be reported by the call that caused it.
        let _ = self.stream.synchronize();
    }
}

impl CudaTimeline {
    /// Runs every kernel of a model once. The driver loads a kernel at its first launch, some 4 ms for all of them, which would
    /// else be part of the first prompt's time. About 30 ms for Falcon-7B.
    ///
    /// # Errors
    /// As [`CudaTimeline::new`], [`CudaTimeline::prefill`] and [`CudaTimeline::next_token`].
    pub fn warm_up(model: &Arc<CudaModel>) -> Result<()> {
        let max_context = model.config.max_positions.min(WARM_UP_TOKENS[0] + 1);
        let mut timeline = CudaTimeline::new(Arc::clone(model), max_context)?;
        for tokens in WARM_UP_TOKENS {
            let ids = vec![0; tokens.min(max_context)];
            timeline.prefill(&ids)?;
            timeline.begin(&Sampling::default(), &[], &ids)?;
            timeline.next_token()?;
            timeline.rewind(0)?;
        }
        Ok(())
    }

    /// A new sequence of up to `max_context` tokens.
    ///
    /// # Errors
    /// [`Error::OutOfGpuMemory`]; [`Error::Usage`] if the model has fewer positions.
    pub fn new(model: Arc<CudaModel>, max_context: usize) -> Result<CudaTimeline> {
        let config = &model.config;
        if max_context == 0 || max_context > config.max_positions {
            return Err(Error::Usage(format!(
                "context size {max_context}: wanted 1 to {}",
                config.max_positions
            )));
        }
        let stream = model.gpu.stream()?;
        let cache = KvCache::new(&stream, config.num_layers, 1, max_context)?;
        let scratch =
            Scratch::new(&stream, config, max_context, max_context.min(PREFILL_TOKENS), model.act_order())?;
        let sampler = SamplerState::new(
            &model.gpu,
            &stream,
            SamplerShape { slots: 1, rows: 1, vocab: config.vocab_size, max_context },
        )?;
        Ok(CudaTimeline {
            stream,
            cache,
            scratch,
            sampler,
            step: None,
            position: 0,
            logits_held: false,
            running: None,
            model,
        })
    }

    /// Tokens in the cache.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position
    }

    /// Forgets everything from `position` on. Steps still queued write behind it and are overwritten in stream order.
    pub fn rewind(&mut self, position: usize) -> Result<()> {
        if position > self.position {
            return Err(Error::Usage(format!(
                "rewind to {position}: the cache holds {} tokens",
                self.position
            )));
        }
        self.running = None;
        self.logits_held = false;
        self.position = position;
        Ok(())
    }

    fn pass(&mut self) -> Pass<'_> {
        Pass {
            stream: &self.stream,
            config: &self.model.config,
            weights: &self.model.weights,
            cache: &mut self.cache,
            scratch: &mut self.scratch,
            step: &self.sampler.step,
            gemv_works: self.model.gemv_works,
        }
    }

    /// Runs `ids` (at most PREFILL_TOKENS) through the layers and counts them in.
    fn append(&mut self, ids: &[u32]) -> Result<()> {
        self.running = None;
        self.logits_held = false;
        let room = self.cache.max_context - self.position;
        if ids.len() > room {
            return Err(Error::Usage(format!(
                "{} tokens do not fit the {room} positions left of the context",
                ids.len()
            )));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.model.config.vocab_size) {
            return Err(Error::Usage(format!(
                "token id {id}: the vocabulary has {}",
                self.model.config.vocab_size
            )));
        }
        let words = ops::step_token_words(ids, self.position, 0)?;
        self.scratch.step_tokens.upload(&self.stream, 0, &words)?;
        self.pass().run(Tokens::Prompt(ids.len()))?;
        self.position += ids.len();
        Ok(())
    }

    /// Appends `ids`; the logits of the last one are held for [`CudaTimeline::begin`].
    pub fn prefill(&mut self, ids: &[u32]) -> Result<()> {
        let room = self.scratch.tokens;
        for chunk in ids.chunks(room) {
            self.append(chunk)?;
            self.pass().head(chunk.len() - 1, 1)?;
            self.logits_held = true;
        }
        // Here it costs nothing: the GPU is busy with the prompt.
        self.capture_step()
    }

    /// Appends `ids` and hands the logits `[vocab]` of each to `sink`, in order. `token_by_token`: one pass a token, as decoding
    /// does it; otherwise one pass for all.
    pub fn logits(
        &mut self,
        ids: &[u32],
        token_by_token: bool,
        sink: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let vocab = self.model.config.vocab_size;
        let room = if token_by_token { 1 } else { self.scratch.tokens };
        for chunk in ids.chunks(room) {
            self.append(chunk)?;
            for first in (0..chunk.len()).step_by(BATCH_TOKENS) {
                let count = BATCH_TOKENS.min(chunk.len() - first);
                self.pass().head(first, count)?;
                let rows = self.scratch.logits.download(&self.stream, 0, count * vocab)?;
                rows.chunks(vocab).try_for_each(&mut *sink)?;
            }
        }
        Ok(())
    }

    /// Starts a generation after a prefill. `history`: every token so far, the scope of the repetition penalty.
    pub fn begin(&mut self, sampling: &Sampling, stop_ids: &[u32], history: &[u32]) -> Result<()> {
        if !self.logits_held || history.len() != self.position {
            return Err(Error::Usage(format!(
                "begin: {} tokens of history, {} in the cache; prefill first",
                history.len(),
                self.position
            )));
        }
        ops::start(&self.stream, &mut self.sampler, 0, history)?;
        let queued = VecDeque::new();
        self.running = Some(Running {
            sampling: sampling.clone(),
            stop_ids: stop_ids.to_vec(),
            tally: Tally::default(),
            start: self.position,
            returned: 0,
            queued,
        });
        Ok(())
    }

    /// Chooses the next token. It is appended to the cache before the following `next_token`.
    ///
    /// # Errors
    /// [`Error::Usage`] when the context is full; [`Error::Cuda`] if a kernel failed or a logit is not a number.
    pub fn next_token(&mut self) -> Result<Sampled> {
        let Some(mut running) = self.running.take() else {
            return Err(Error::Usage("next_token: no generation was begun".into()));
        };
        // Step s chooses token s; from the second on it first appends token s - 1 at position start + s - 2.
        while running.queued.len() < AHEAD {
            let step = running.returned + running.queued.len() + 1;
            if step > 1 && running.start + step - 2 >= self.cache.max_context {
                break;
            }
            if step > 1 {
                self.queue_step()?;
            }
            ops::sample(
                &self.stream,
                &mut self.sampler,
                &self.scratch.logits,
                &running.sampling,
                &running.stop_ids,
            )?;
            running.queued.push_back(self.stream.record(false)?);
        }
        let Some(event) = running.queued.pop_front() else {
            return Err(Error::Usage(format!("the context of {} tokens is full", self.cache.max_context)));
        };
        event.wait()?;
        running.returned += 1;
        self.logits_held = false;
        self.position = running.start + running.returned - 1;
        let Some(arrival) = self.sampler.tokens.arrived(0, running.returned).next().transpose()? else {
            return Err(Error::Usage("next_token: the generation has ended".into()));
        };
        running.tally.count(arrival.row, arrival.drafts);
        self.running = Some(running);
        Ok(arrival.sampled)
    }

    /// What the steps since `begin` came to, of the tokens handed out.
    #[must_use]
    pub fn tally(&self) -> Tally {
        self.running.as_ref().map_or(Tally::default(), |running| running.tally)
    }

    /// Captures the decode step, unless that is done or switched off.
    fn capture_step(&mut self) -> Result<()> {
        let switches = crate::trace::switches();
        if self.step.is_some() || switches.no_graph || switches.sync {
            return Ok(());
        }
        let mut pass = self.pass();
        let graph = StepGraph::capture(pass.stream, move || {
            pass.run(Tokens::Step(1))?;
            pass.head(0, 1)
        })?;
        self.step = Some(graph);
        Ok(())
    }

    /// Queues the pass of the decode state's token.
    fn queue_step(&mut self) -> Result<()> {
        self.capture_step()?;
        match &mut self.step {
            Some(graph) => graph.launch(),
            None => {
                let mut pass = self.pass();
                pass.run(Tokens::Step(1))?;
                pass.head(0, 1)
            }
        }
    }
}
