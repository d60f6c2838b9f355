//! The forward pass on the GPU. It reads like the drawing in the crate's first page:
//!
//! ```text
//! embed -> 32 x { norm -> [qkv ; up] -> rope + kv append -> attention, gelu -> [down | dense] -> + residual } -> norm -> head
//! ```
//!
//! That is how prompts are computed, one kernel an op. A decode step is the same in one persistent kernel where it fits
//! ([`Pass::step`]).
//!
//! Each layer's last product leaves its sum to the norm that follows (`layernorm` adds K slices in order), and decoding's
//! attention rotates and appends on the way, so a layer is four launches. Nothing is allocated and nothing waits.

use crate::config::ModelConfig;
use crate::error::Result;
use crate::gpu::ops::{
    self, Activations, AttnOutput, DecodeLayer, DecodeModel, DecodeScratch, GEMV_TOKENS, MatmulKernel,
    MatmulOutput, NextProduct, PendingSum, StepTokens,
};
use crate::gpu::{DevBuf, Stream};
use crate::kv_cache::KvCache;
use crate::layout::UNIT_INPUTS;
use crate::planes::PLANE_TOKENS;
use crate::scratch::{PARTIAL_TOKENS, Scratch};
use crate::weights::Weights;

/// Up to this many tokens a layer's last product overtakes its attention, and with more where contexts are short: attention fills the GPU
/// otherwise, and a product's blocks beside it delay both.
const AWAITING_TOKENS: usize = 32;

/// What a pass works with. `step` is the sampler's `Step`: the tokens of the next decode step.
pub(crate) struct Pass<'a> {
    pub(crate) stream: &'a Stream,
    pub(crate) config: &'a ModelConfig,
    pub(crate) weights: &'a Weights,
    pub(crate) cache: &'a mut KvCache,
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) step: &'a DevBuf<u32>,
    /// Every token's position is less; a hint, see [`StepTokens::within`].
    pub(crate) reach: usize,
    /// What the persistent kernel works in; `None`: one kernel an op.
    pub(crate) decode: Option<&'a mut DecodeScratch>,
}

/// Where the tokens of a pass come from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tokens {
    /// `scratch.step_tokens`, this many: a prompt's, all of one slot.
    Prompt(usize),
    /// The sampler's step, this many.
    Step(usize),
}

impl Tokens {
    fn count(self) -> usize {
        match self {
            Tokens::Prompt(count) | Tokens::Step(count) => count,
        }
    }

    fn of<'a>(self, prompt: &'a DevBuf<u32>, step: &'a DevBuf<u32>) -> StepTokens<'a> {
        match self {
            Tokens::Prompt(count) => StepTokens::list(prompt, count),
            Tokens::Step(count) => StepTokens::step(step, count),
        }
    }
}

impl Pass<'_> {
    /// Appends the tokens to the cache; `scratch.normed` then holds the final norm's output for each.
    pub(crate) fn run(&mut self, tokens: Tokens) -> Result<()> {
        let Pass { stream, weights, .. } = *self;
        let s = &mut *self.scratch;
        let m = tokens.count();
        ops::embed(stream, &weights.embedding, tokens.of(&s.step_tokens, self.step), &mut s.x)?;
        let first_norm = weights.layers.first().map_or(&weights.final_norm, |l| &l.norm);
        let planes = self.planes(tokens)?;
        let s = &mut *self.scratch;
        ops::layernorm(stream, first_norm, &mut s.x, None, m, &mut s.normed, planes)?;
        for (i, layer) in weights.layers.iter().enumerate() {
            let done = self
                .qkv_up(i, tokens, planes)
                .and_then(|()| self.attention(i, tokens, planes))
                .and_then(|()| self.down_dense(i, tokens, planes));
            if done.is_err() && self.awaits_attention(i, tokens) {
                // Whether or not that works: the first error is the one to tell.
                let _ = self.scratch.attn.forget(stream);
            }
            done?;
            let next_norm = weights.layers.get(i + 1).map_or(&weights.final_norm, |l| &l.norm);
            let s = &mut *self.scratch;
            let sum =
                PendingSum { partials: &s.partials, slices: s.slices, bias: layer.down_dense_bias.as_ref() };
            let pending = (m <= PARTIAL_TOKENS).then_some(sum);
            let planes = planes && i + 1 < weights.layers.len(); // the head takes rows of f16
            ops::layernorm(stream, next_norm, &mut s.x, pending, m, &mut s.normed, planes)?;
        }
        Ok(())
    }

    /// Logits of tokens `first .. first + count` (at most 64) of the last run, into rows `row ..` of `scratch.logits`.
    pub(crate) fn head(&mut self, first: usize, count: usize, row: usize) -> Result<()> {
        let s = &mut *self.scratch;
        ops::head(self.stream, self.weights.head(), &s.normed, first, count, &mut s.logits, row)
    }

    /// A decode step: appends the tokens of the sampler's step to the cache; row m of `scratch.logits` is what follows token m. With
    /// one kernel an op there are `rows` tokens, the persistent kernel reads on the device how many.
    pub(crate) fn step(&mut self, rows: usize) -> Result<()> {
        let Some(decode) = &mut self.decode else {
            self.run(Tokens::Step(rows))?;
            return self.head(0, rows, 0);
        };
        let weights = self.weights;
        let layers = weights.layers.iter().zip(&mut self.cache.layers).enumerate();
        let layers = layers.map(|(i, (layer, cache))| DecodeLayer {
            norm: &layer.norm,
            qkv_up: &layer.qkv_up,
            down_dense: &layer.down_dense,
            on_sides: weights.on_sides.as_ref().and_then(|copy| copy.layers.get(i)),
            cache,
        });
        let model = DecodeModel {
            layers: layers.collect(),
            embedding: &weights.embedding,
            head: weights.head(),
            head_on_sides: weights.on_sides.as_ref().map(|copy| &copy.head),
            final_norm: &weights.final_norm,
            rope_table: &weights.rope_table,
        };
        ops::decode_step(self.stream, model, self.step, decode, &mut self.scratch.logits)
    }

    /// A step's sequences have the same bits whatever steps beside them, so up to 8 stay with one kernel; a prompt takes the faster.
    fn kernel(&self, tokens: Tokens) -> MatmulKernel {
        match tokens {
            Tokens::Step(m) if m <= GEMV_TOKENS => MatmulKernel::Gemv,
            _ => MatmulKernel::of_prompt(tokens.count()),
        }
    }

    /// Whether activations of the layers' products are planes: by the sums of bytes that they allow a product of 9 to 16 tokens takes less
    /// power, against which it runs. Kernels of somebody else's know nothing of that, nor does gathering.
    fn planes(&self, tokens: Tokens) -> Result<bool> {
        let built_in = ["layernorm", "attn_decode", "gptq_batch"].into_iter().all(ops::is_built_in);
        let few = (GEMV_TOKENS + 1..=PLANE_TOKENS).contains(&tokens.count());
        let wanted = built_in && few && Self::few(tokens) && !self.weights.act_order();
        if !wanted || !self.config.ffn_size.is_multiple_of(UNIT_INPUTS) {
            return Ok(false);
        }
        self.weights.matrices().try_fold(true, |all, w| Ok(all && ops::gptq_batch_planes(self.stream, w)?))
    }

    fn qkv_up(&mut self, index: usize, tokens: Tokens, planes: bool) -> Result<()> {
        let (layer, awaited) = (&self.weights.layers[index], self.awaits_attention(index, tokens));
        let (stream, kernel) = (self.stream, self.kernel(tokens));
        let (m, n) = (tokens.count(), layer.qkv_up.n);
        let (hidden, qkv_size) = (self.config.hidden_size, self.config.qkv_size());
        let s = &mut *self.scratch;
        let next = NextProduct { w: &layer.down_dense, slices: s.slices };
        let parts = if layer.one_source {
            vec![(0..n, &layer.qkv_source)]
        } else {
            vec![(0..qkv_size, &layer.qkv_source), (qkv_size..n, &layer.up_source)]
        };
        for (rows, source) in parts {
            let x = match (source, &mut s.permuted_normed) {
                (Some(source), Some(permuted)) => {
                    ops::permute(stream, &s.normed, source, m, permuted)?;
                    &*permuted
                }
                _ => &s.normed,
            };
            let output = MatmulOutput::Split {
                out: &mut s.qkv,
                gelu_out: &mut s.wide,
                gelu_stride: self.config.ffn_size + hidden,
                split_row: qkv_size,
                planes,
                bias: layer.qkv_up_bias.as_ref(),
                announced: awaited.then_some(&s.attn),
                next: Some(next),
            };
            ops::gptq_matmul(
                stream,
                kernel,
                &layer.qkv_up,
                rows,
                Activations { x, stride: hidden, tokens: m, planes, attention: None },
                1,
                output,
            )?;
        }
        Ok(())
    }

    fn attention(&mut self, index: usize, tokens: Tokens, planes: bool) -> Result<()> {
        let (stream, heads, table) = (self.stream, self.config.num_heads, &self.weights.rope_table);
        let (few, awaited) = (Self::few(tokens), self.awaits_attention(index, tokens));
        let s = &mut *self.scratch;
        let tokens = tokens.of(&s.step_tokens, self.step).within(self.reach);
        let cache = &mut self.cache.layers[index];
        let output = AttnOutput {
            out: &mut s.wide,
            first: self.config.ffn_size,
            stride: self.config.ffn_size + self.config.hidden_size,
            planes,
            awaited,
        };
        if few {
            return ops::attn_decode(stream, &s.qkv, cache, table, tokens, &mut s.attn, output);
        }
        ops::rope(stream, &mut s.qkv, heads, cache, table, tokens)?;
        ops::attn_prefill(stream, &s.qkv, heads, cache, tokens, output)
    }

    /// Attention by `attn_decode`: a step's tokens are of several slots, and a short prompt's are few.
    fn few(tokens: Tokens) -> bool {
        matches!(tokens, Tokens::Step(_)) || tokens.count() <= GEMV_TOKENS
    }

    /// Whether the layer's attention begins before its first product has ended, and its last product overtakes it. Kernels of somebody
    /// else's know nothing of that.
    fn awaits_attention(&self, index: usize, tokens: Tokens) -> bool {
        let built_in = ["attn_decode", "gptq_batch"].into_iter().all(ops::is_built_in);
        let next = self.weights.layers[index].down_dense_source.is_none();
        let m = tokens.count();
        next && built_in
            && Self::few(tokens)
            && (m <= AWAITING_TOKENS || self.reach <= ops::ATTN_SHORT)
            && self.kernel(tokens) == MatmulKernel::Batch
    }

    fn down_dense(&mut self, index: usize, tokens: Tokens, planes: bool) -> Result<()> {
        let (layer, m) = (&self.weights.layers[index], tokens.count());
        let (stream, kernel) = (self.stream, self.kernel(tokens));
        let awaits = self.awaits_attention(index, tokens);
        let s = &mut *self.scratch;
        let wide = self.config.ffn_size + self.config.hidden_size;
        let x = match (&layer.down_dense_source, &mut s.permuted_wide) {
            (Some(source), Some(permuted)) => {
                ops::permute(stream, &s.wide, source, m, permuted)?;
                &*permuted
            }
            _ => &s.wide,
        };
        let (slices, output) = if m <= PARTIAL_TOKENS {
            (s.slices, MatmulOutput::Partials(&mut s.partials))
        } else {
            (1, MatmulOutput::Residual { x: &mut s.x, bias: layer.down_dense_bias.as_ref() })
        };
        ops::gptq_matmul(
            stream,
            kernel,
            &layer.down_dense,
            0..layer.down_dense.n,
            Activations { x, stride: wide, tokens: m, planes, attention: awaits.then_some(&s.attn) },
            slices,
            output,
        )
    }
}
