//! `rope`, `attn_decode`, `attn_prefill`.

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::{GEMV_TOKENS, STEP_FIRST, STEP_TOKEN_WORDS};
use super::{call, check, launch_on, u32_of};
use crate::error::Result;
use crate::layout::{HEAD_DIM, UNIT_ROWS};

/// Keys of one `attn_decode` block.
const ATTN_CHUNK: usize = ffi::PEREGRINE_ATTN_CHUNK as usize;
/// Floats of one partial row of `attn_decode`: the values, their weights' sum, the largest score.
const ATTN_ROW_FLOATS: usize = HEAD_DIM + 2;

/// Keys and values of one layer: `[max_context, 64]` f16 each.
pub struct LayerCache {
    /// Rotated keys.
    pub k: DevBuf<u16>,
    /// Values.
    pub v: DevBuf<u16>,
}

/// The positions a call works at, and how far the cache reaches.
#[derive(Clone, Copy)]
pub struct Span<'a> {
    /// A `Step`; its first token's position counts.
    pub state: &'a DevBuf<u32>,
    /// Tokens of the call. The caller has checked that position + tokens <= max_context.
    pub tokens: usize,
    /// Positions the cache and the rotary table have room for.
    pub max_context: usize,
}

impl Span<'_> {
    fn token(&self, op: &str, stream: &Stream) -> Result<*const ffi::StepToken> {
        self.state.require(op, STEP_FIRST + STEP_TOKEN_WORDS)?;
        Ok(self.state.ptr(stream).wrapping_add(STEP_FIRST).cast())
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
    span: Span<'_>,
) -> Result<()> {
    let op = "rope";
    qkv.require(op, span.tokens * (heads + 2) * HEAD_DIM)?;
    cache.k.require(op, span.max_context * HEAD_DIM)?;
    cache.v.require(op, span.max_context * HEAD_DIM)?;
    table.require(op, span.max_context * HEAD_DIM)?;
    let params = ffi::RopeParams {
        qkv: qkv.ptr_mut(stream),
        k_cache: cache.k.ptr_mut(stream),
        v_cache: cache.v.ptr_mut(stream),
        table: table.ptr(stream),
        token: span.token(op, stream)?,
        tokens: u32_of(op, span.tokens)?,
        heads: u32_of(op, heads)?,
        slots: 1,
        max_context: u32_of(op, span.max_context)?,
    };
    call!(rope, stream, params)
}

/// Scratch of `attn_decode`.
pub struct AttnScratch {
    partials: DevBuf<f32>,
    arrivals: DevBuf<u32>,
}

impl AttnScratch {
    /// For any call with up to [`GEMV_TOKENS`] tokens.
    pub fn new(stream: &Stream, heads: usize, max_context: usize) -> Result<AttnScratch> {
        let groups = GEMV_TOKENS * heads.div_ceil(UNIT_ROWS);
        let floats = groups * max_context.div_ceil(ATTN_CHUNK) * UNIT_ROWS * ATTN_ROW_FLOATS;
        Ok(AttnScratch {
            partials: DevBuf::zeros(stream, "attention partials", floats)?,
            arrivals: DevBuf::zeros(stream, "attention arrivals", groups)?,
        })
    }
}

/// Attention's output: `heads * 64` f16 values a token, from `first` on, `stride` apart.
pub struct AttnOutput<'a> {
    /// The buffer.
    pub out: &'a mut DevBuf<u16>,
    /// Index of the first token's first value; even.
    pub first: usize,
    /// Values between two tokens; even.
    pub stride: usize,
}

fn attn_params(
    op: &str,
    stream: &Stream,
    qkv: &DevBuf<u16>,
    heads: usize,
    cache: &LayerCache,
    span: Span<'_>,
    output: AttnOutput<'_>,
) -> Result<ffi::AttnPrefillParams> {
    qkv.require(op, span.tokens * (heads + 2) * HEAD_DIM)?;
    cache.k.require(op, span.max_context * HEAD_DIM)?;
    cache.v.require(op, span.max_context * HEAD_DIM)?;
    output
        .out
        .require(op, output.first + span.tokens.saturating_sub(1) * output.stride + heads * HEAD_DIM)?;
    Ok(ffi::AttnPrefillParams {
        qkv: qkv.ptr(stream),
        k_cache: cache.k.ptr(stream),
        v_cache: cache.v.ptr(stream),
        token: span.token(op, stream)?,
        out: output.out.ptr_mut(stream).wrapping_add(output.first),
        tokens: u32_of(op, span.tokens)?,
        heads: u32_of(op, heads)?,
        out_stride: u32_of(op, output.stride)?,
        slots: 1,
        max_context: u32_of(op, span.max_context)?,
    })
}

/// `attn_decode`: up to [`GEMV_TOKENS`] tokens.
#[allow(unsafe_code)]
pub fn attn_decode(
    stream: &Stream,
    qkv: &DevBuf<u16>,
    heads: usize,
    cache: &LayerCache,
    span: Span<'_>,
    scratch: &mut AttnScratch,
    output: AttnOutput<'_>,
) -> Result<()> {
    let op = "attn_decode";
    let common = attn_params(op, stream, qkv, heads, cache, span, output)?;
    let groups = span.tokens * heads.div_ceil(UNIT_ROWS);
    let chunks = span.max_context.div_ceil(ATTN_CHUNK);
    scratch.partials.require(op, groups * chunks * UNIT_ROWS * ATTN_ROW_FLOATS)?;
    scratch.arrivals.require(op, groups)?;
    let params = ffi::AttnDecodeParams {
        qkv: common.qkv,
        k_cache: common.k_cache.cast_mut(),
        v_cache: common.v_cache.cast_mut(),
        table: std::ptr::null(),
        token: common.token,
        out: common.out,
        partials: scratch.partials.ptr_mut(stream),
        arrivals: scratch.arrivals.ptr_mut(stream),
        tokens: common.tokens,
        heads: common.heads,
        out_stride: common.out_stride,
        slots: 1,
        max_context: common.max_context,
    };
    call!(attn_decode, stream, params)
}

/// `attn_prefill`: any number of tokens.
#[allow(unsafe_code)]
pub fn attn_prefill(
    stream: &Stream,
    qkv: &DevBuf<u16>,
    heads: usize,
    cache: &LayerCache,
    span: Span<'_>,
    output: AttnOutput<'_>,
) -> Result<()> {
    let params = attn_params("attn_prefill", stream, qkv, heads, cache, span, output)?;
    call!(attn_prefill, stream, params)
}
