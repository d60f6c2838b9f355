//! A session: the tokens so far, and how much of them the KV cache holds.
//!
//! The tokens are the truth. The cache may hold fewer (the last token of an answer needs no forward pass until
//! something follows it) or more (the GPU runs ahead of what was asked for; a failed call leaves what it had done).
//! Before each use `settle` cuts the cache back to the tokens, and the tokens it lacks are put in front of the new
//! ones.

use std::fmt;
use std::time::Instant;

use super::Engine;
use super::device::Timeline;
use super::generation::Generation;
use crate::error::{Error, Result};
use crate::sampler::Sampling;

/// One text that grows: prompts and answers in turn.
pub struct Session {
    pub(super) engine: Engine,
    pub(super) timeline: Timeline,
    pub(super) max_context: usize,
    pub(super) tokens: Vec<u32>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({} of {} tokens, {:?})", self.tokens.len(), self.max_context, self.engine)
    }
}

impl Session {
    pub(super) fn new(engine: Engine, timeline: Timeline, max_context: usize) -> Session {
        Session { engine, timeline, max_context, tokens: Vec::new() }
    }

    /// Appends `text` as it is (no prompt template; the names of special tokens in it are text) and answers it.
    ///
    /// The prompt has been processed when this returns; each item of the iterator is a token.
    ///
    /// # Errors
    /// As [`Session::generate_ids`]; also if the checkpoint has no tokenizer.
    pub fn generate(&mut self, text: &str, sampling: &Sampling) -> Result<Generation<'_>> {
        let started = Instant::now();
        let ids = self.engine.tokenizer()?.encode(text, false)?;
        self.start(&ids, sampling, started)
    }

    /// Appends `ids` and answers them.
    ///
    /// # Errors
    /// [`Error::Usage`], with nothing changed, if `ids` is empty, holds an id outside the vocabulary or does not fit
    /// into the context, or if a value of `sampling` is out of range; [`Error::Model`] if stop strings are asked for
    /// and the checkpoint has no tokenizer; [`Error::Cuda`] if the GPU fails.
    pub fn generate_ids(&mut self, ids: &[u32], sampling: &Sampling) -> Result<Generation<'_>> {
        self.start(ids, sampling, Instant::now())
    }

    /// Appends `ids` and hands the logits `[vocab]` after each of them to `sink`, in order: from one pass over all
    /// of them, or with `token_by_token` from one forward pass a token, as in decoding.
    ///
    /// # Errors
    /// As [`Session::generate_ids`], and what `sink` returns; the session's tokens are then as before.
    pub fn logits(
        &mut self,
        ids: &[u32],
        token_by_token: bool,
        sink: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        self.check(ids)?;
        self.settle()?;
        let cached = self.timeline.position();
        if cached < self.tokens.len() {
            self.timeline.prefill(&self.tokens[cached..])?;
        }
        self.timeline.logits(ids, token_by_token, sink)?;
        self.tokens.extend_from_slice(ids);
        Ok(())
    }

    /// Every token so far, prompts and answers. What ended an answer is not part of it: the end-of-text token, and
    /// tokens that hold nothing but a stop string and blanks before it, are yielded but not kept, so that the next
    /// turn follows the answer itself. A [`Generation`] that is dropped early leaves exactly the tokens it has
    /// yielded.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Forgets every token.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the GPU fails.
    pub fn reset(&mut self) -> Result<()> {
        self.truncate(0)
    }

    /// Forgets the tokens from `length` on; does nothing if there are no more than that.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the GPU fails.
    pub fn truncate(&mut self, length: usize) -> Result<()> {
        self.tokens.truncate(length);
        self.settle()
    }

    /// Tokens the session may hold.
    #[must_use]
    pub fn max_context(&self) -> usize {
        self.max_context
    }

    /// The engine this is a session of.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    fn start(&mut self, ids: &[u32], sampling: &Sampling, started: Instant) -> Result<Generation<'_>> {
        sampling.validate()?;
        self.check(ids)?;
        if !sampling.stop.is_empty() {
            self.engine.tokenizer()?;
        }
        self.settle()?;
        let prefill_started = Instant::now();
        let mut uncached = self.tokens[self.timeline.position()..].to_vec();
        uncached.extend_from_slice(ids);
        self.timeline.prefill(&uncached)?;
        self.tokens.extend_from_slice(ids);
        let stop_ids = if sampling.ignore_eos { &[][..] } else { self.engine.stop_ids() };
        self.timeline.begin(sampling, stop_ids, &self.tokens)?;
        Ok(Generation::new(self, ids.len(), sampling, started, prefill_started))
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::Usage("the prompt is empty: give at least one token".to_owned()));
        }
        let vocab = self.engine.config().vocab_size;
        if let Some(i) = ids.iter().position(|&id| id as usize >= vocab) {
            let id = ids[i];
            return Err(Error::Usage(format!("prompt: token {i} is id {id}, wanted an id below {vocab}")));
        }
        let (held, new, most) = (self.tokens.len(), ids.len(), self.max_context);
        if held + new > most {
            let before = if held == 0 { String::new() } else { format!(" after {held} before them") };
            return Err(Error::Usage(format!(
                "prompt: {new} tokens{before} do not fit, the context holds {most}; shorten the prompt or start anew"
            )));
        }
        Ok(())
    }

    /// Cuts the cache back to the tokens.
    fn settle(&mut self) -> Result<()> {
        self.timeline.rewind(self.timeline.position().min(self.tokens.len()))
    }
}
