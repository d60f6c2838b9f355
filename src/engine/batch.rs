//! A batch: several texts answered together. On a GPU each step gives every text its next token for hardly more than the time of
//! one; on the CPU they are computed one after the other.
//!
//! It works on token ids: [`Engine::tokenizer`] makes them, and makes text of them. Every text gets the tokens a [`Session`] of
//! its own would give it, but for the roundings of a GPU with more than 8 texts.
//!
//! [`Session`]: super::Session

use std::fmt;
use std::sync::Arc;

use super::Engine;
use super::device::Model;
use crate::cpu::CpuTimeline;
#[cfg(feature = "cuda")]
use crate::cuda::CudaBatch;
use crate::error::{Error, Result};
use crate::sampler::{Sampled, Sampling};

/// Several texts that are answered together.
pub struct Batch {
    engine: Engine,
    slots: Slots,
    count: usize,
    max_context: usize,
}

enum Slots {
    Cpu(Vec<CpuSlot>),
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaBatch>),
}

/// A text on the CPU.
struct CpuSlot {
    timeline: CpuTimeline,
    stop_ids: Vec<u32>,
    /// Tokens it may still get.
    left: usize,
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Batch({} texts of {} tokens, {:?})", self.count, self.max_context, self.engine)
    }
}

impl Batch {
    pub(super) fn new(engine: Engine, model: &Model, count: usize, max_context: usize) -> Result<Batch> {
        let slots = match model {
            Model::Cpu(model) => {
                let slot = |_| {
                    let timeline = CpuTimeline::new(Arc::clone(model), max_context)?;
                    Ok(CpuSlot { timeline, stop_ids: Vec::new(), left: 0 })
                };
                Slots::Cpu((0..count).map(slot).collect::<Result<_>>()?)
            }
            #[cfg(feature = "cuda")]
            Model::Cuda(model) => {
                Slots::Cuda(Box::new(CudaBatch::new(Arc::clone(model), count, max_context)?))
            }
        };
        Ok(Batch { engine, slots, count, max_context })
    }

    /// Texts there is room for.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.count
    }

    /// Forgets all texts and begins new ones, one prompt a slot; a slot whose prompt is empty rests. `sampling` is for all of them:
    /// equal prompts get equal answers. Its `speculate` is for single texts, and is ignored.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is not one prompt a slot, one holds an id outside the vocabulary or does not fit into the
    /// context, a value of `sampling` is out of range, or it has stop strings; [`Error::Cuda`] if the GPU fails.
    pub fn begin(&mut self, prompts: &[&[u32]], sampling: &Sampling) -> Result<()> {
        self.begin_after(0, prompts, sampling)
    }

    /// As [`Batch::begin`], for prompts whose first `kept` tokens each slot's cache holds already: those are not computed again.
    ///
    /// # Errors
    /// As [`Batch::begin`]; [`Error::Usage`] if a slot holds fewer tokens, or a prompt has no more than that.
    pub fn begin_after(&mut self, kept: usize, prompts: &[&[u32]], sampling: &Sampling) -> Result<()> {
        sampling.validate()?;
        if !sampling.stop.is_empty() {
            return Err(Error::Usage("a batch gives ids, and knows no stop strings".to_owned()));
        }
        if prompts.len() != self.count {
            return Err(Error::Usage(format!("{} prompts for {} slots", prompts.len(), self.count)));
        }
        let vocab = self.engine.config().vocab_size;
        for (slot, prompt) in prompts.iter().enumerate() {
            if prompt.len() > self.max_context {
                let (tokens, most) = (prompt.len(), self.max_context);
                return Err(Error::Usage(format!(
                    "prompt {slot}: {tokens} tokens do not fit, the context holds {most}"
                )));
            }
            if kept > 0 && prompt.len() <= kept {
                return Err(Error::Usage(format!(
                    "prompt {slot}: nothing after the {kept} tokens that are kept"
                )));
            }
            if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
                return Err(Error::Usage(format!("prompt {slot}: id {id}, wanted an id below {vocab}")));
            }
        }
        let sampling = Sampling { speculate: false, ..sampling.clone() };
        let stop_ids = if sampling.ignore_eos { &[][..] } else { self.engine.stop_ids() };
        match &mut self.slots {
            Slots::Cpu(slots) => {
                for (slot, prompt) in slots.iter_mut().zip(prompts) {
                    slot.begin(kept, prompt, &sampling, stop_ids, self.max_context)?;
                }
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Slots::Cuda(batch) => {
                for (slot, prompt) in prompts.iter().enumerate() {
                    batch.rewind(slot, kept)?;
                    batch.prefill(slot, &prompt[kept..])?;
                }
                batch.begin(&sampling, stop_ids, prompts)
            }
        }
    }

    /// The next token of every slot; `None` for one whose answer has ended, by an end-of-text id (which is given), by
    /// [`Sampling::max_new_tokens`], or by the end of the context. All `None`: there is nothing left to come.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the GPU fails or a logit of any slot is not a number.
    pub fn next_step(&mut self) -> Result<Vec<Option<Sampled>>> {
        match &mut self.slots {
            Slots::Cpu(slots) => slots.iter_mut().map(CpuSlot::next).collect(),
            #[cfg(feature = "cuda")]
            Slots::Cuda(batch) => batch.next_step(),
        }
    }
}

impl CpuSlot {
    fn begin(
        &mut self,
        kept: usize,
        prompt: &[u32],
        sampling: &Sampling,
        stop_ids: &[u32],
        max_context: usize,
    ) -> Result<()> {
        self.timeline.rewind(kept)?;
        self.left = 0;
        if prompt.is_empty() {
            return Ok(());
        }
        self.timeline.prefill(&prompt[kept..])?;
        self.timeline.begin(sampling, stop_ids, prompt)?;
        self.stop_ids = stop_ids.to_vec();
        // The last token need not fit into the context.
        self.left = sampling.max_new_tokens.min(max_context - prompt.len() + 1);
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Sampled>> {
        if self.left == 0 {
            return Ok(None);
        }
        let sampled = self.timeline.next_token()?;
        self.left = if self.stop_ids.contains(&sampled.id) { 0 } else { self.left - 1 };
        Ok(Some(sampled))
    }
}
