//! Several sequences of one model on a GPU, decoded together: one step gives each its next token, for hardly more than the time of
//! one, since all share the pass over the weights. Up to 8 are one launch of the persistent kernel; more take one kernel an op.
//!
//! Each slot is a sequence with a history of its own. What a slot computes does not depend on its neighbours: up to 8 slots, its
//! logits are bit for bit those of the slot alone. (A slot whose answer ended at its first token computes the prompt's last token once
//! more while others go on: a later turn then begins from other last bits of that position.)

use std::collections::VecDeque;
use std::sync::Arc;

use super::CudaModel;
use super::sequences::{AHEAD, Sequences, most_tokens};
use crate::error::{Error, Result};
use crate::gpu::context::Event;
use crate::sampler::{Sampled, Sampling};

/// A slot's part in a generation.
struct Slot {
    /// Tokens before it.
    start: usize,
    /// Most tokens of it.
    most: usize,
    ended: bool,
}

/// A generation of several slots.
struct Running {
    stop_ids: Vec<u32>,
    /// `None`: the slot takes no part.
    slots: Vec<Option<Slot>>,
    /// Steps handed to the caller.
    taken: usize,
    /// An event behind each step queued.
    queued: VecDeque<Event>,
}

impl Running {
    /// Steps there are at most, as far as is known.
    fn most(&self) -> usize {
        let live = self.slots.iter().flatten().filter(|slot| !slot.ended);
        live.map(|slot| slot.most).max().unwrap_or(0)
    }
}

/// Sequences that are decoded together.
pub struct CudaBatch {
    sequences: Sequences,
    vocab: usize,
    /// Tokens in each slot's cache.
    positions: Vec<usize>,
    /// The slot's row of the logits belongs to its last token.
    logits_held: Vec<bool>,
    running: Option<Running>,
}

impl CudaBatch {
    /// `slots` (1 to 64) empty sequences of up to `max_context` tokens.
    ///
    /// # Errors
    /// [`Error::OutOfGpuMemory`]; [`Error::Usage`] if the model has fewer positions, or `slots` is out of range.
    pub fn new(model: Arc<CudaModel>, slots: usize, max_context: usize) -> Result<CudaBatch> {
        let vocab = model.config().vocab_size;
        let sequences = Sequences::new(model, slots, max_context)?;
        Ok(CudaBatch {
            sequences,
            vocab,
            positions: vec![0; slots],
            logits_held: vec![false; slots],
            running: None,
        })
    }

    /// Sequences.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.positions.len()
    }

    /// Tokens in a slot's cache; 0 for a slot that is not there.
    #[must_use]
    pub fn position(&self, slot: usize) -> usize {
        self.positions.get(slot).copied().unwrap_or(0)
    }

    fn check_slot(&self, slot: usize) -> Result<()> {
        let slots = self.slots();
        if slot < slots { Ok(()) } else { Err(Error::Usage(format!("slot {slot}: there are {slots}"))) }
    }

    /// Forgets a slot's tokens from `position` on, and ends the generation of all.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are fewer tokens, or no such slot.
    pub fn rewind(&mut self, slot: usize, position: usize) -> Result<()> {
        self.check_slot(slot)?;
        let held = self.positions[slot];
        if position > held {
            return Err(Error::Usage(format!("rewind to {position}: slot {slot} holds {held} tokens")));
        }
        self.running = None;
        self.logits_held[slot] = false;
        self.positions[slot] = position;
        Ok(())
    }

    /// Appends `ids` to a slot, and ends the generation of all; the logits of the last one are held for [`CudaBatch::begin`].
    ///
    /// # Errors
    /// [`Error::Usage`] if the ids do not fit, one is not in the vocabulary, or there is no such slot.
    pub fn prefill(&mut self, slot: usize, ids: &[u32]) -> Result<()> {
        self.check_slot(slot)?;
        self.running = None;
        self.logits_held[slot] = false;
        self.sequences.prefill(slot, self.positions[slot], ids)?;
        self.positions[slot] += ids.len();
        self.logits_held[slot] = !ids.is_empty();
        Ok(())
    }

    /// Starts a generation of all slots whose history is not empty: every token so far of the slot, which was prefilled last. The
    /// other slots rest: they keep what they hold. Speculation is for single sequences and is ignored.
    ///
    /// # Errors
    /// [`Error::Usage`] if a history is not what the slot's cache holds, or the slot was not prefilled since the last step; if a slot
    /// that is to rest is full.
    pub fn begin(&mut self, sampling: &Sampling, stop_ids: &[u32], histories: &[&[u32]]) -> Result<()> {
        self.running = None;
        if histories.len() != self.slots() {
            return Err(Error::Usage(format!(
                "begin: {} histories for {} slots",
                histories.len(),
                self.slots()
            )));
        }
        for (slot, history) in histories.iter().enumerate() {
            let (held, position) = (self.logits_held[slot], self.positions[slot]);
            if history.is_empty() && position >= self.sequences.max_context() {
                return Err(Error::Usage(format!("begin: slot {slot} is full, and cannot rest; rewind it")));
            }
            if !history.is_empty() && (!held || history.len() != position) {
                return Err(Error::Usage(format!(
                    "begin: {} tokens of history for slot {slot}, {position} in the cache; prefill first",
                    history.len()
                )));
            }
        }
        self.sequences.plan(&Sampling { speculate: false, ..sampling.clone() }, stop_ids)?;
        let mut slots = Vec::with_capacity(histories.len());
        for (slot, history) in histories.iter().enumerate() {
            if history.is_empty() {
                self.sequences.stop(slot, self.positions[slot])?;
                slots.push(None);
                continue;
            }
            self.sequences.start(slot, history)?;
            let most = most_tokens(sampling, history.len(), self.sequences.max_context());
            slots.push(Some(Slot { start: history.len(), most, ended: false }));
        }
        let stop_ids = stop_ids.to_vec();
        self.running = Some(Running { stop_ids, slots, taken: 0, queued: VecDeque::new() });
        Ok(())
    }

    /// Chooses the next token of every slot: `None` where the generation has ended or none was begun, or the slot rests. A token is
    /// appended to its slot's cache by the step that follows.
    ///
    /// # Errors
    /// [`Error::Cuda`] if a kernel failed or a logit of any slot is not a number.
    pub fn next_step(&mut self) -> Result<Vec<Option<Sampled>>> {
        let mut tokens = vec![None; self.slots()];
        let Some(mut running) = self.running.take() else { return Ok(tokens) };
        let most = running.most();
        while running.queued.len() < AHEAD && running.taken + running.queued.len() < most {
            self.logits_held.fill(false);
            let appends = running.taken + running.queued.len() > 0;
            running.queued.push_back(self.sequences.queue(appends)?);
        }
        if most > running.taken
            && let Some(event) = running.queued.pop_front()
        {
            self.sequences.wait(&event)?;
            running.taken += 1;
            for (index, slot) in running.slots.iter_mut().enumerate() {
                let Some(slot) = slot.as_mut().filter(|slot| !slot.ended) else { continue };
                let arrival = self.sequences.arrived(index, running.taken)?.pop();
                let token = arrival.map(|arrival| arrival.sampled);
                slot.ended = running.taken >= slot.most
                    || token.is_none_or(|token| running.stop_ids.contains(&token.id));
                self.positions[index] = slot.start + running.taken - 1;
                tokens[index] = token;
            }
        }
        self.running = Some(running);
        Ok(tokens)
    }

    /// Appends one token to every slot by one decode step, and gives the logits that follow: `[slots, vocab]`. Ends the generation.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is not one id a slot, one does not fit, or is not in the vocabulary.
    pub fn decode(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.running = None;
        self.logits_held.fill(false);
        let slots = self.slots();
        if ids.len() != slots {
            return Err(Error::Usage(format!("{} tokens for {slots} slots", ids.len())));
        }
        let tokens: Vec<_> = ids.iter().copied().zip(self.positions.iter().copied()).collect();
        self.sequences.decode(&tokens)?;
        self.positions.iter_mut().for_each(|position| *position += 1);
        self.sequences.logits(0, slots)
    }

    /// Logits a row of [`CudaBatch::decode`].
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.vocab
    }
}
