//! The tokens of a call, as `embed`, `rope` and attention read them: `StepToken` of `cuda/kernels.h`.

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::{STEP_TOKENS, u32_of};
use crate::error::Result;

/// Words of a `StepToken`: id, position, slot, and the index in the call of its slot's first token.
pub const STEP_TOKEN_WORDS: usize = 4;
/// Words in front of the first token of a `Step`, which the sampler leaves: the number of tokens, and three reserved.
pub const STEP_FIRST: usize = 4;
/// Words of a `Step`.
pub(super) const STEP_WORDS: usize = STEP_FIRST + STEP_TOKENS * STEP_TOKEN_WORDS;

/// Tokens on the GPU: `count` times [`STEP_TOKEN_WORDS`] words of `words`, from word `first` on. Tokens of one slot follow each
/// other, at following positions.
#[derive(Clone, Copy)]
pub struct StepTokens<'a> {
    /// The buffer.
    pub words: &'a DevBuf<u32>,
    /// Where the first token starts.
    pub first: usize,
    /// Tokens of the call.
    pub count: usize,
    /// See [`StepTokens::within`]; the cache's positions are more than enough.
    pub reach: usize,
}

impl<'a> StepTokens<'a> {
    /// The tokens at the start of a buffer, as a prompt has them.
    #[must_use]
    pub fn list(words: &'a DevBuf<u32>, count: usize) -> StepTokens<'a> {
        StepTokens { words, first: 0, count, reach: usize::MAX }
    }

    /// The tokens of a `Step`.
    #[must_use]
    pub fn step(words: &'a DevBuf<u32>, count: usize) -> StepTokens<'a> {
        StepTokens { words, first: STEP_FIRST, count, reach: usize::MAX }
    }

    /// The same, said to have positions that are all less than `reach`: `attn_decode` may do shorter contexts in another way. Where that is
    /// not so it takes longer, and has the same to within rounding.
    #[must_use]
    pub fn within(self, reach: usize) -> StepTokens<'a> {
        StepTokens { reach, ..self }
    }

    pub(super) fn ptr(self, op: &str, stream: &Stream) -> Result<*const ffi::StepToken> {
        self.words.require(op, self.first + self.count * STEP_TOKEN_WORDS)?;
        Ok(self.words.ptr(stream).wrapping_add(self.first).cast())
    }
}

/// The words of one slot's tokens `ids`, the first of which is appended at `position`.
pub fn step_token_words(ids: &[u32], position: usize, slot: usize) -> Result<Vec<u32>> {
    let op = "step tokens";
    let (position, slot) = (u32_of(op, position)?, u32_of(op, slot)?);
    Ok(ids.iter().zip(position..).flat_map(|(&id, position)| [id, position, slot, 0]).collect())
}
