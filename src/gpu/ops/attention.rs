//! `rope`, `attn_decode`, `attn_prefill`.

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::step::StepTokens;
use super::{call, check, launch_on, u32_of};
use crate::error::{Error, Result};
use crate::layout::{HEAD_DIM, UNIT_ROWS};
use crate::planes;

/// Keys one warp of `attn_decode` takes.
const ATTN_CHUNK: usize = ffi::PEREGRINE_ATTN_CHUNK as usize;
/// Up to this [reach](StepTokens::reach) `attn_decode` of many tokens keeps to blocks that find room beside a product's.
pub const ATTN_SHORT: usize = ffi::PEREGRINE_ATTN_SHORT as usize;
/// Words behind the arrivals by which `attn_decode` awaits the product in front of it, and the one behind it `attn_decode`.
const READY_WORDS: usize = ffi::PEREGRINE_READY_WORDS as usize;
/// Floats of what a warp of `attn_decode` leaves for the one that merges: 16 rows of 64 values, and sum and maximum in every lane.
const ATTN_STATE_FLOATS: usize = 9 * 32 * 4;

/// Keys and values of one layer: `[slots, max_context, 64]` f16 each.
pub struct LayerCache {
    /// Rotated keys.
    pub k: DevBuf<u16>,
    /// Values.
    pub v: DevBuf<u16>,
    /// Sequences.
    pub slots: usize,
    /// Positions of each.
    pub max_context: usize,
}

impl LayerCache {
    /// An empty one.
    pub fn new(stream: &Stream, slots: usize, max_context: usize) -> Result<LayerCache> {
        let values = slots * max_context * HEAD_DIM;
        Ok(LayerCache {
            k: DevBuf::zeros(stream, "key cache", values)?,
            v: DevBuf::zeros(stream, "value cache", values)?,
            slots,
            max_context,
        })
    }

    pub(super) fn require(&self, op: &str) -> Result<()> {
        let values = self.slots * self.max_context * HEAD_DIM;
        self.k.require(op, values)?;
        self.v.require(op, values)
    }
}

/// `rope`: rotates the queries of `qkv [tokens, heads + 2, 64]` in place, the key into the cache, copies the value there.
/// `table [max_context, 32, 2]` holds cos and sin.
#[allow(unsafe_code)]
pub fn rope(
    stream: &Stream,
    qkv: &mut DevBuf<u16>,
    heads: usize,
    cache: &mut LayerCache,
    table: &DevBuf<f32>,
    tokens: StepTokens<'_>,
) -> Result<()> {
    let op = "rope";
    qkv.require(op, tokens.count * (heads + 2) * HEAD_DIM)?;
    cache.require(op)?;
    table.require(op, cache.max_context * HEAD_DIM)?;
    let params = ffi::RopeParams {
        qkv: qkv.ptr_mut(stream),
        k_cache: cache.k.ptr_mut(stream),
        v_cache: cache.v.ptr_mut(stream),
        table: table.ptr(stream),
        token: tokens.ptr(op, stream)?,
        tokens: u32_of(op, tokens.count)?,
        heads: u32_of(op, heads)?,
        slots: u32_of(op, cache.slots)?,
        max_context: u32_of(op, cache.max_context)?,
    };
    call!(rope, stream, params)
}

/// Scratch of `attn_decode`.
pub struct AttnScratch {
    partials: DevBuf<f32>,
    arrivals: DevBuf<u32>,
    heads: usize,
}

impl AttnScratch {
    /// For calls of up to `tokens` tokens, at most [`STEP_TOKENS`](super::STEP_TOKENS).
    pub fn new(stream: &Stream, heads: usize, max_context: usize, tokens: usize) -> Result<AttnScratch> {
        let groups = tokens * heads.div_ceil(UNIT_ROWS);
        let floats = groups * max_context.div_ceil(ATTN_CHUNK) * ATTN_STATE_FLOATS;
        Ok(AttnScratch {
            partials: DevBuf::zeros(stream, "attention partials", floats)?,
            arrivals: DevBuf::zeros(stream, "attention arrivals", groups + READY_WORDS)?,
            heads,
        })
    }

    /// Refuses one that is too small for a call of `tokens` tokens.
    pub(super) fn require(&self, op: &str, heads: usize, max_context: usize, tokens: usize) -> Result<()> {
        let groups = tokens * heads.div_ceil(UNIT_ROWS);
        self.partials.require(op, groups * max_context.div_ceil(ATTN_CHUNK) * ATTN_STATE_FLOATS)?;
        self.arrivals.require(op, groups + READY_WORDS)
    }

    /// After a product that [announces](super::MatmulOutput::Split::announced) its first rows, or a call whose output is
    /// [`awaited`](AttnOutput::awaited), behind which no product was launched that awaits it: what these say of their progress is
    /// forgotten. The next ones would take it for that of their own predecessors.
    pub fn forget(&mut self, stream: &Stream) -> Result<()> {
        self.arrivals.upload(stream, 0, &vec![0; self.arrivals.len()])
    }

    /// The words by which a product and a call of `tokens` tokens know of each other.
    pub(super) fn ready(&self, op: &str, stream: &Stream, tokens: usize) -> Result<*mut u32> {
        let groups = tokens * self.heads.div_ceil(UNIT_ROWS);
        self.arrivals.require(op, groups + READY_WORDS)?;
        Ok(self.arrivals.ptr(stream).wrapping_add(groups).cast_mut())
    }

    pub(super) fn ptrs(&mut self, stream: &Stream) -> (*mut f32, *mut u32) {
        (self.partials.ptr_mut(stream), self.arrivals.ptr_mut(stream))
    }
}

/// Attention's output: `heads * 64` f16 values a token, from `first` on, `stride` apart; or as many of [planes](crate::planes)' inputs.
pub struct AttnOutput<'a> {
    /// The buffer.
    pub out: &'a mut DevBuf<u16>,
    /// Index of the first token's first value; a multiple of 8.
    pub first: usize,
    /// Values between two tokens; a multiple of 8.
    pub stride: usize,
    /// `attn_decode` of up to 16 tokens writes planes of `stride` inputs: `first` and `stride` are multiples of 64.
    pub planes: bool,
    /// By words of its scratch `attn_decode` awaits the first rows of the `gptq_batch` launched before
    /// ([`announced`](super::MatmulOutput::Split::announced)), and the one that is launched next awaits it ([`Activations::attention`]).
    ///
    /// [`Activations::attention`]: super::Activations::attention
    pub awaited: bool,
}

impl AttnOutput<'_> {
    fn ptr(self, op: &str, stream: &Stream, tokens: usize, heads: usize) -> Result<*mut u16> {
        if self.planes {
            self.out.require(op, planes::len(self.stride.max(self.first + heads * HEAD_DIM)))?;
            return Ok(self.out.ptr_mut(stream));
        }
        self.out.require(op, self.first + tokens.saturating_sub(1) * self.stride + heads * HEAD_DIM)?;
        if !self.first.is_multiple_of(8) || !self.stride.is_multiple_of(8) {
            return Err(Error::Cuda {
                op: op.into(),
                what: format!("output at {} by {}, wanted multiples of 8", self.first, self.stride),
            });
        }
        Ok(self.out.ptr_mut(stream).wrapping_add(self.first))
    }
}

/// `attn_decode`: rotates, appends to the cache and attends, for up to [`STEP_TOKENS`](super::STEP_TOKENS) tokens of any
/// slots. `qkv` is not rotated.
#[allow(unsafe_code)]
pub fn attn_decode(
    stream: &Stream,
    qkv: &DevBuf<u16>,
    cache: &mut LayerCache,
    table: &DevBuf<f32>,
    tokens: StepTokens<'_>,
    scratch: &mut AttnScratch,
    output: AttnOutput<'_>,
) -> Result<()> {
    let (op, heads, m) = ("attn_decode", scratch.heads, tokens.count);
    qkv.require(op, m * (heads + 2) * HEAD_DIM)?;
    cache.require(op)?;
    table.require(op, cache.max_context * HEAD_DIM)?;
    scratch.require(op, heads, cache.max_context, m)?;
    let (partials, arrivals) = scratch.ptrs(stream);
    let (awaited, planes, first) = (output.awaited, output.planes, output.first);
    let params = ffi::AttnDecodeParams {
        qkv: qkv.ptr(stream),
        k_cache: cache.k.ptr_mut(stream),
        v_cache: cache.v.ptr_mut(stream),
        table: table.ptr(stream),
        token: tokens.ptr(op, stream)?,
        out_stride: u32_of(op, output.stride)?,
        out: output.ptr(op, stream, m, heads)?,
        partials,
        arrivals,
        tokens: u32_of(op, m)?,
        heads: u32_of(op, heads)?,
        slots: u32_of(op, cache.slots)?,
        max_context: u32_of(op, cache.max_context)?,
        planes: u32::from(planes),
        first: u32_of(op, first)?,
        reach: u32_of(op, tokens.reach.min(cache.max_context))?,
        awaited: u32::from(awaited),
    };
    call!(attn_decode, stream, params)
}

/// `attn_prefill`: any number of tokens of one slot at following positions, rotated and appended by [`rope`].
#[allow(unsafe_code)]
pub fn attn_prefill(
    stream: &Stream,
    qkv: &DevBuf<u16>,
    heads: usize,
    cache: &LayerCache,
    tokens: StepTokens<'_>,
    output: AttnOutput<'_>,
) -> Result<()> {
    let op = "attn_prefill";
    if output.planes {
        return Err(Error::Cuda {
            op: op.into(),
            what: "planes of bytes are wanted of it, it writes rows of f16: attn_decode alone writes planes"
                .into(),
        });
    }
    qkv.require(op, tokens.count * (heads + 2) * HEAD_DIM)?;
    cache.require(op)?;
    let params = ffi::AttnPrefillParams {
        qkv: qkv.ptr(stream),
        k_cache: cache.k.ptr(stream),
        v_cache: cache.v.ptr(stream),
        token: tokens.ptr(op, stream)?,
        out_stride: u32_of(op, output.stride)?,
        out: output.ptr(op, stream, tokens.count, heads)?,
        tokens: u32_of(op, tokens.count)?,
        heads: u32_of(op, heads)?,
        slots: u32_of(op, cache.slots)?,
        max_context: u32_of(op, cache.max_context)?,
    };
    call!(attn_prefill, stream, params)
}
