//! Ops on rows of activations: `layernorm`, `permute`.

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::{call, check, launch_on, u32_of};
use crate::error::Result;
use crate::planes;

/// Weight and bias of a LayerNorm.
pub struct Norm {
    /// `[hidden]` f32
    pub weight: DevBuf<f32>,
    /// `[hidden]` f32
    pub bias: DevBuf<f32>,
    /// 1e-5
    pub epsilon: f32,
}

/// What `layernorm` adds to the residual first: `[slices, tokens, hidden]`, and the bias of the product they are slices of.
pub struct PendingSum<'a> {
    /// The slices.
    pub partials: &'a DevBuf<f32>,
    /// Their number.
    pub slices: usize,
    /// `[hidden]`
    pub bias: Option<&'a DevBuf<f32>>,
}

/// `layernorm`: `x += pending`, `out = LN(x)` f16.
#[allow(unsafe_code)]
pub fn layernorm(
    stream: &Stream,
    norm: &Norm,
    x: &mut DevBuf<f32>,
    pending: Option<PendingSum<'_>>,
    tokens: usize,
    out: &mut DevBuf<u16>,
    planes: bool,
) -> Result<()> {
    let op = "layernorm";
    let hidden = norm.weight.len();
    norm.bias.require(op, hidden)?;
    x.require(op, tokens * hidden)?;
    out.require(op, if planes { planes::len(hidden) } else { tokens * hidden })?;
    let mut params = ffi::LayernormParams {
        x: x.ptr_mut(stream),
        partials: std::ptr::null(),
        partials_bias: std::ptr::null(),
        weight: norm.weight.ptr(stream),
        bias: norm.bias.ptr(stream),
        out: out.ptr_mut(stream),
        tokens: u32_of(op, tokens)?,
        hidden: u32_of(op, hidden)?,
        slices: 0,
        planes: u32::from(planes),
        epsilon: norm.epsilon,
    };
    if let Some(sum) = pending {
        sum.partials.require(op, sum.slices * tokens * hidden)?;
        sum.bias.map_or(Ok(()), |b| b.require(op, hidden))?;
        params.partials = sum.partials.ptr(stream);
        params.partials_bias = sum.bias.map_or(std::ptr::null(), |b| b.ptr(stream));
        params.slices = u32_of(op, sum.slices)?;
    }
    call!(layernorm, stream, params)
}

/// `permute`: `out[m, i] = x[m, source[i]]`; a `source[i]` beyond the row reads its last value.
#[allow(unsafe_code)]
pub fn permute(
    stream: &Stream,
    x: &DevBuf<u16>,
    source: &DevBuf<u32>,
    tokens: usize,
    out: &mut DevBuf<u16>,
) -> Result<()> {
    let op = "permute";
    let n = source.len();
    x.require(op, tokens * n)?;
    out.require(op, tokens * n)?;
    let params = ffi::PermuteParams {
        x: x.ptr(stream),
        source: source.ptr(stream),
        out: out.ptr_mut(stream),
        tokens: u32_of(op, tokens)?,
        n: u32_of(op, n)?,
    };
    call!(permute, stream, params)
}
