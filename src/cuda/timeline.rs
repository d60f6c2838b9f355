//! One sequence on a GPU.

use std::collections::VecDeque;
use std::sync::Arc;

use super::CudaModel;
use super::sequences::{AHEAD, Sequences, most_tokens};
use crate::error::{Error, Result};
use crate::gpu::Arrival;
use crate::gpu::context::Event;
use crate::gpu::ops::HEAD_TOKENS;
use crate::sampler::{Sampled, Sampling};
use crate::speculate::Tally;

/// Prompts for which Falcon-7B takes each size of tile of `gptq_gemm`, each number of columns of `gptq_batch`, and `gptq_gemv`.
const WARM_UP_TOKENS: [usize; 17] = [512, 192, 160, 144, 128, 112, 96, 80, 65, 49, 41, 33, 25, 17, 9, 5, 1];

/// A generation under way.
struct Running {
    stop_ids: Vec<u32>,
    tally: Tally,
    /// Tokens before the generation.
    start: usize,
    /// Most tokens of it: those wanted, or the context's end.
    most: usize,
    /// Tokens that arrived, handed to the caller or not.
    made: usize,
    /// Tokens handed to the caller.
    returned: usize,
    /// The last token that arrived ends it.
    ended: bool,
    arrived: VecDeque<Arrival>,
    /// An event behind each step queued.
    queued: VecDeque<Event>,
}

/// One sequence: its cache, its position, and the logits of its last token.
pub struct CudaTimeline {
    model: Arc<CudaModel>,
    sequences: Sequences,
    position: usize,
    /// Row 0 of the logits belongs to the last token.
    logits_held: bool,
    running: Option<Running>,
}

impl CudaTimeline {
    /// Runs every kernel of a model once. The driver loads a kernel at its first launch, some 4 ms for all of them, which would
    /// else be part of the first prompt's time. About 30 ms for Falcon-7B when `gptq_gemm` had one size of tile.
    ///
    /// # Errors
    /// As [`CudaTimeline::new`], [`CudaTimeline::prefill`] and [`CudaTimeline::next_token`].
    pub fn warm_up(model: &Arc<CudaModel>) -> Result<()> {
        let max_context = model.config().max_positions.min(WARM_UP_TOKENS[0] + 1);
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
        let sequences = Sequences::new(Arc::clone(&model), 1, max_context)?;
        Ok(CudaTimeline { model, sequences, position: 0, logits_held: false, running: None })
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

    /// Appends `ids`; the logits of the last one are held for [`CudaTimeline::begin`].
    pub fn prefill(&mut self, ids: &[u32]) -> Result<()> {
        self.running = None;
        self.logits_held = false;
        self.sequences.prefill(0, self.position, ids)?;
        self.position += ids.len();
        self.logits_held = !ids.is_empty();
        Ok(())
    }

    /// Appends `ids` and hands the logits `[vocab]` of each to `sink`, in order. `token_by_token`: one decode step a token;
    /// otherwise one pass for all.
    pub fn logits(
        &mut self,
        ids: &[u32],
        token_by_token: bool,
        sink: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        self.running = None;
        self.logits_held = false;
        if token_by_token {
            for &id in ids {
                self.sequences.decode(&[(id, self.position)])?;
                self.position += 1;
                sink(&self.sequences.logits(0, 1)?)?;
            }
            return Ok(());
        }
        let vocab = self.model.config().vocab_size;
        for chunk in ids.chunks(self.sequences.room()) {
            self.sequences.append(0, self.position, chunk)?;
            self.position += chunk.len();
            for first in (0..chunk.len()).step_by(HEAD_TOKENS) {
                let count = HEAD_TOKENS.min(chunk.len() - first);
                self.sequences.head(first, count, 0)?;
                self.sequences.logits(0, count)?.chunks(vocab).try_for_each(&mut *sink)?;
            }
        }
        Ok(())
    }

    /// Starts a generation after a prefill. `history`: every token so far, the scope of the repetition penalty.
    /// [`Sampling::speculate`] is for the persistent kernel: with one kernel an op each step gives one token, the same ones.
    pub fn begin(&mut self, sampling: &Sampling, stop_ids: &[u32], history: &[u32]) -> Result<()> {
        if !self.logits_held || history.len() != self.position {
            return Err(Error::Usage(format!(
                "begin: {} tokens of history, {} in the cache; prefill first",
                history.len(),
                self.position
            )));
        }
        self.sequences.plan(sampling, stop_ids)?;
        self.sequences.start(0, history)?;
        self.running = Some(Running {
            stop_ids: stop_ids.to_vec(),
            tally: Tally::default(),
            start: self.position,
            most: most_tokens(sampling, self.position, self.sequences.max_context()),
            made: 0,
            returned: 0,
            ended: false,
            arrived: VecDeque::new(),
            queued: VecDeque::new(),
        });
        Ok(())
    }

    /// Chooses the next token. It is appended to the cache before the following `next_token`. A step of drafts gives several, which
    /// are handed out one by one.
    ///
    /// # Errors
    /// [`Error::Usage`] when the context is full, or the generation has ended; [`Error::Cuda`] if a kernel failed or a logit is
    /// not a number.
    pub fn next_token(&mut self) -> Result<Sampled> {
        let Some(mut running) = self.running.take() else {
            return Err(Error::Usage("next_token: no generation was begun".into()));
        };
        // Ahead of what is handed out: the steps behind run while the caller looks at this token.
        while !running.ended
            && running.queued.len() < AHEAD
            && running.made + running.queued.len() < running.most
        {
            let appends = running.made + running.queued.len() > 0;
            running.queued.push_back(self.sequences.queue(appends)?);
        }
        if running.arrived.is_empty()
            && let Some(event) = running.queued.pop_front()
        {
            self.sequences.wait(&event)?;
            let step = self.sequences.arrived(0, running.made + 1)?;
            running.made += step.len();
            let last = step.last().map(|arrival| arrival.sampled.id);
            running.ended =
                running.made >= running.most || last.is_none_or(|id| running.stop_ids.contains(&id));
            running.arrived.extend(step);
        }
        let Some(arrival) = running.arrived.pop_front() else {
            let most = self.sequences.max_context();
            return Err(Error::Usage(format!(
                "next_token: the generation has ended, or the context of {most} tokens is full"
            )));
        };
        running.returned += 1;
        self.logits_held = false;
        self.position = running.start + running.returned - 1;
        running.tally.count(arrival.row, arrival.drafts);
        self.running = Some(running);
        Ok(arrival.sampled)
    }

    /// What the steps since `begin` came to, of the tokens handed out.
    #[must_use]
    pub fn tally(&self) -> Tally {
        self.running.as_ref().map_or(Tally::default(), |running| running.tally)
    }
}
