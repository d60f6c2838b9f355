//! The buffers a forward pass works in, allocated once: pointers stay the same, so a step can be a graph.
//!
//! | buffer | shape, type | Falcon-7B, 2048 tokens | for |
//! | --- | --- | --- | --- |
//! | `step_tokens` | [tokens, 4] u32 | 33 kB | a prompt's ids, positions, slot |
//! | `x` | [tokens, hidden] f32 | 37 MB | the residual stream |
//! | `normed` | [tokens, hidden] f16, or planes | 19 MB | output of a norm |
//! | `qkv` | [tokens, heads + 2, 64] f16 | 19 MB | queries, key, value |
//! | `wide` | [tokens, ffn + hidden] f16, or planes | 93 MB | GELU of the MLP, attention's output: input of `[down \| dense]` |
//! | `partials` | [slices, <= 72 tokens, hidden] f32 | 6.5 MB | sums of K slices |
//! | `permuted` | as `normed` and as `wide` | 0, or 112 MB | gathered activations (act-order only) |
//! | `logits` | [64, vocab] f32 | 17 MB | of one `head` call; sampling reads row m for token m of a step |

use crate::config::ModelConfig;
use crate::error::Result;
use crate::gpu::ops::{self, AttnScratch, BATCH_TOKENS, GEMV_TOKENS, HEAD_TOKENS, STEP_TOKEN_WORDS};
use crate::gpu::{DevBuf, Stream};
use crate::planes;

/// Up to this many tokens the K slices of `[down | dense]` are summed apart and added by the next norm: few tokens make few
/// blocks, and slices are what fills the GPU. `gptq_gemm`, for more tokens, fills it by itself.
pub(crate) const PARTIAL_TOKENS: usize = BATCH_TOKENS;

pub(crate) struct Scratch {
    /// Tokens there is room for.
    pub(crate) tokens: usize,
    /// A prompt's tokens; those of a decode step lie with the sampler.
    pub(crate) step_tokens: DevBuf<u32>,
    pub(crate) x: DevBuf<f32>,
    pub(crate) normed: DevBuf<u16>,
    pub(crate) qkv: DevBuf<u16>,
    pub(crate) wide: DevBuf<u16>,
    pub(crate) partials: DevBuf<f32>,
    pub(crate) slices: usize,
    pub(crate) permuted_normed: Option<DevBuf<u16>>,
    pub(crate) permuted_wide: Option<DevBuf<u16>>,
    pub(crate) attn: AttnScratch,
    pub(crate) logits: DevBuf<f32>,
}

impl Scratch {
    /// For calls of up to `tokens` tokens, and decode steps of `slots`; `act_order` adds the gathered copies.
    pub(crate) fn new(
        stream: &Stream,
        config: &ModelConfig,
        max_context: usize,
        tokens: usize,
        slots: usize,
        act_order: bool,
    ) -> Result<Scratch> {
        let (hidden, wide) = (config.hidden_size, config.ffn_size + config.hidden_size);
        let slices = ops::slices(wide);
        let permuted = |n: usize| {
            act_order.then(|| DevBuf::zeros(stream, "permuted activations", tokens * n)).transpose()
        };
        let activations = |n: usize| (tokens * n).max(planes::len(n));
        Ok(Scratch {
            tokens,
            step_tokens: DevBuf::zeros(stream, "prompt tokens", tokens * STEP_TOKEN_WORDS)?,
            x: DevBuf::zeros(stream, "residual stream", tokens * hidden)?,
            normed: DevBuf::zeros(stream, "normed activations", activations(hidden))?,
            qkv: DevBuf::zeros(stream, "queries, keys, values", tokens * config.qkv_size())?,
            wide: DevBuf::zeros(stream, "mlp and attention activations", activations(wide))?,
            partials: DevBuf::zeros(stream, "partial sums", slices * tokens.min(PARTIAL_TOKENS) * hidden)?,
            slices,
            permuted_normed: permuted(hidden)?,
            permuted_wide: permuted(wide)?,
            attn: AttnScratch::new(stream, config.num_heads, max_context, slots.max(GEMV_TOKENS))?,
            logits: DevBuf::zeros(stream, "logits", HEAD_TOKENS * config.vocab_size)?,
        })
    }
}
