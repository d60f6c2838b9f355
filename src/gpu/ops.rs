//! One safe function an op: checks every buffer against the shape, then calls the launcher.
//!
//! The names are those of `cuda/kernels.h`, where each operand's shape stands; `src/reference.rs` has the same op as plain
//! loops. A launcher copies its parameters and returns at once; the work is queued on the stream.

use std::ffi::CStr;

use super::buffer::{DevBuf, MappedTokens};
use super::context::Stream;
use super::ffi;
use crate::error::{Error, Result};
use crate::layout::{HEAD_DIM, UNIT_CODE_BYTES, UNIT_INPUTS, UNIT_ROWS};
use crate::sampler::Sampling;

/// Most tokens of a `gptq_gemv`, `head` or `attn_decode` call.
pub const GEMV_TOKENS: usize = ffi::PEREGRINE_GEMV_TOKENS as usize;
/// Keys of one `attn_decode` block.
const ATTN_CHUNK: usize = ffi::PEREGRINE_ATTN_CHUNK as usize;
/// Floats of one partial row of `attn_decode`: the values, their weights' sum, the largest score.
const ATTN_ROW_FLOATS: usize = HEAD_DIM + 2;
/// Words of the decode state: position, token, step, length of the history.
pub const STATE_WORDS: usize = 4;
const STATE_POSITION: usize = 0;
const STATE_TOKEN: usize = 1;

/// A quantised matrix [n, k] in units.
pub struct Int4Matrix {
    /// `[n / 16][k / 64][unit_bytes]`
    pub units: DevBuf<u8>,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// 1, or 2 for groups of 32 inputs.
    pub scales_per_row: usize,
    /// Zero points are stored; otherwise all are 8.
    pub has_zeros: bool,
}

impl Int4Matrix {
    /// Bytes of one unit.
    #[must_use]
    pub fn unit_bytes(scales_per_row: usize, has_zeros: bool) -> usize {
        UNIT_CODE_BYTES + UNIT_ROWS * 2 * scales_per_row * (1 + usize::from(has_zeros))
    }

    /// An unset matrix.
    pub fn new(stream: &Stream, n: usize, k: usize, scales_per_row: usize, has_zeros: bool) -> Result<Int4Matrix> {
        let bytes = n / UNIT_ROWS * (k / UNIT_INPUTS) * Self::unit_bytes(scales_per_row, has_zeros);
        Ok(Int4Matrix { units: DevBuf::zeros(stream, "weights", bytes)?, n, k, scales_per_row, has_zeros })
    }
}

fn u32_of(op: &str, value: usize) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::Cuda { op: op.into(), what: format!("{value} does not fit 32 bits") })
}

/// Turns a launcher's code into a result; waits when `PEREGRINE_SYNC` asks for it.
fn check(op: &str, code: i32, stream: &Stream) -> Result<()> {
    match code {
        0 if stream.sync => stream.synchronize().map_err(|e| Error::Cuda { op: op.into(), what: e.to_string() }),
        0 => Ok(()),
        ffi::PEREGRINE_BAD_SHAPE => Err(Error::Cuda { op: op.into(), what: "the kernel is not written for this shape".into() }),
        code => Err(Error::Cuda { op: op.into(), what: format!("launch failed: {} ({code})", error_name(code)) }),
    }
}

#[allow(unsafe_code)]
fn error_name(code: i32) -> String {
    // SAFETY: takes any integer and returns a string constant of the CUDA runtime.
    let name = unsafe { ffi::launch_error_name(code) };
    if name.is_null() {
        return "unknown".into();
    }
    // SAFETY: not null, checked above; a nul-terminated constant that is never freed.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

fn launch_on(stream: &Stream) -> Result<ffi::Launch> {
    let context = stream.inner.context();
    context.bind_to_thread().map_err(|e| super::context::driver_error("using the GPU from this thread", e))?;
    Ok(ffi::Launch { stream: stream.inner.cu_stream().cast(), overlap: u32::from(stream.overlap) })
}

/// Calls launcher `ffi::$op` with `$params`. The `$why` is the check that makes it safe.
macro_rules! call {
    ($op:ident, $stream:expr, $params:expr) => {{
        let params = $params;
        let launch = launch_on($stream)?;
        // SAFETY: the caller proved each buffer against the shape with `require`, in the lines above; the launcher copies
        // `params` and `launch` before it returns; buffers are freed in stream order, so they outlive the queued kernel.
        let code = unsafe { ffi::$op(&params, &launch) };
        check(stringify!($op), code, $stream)
    }};
}

/// Where a quantised product goes; see `GptqOutput` in `cuda/kernels.h`.
pub enum MatmulOutput<'a> {
    /// f32 sums of each K slice apart: `[slices, tokens, n]`.
    Partials(&'a mut DevBuf<f32>),
    /// Added to `x [tokens, n]` f32, with the bias.
    Residual { x: &'a mut DevBuf<f32>, bias: Option<&'a DevBuf<f32>> },
    /// f16: rows below `split_row` to `out` (row stride `split_row`), the others through GELU to `gelu_out`.
    Split { out: &'a mut DevBuf<u16>, gelu_out: &'a mut DevBuf<u16>, gelu_stride: usize, split_row: usize, bias: Option<&'a DevBuf<f32>> },
}

/// Which kernel computes a quantised product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatmulKernel {
    /// `gptq_gemv`: at most [`GEMV_TOKENS`] tokens, at the speed of memory.
    Gemv,
    /// `gptq_gemm`: any number.
    Gemm,
}

/// Activations of a product: `[tokens, stride]` f16.
#[derive(Clone, Copy)]
pub struct Activations<'a> {
    /// The values.
    pub x: &'a DevBuf<u16>,
    /// Values between two tokens.
    pub stride: usize,
    /// Tokens.
    pub tokens: usize,
}

/// `gptq_gemv` / `gptq_gemm`: `y[m, row] = sum_k x[m, k] W[row, k]` for rows `rows` of `w` (multiples of 16).
#[allow(unsafe_code)]
pub fn gptq_matmul(
    stream: &Stream,
    kernel: MatmulKernel,
    w: &Int4Matrix,
    rows: std::ops::Range<usize>,
    a: Activations<'_>,
    slices: usize,
    output: MatmulOutput<'_>,
) -> Result<()> {
    let op = match kernel {
        MatmulKernel::Gemv => "gptq_gemv",
        MatmulKernel::Gemm => "gptq_gemm",
    };
    let unit_bytes = Int4Matrix::unit_bytes(w.scales_per_row, w.has_zeros);
    let tile_bytes = w.k / UNIT_INPUTS * unit_bytes;
    w.units.require(op, w.n / UNIT_ROWS * tile_bytes)?;
    let whole_tiles = rows.start % UNIT_ROWS == 0 && rows.end % UNIT_ROWS == 0;
    if rows.start >= rows.end || rows.end > w.n || !whole_tiles {
        return Err(Error::Cuda { op: op.into(), what: format!("rows {rows:?} of {}", w.n) });
    }
    if a.tokens == 0 || a.stride < w.k {
        return Err(Error::Cuda { op: op.into(), what: format!("{} tokens of {} inputs, wanted {}", a.tokens, a.stride, w.k) });
    }
    a.x.require(op, (a.tokens - 1) * a.stride + w.k)?;
    let n = rows.len();

    let mut y = ffi::GptqOutput::default();
    match output {
        MatmulOutput::Partials(partials) => {
            partials.require(op, slices * a.tokens * n)?;
            y.partials = partials.ptr_mut(stream);
        }
        MatmulOutput::Residual { x, bias } => {
            x.require(op, a.tokens * n)?;
            bias.map_or(Ok(()), |b| b.require(op, n))?;
            y.residual = x.ptr_mut(stream);
            y.bias = bias.map_or(std::ptr::null(), |b| b.ptr(stream));
        }
        MatmulOutput::Split { out, gelu_out, gelu_stride, split_row, bias } => {
            out.require(op, a.tokens * split_row)?;
            if rows.end > split_row {
                gelu_out.require(op, (a.tokens - 1) * gelu_stride + rows.end - split_row)?;
            }
            bias.map_or(Ok(()), |b| b.require(op, w.n))?;
            if rows.start != 0 && rows.start != split_row {
                return Err(Error::Cuda { op: op.into(), what: format!("rows {rows:?} cross the split at {split_row}") });
            }
            y.out = out.ptr_mut(stream);
            y.out_stride = u32_of(op, split_row)?;
            y.gelu_out = gelu_out.ptr_mut(stream);
            y.gelu_stride = u32_of(op, gelu_stride)?;
            // Rows are counted from the range's first: a range that starts at the split has no row below it.
            y.split_row = u32_of(op, split_row - rows.start)?;
            y.bias = bias.map_or(std::ptr::null(), |b| b.ptr(stream).wrapping_add(rows.start));
        }
    }
    let params = ffi::GptqMatmulParams {
        w: ffi::GptqMatrix {
            units: w.units.ptr(stream).wrapping_add(rows.start / UNIT_ROWS * tile_bytes),
            n: u32_of(op, n)?,
            k: u32_of(op, w.k)?,
            scales_per_row: u32_of(op, w.scales_per_row)?,
            has_zeros: u32::from(w.has_zeros),
        },
        x: a.x.ptr(stream),
        x_stride: u32_of(op, a.stride)?,
        tokens: u32_of(op, a.tokens)?,
        slices: u32_of(op, slices)?,
        y,
    };
    match kernel {
        MatmulKernel::Gemv => call!(gptq_gemv, stream, params),
        MatmulKernel::Gemm => call!(gptq_gemm, stream, params),
    }
}

/// K slices a product is cut into so that one fits `gptq_gemv`.
#[must_use]
pub fn slices(k: usize) -> usize {
    (k / UNIT_INPUTS).div_ceil(ffi::PEREGRINE_SLICE_UNITS as usize)
}

/// An AutoGPTQ matrix on the GPU, as raw bytes at offsets (multiples of 4) of one buffer.
pub struct RawGptq<'a> {
    /// Holds all of the following.
    pub bytes: &'a DevBuf<u8>,
    /// `[k / 8, n]` u32.
    pub qweight: usize,
    /// `[groups, n / 8]` u32.
    pub qzeros: usize,
    /// `[groups, n]` f16.
    pub scales: usize,
    /// `[k / 32]` u32: group of each 32 inputs after reordering.
    pub group: usize,
    /// `[k]` u32: source of each input after reordering.
    pub source_input: Option<usize>,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Number of groups; every value of `group` is below it.
    pub groups: usize,
    /// 1 (v1) or 0 (v2).
    pub zero_offset: u8,
}

/// `gptq_repack`: writes `raw` into rows `row0 ..` and inputs `input0 ..` of `w`.
#[allow(unsafe_code)]
pub fn gptq_repack(stream: &Stream, raw: &RawGptq<'_>, w: &mut Int4Matrix, row0: usize, input0: usize) -> Result<()> {
    let op = "gptq_repack";
    let base = raw.bytes.ptr(stream);
    let at = |offset: usize, bytes: usize| -> Result<*const u8> {
        raw.bytes.require(op, offset + bytes)?;
        if offset % 4 != 0 {
            return Err(Error::Cuda { op: op.into(), what: format!("offset {offset} is not a multiple of 4") });
        }
        Ok(base.wrapping_add(offset))
    };
    if row0 + raw.n > w.n || input0 + raw.k > w.k {
        return Err(Error::Cuda {
            op: op.into(),
            what: format!("[{}, {}] at ({row0}, {input0}) of [{}, {}]", raw.n, raw.k, w.n, w.k),
        });
    }
    w.units.require(op, w.n / UNIT_ROWS * (w.k / UNIT_INPUTS) * Int4Matrix::unit_bytes(w.scales_per_row, w.has_zeros))?;
    let params = ffi::GptqRepackParams {
        qweight: at(raw.qweight, raw.k / 8 * raw.n * 4)?.cast(),
        qzeros: at(raw.qzeros, raw.groups * (raw.n / 8) * 4)?.cast(),
        scales: at(raw.scales, raw.groups * raw.n * 2)?.cast(),
        group: at(raw.group, raw.k / 32 * 4)?.cast(),
        source_input: raw.source_input.map_or(Ok(std::ptr::null()), |o| at(o, raw.k * 4))?.cast(),
        n: u32_of(op, raw.n)?,
        k: u32_of(op, raw.k)?,
        row0: u32_of(op, row0)?,
        input0: u32_of(op, input0)?,
        matrix_k: u32_of(op, w.k)?,
        scales_per_row: u32_of(op, w.scales_per_row)?,
        has_zeros: u32::from(w.has_zeros),
        zero_offset: u32::from(raw.zero_offset),
        units: w.units.ptr_mut(stream),
    };
    call!(gptq_repack, stream, params)
}

/// `table_repack`: row-major f16 `rows x k` at the start of `table` to the units of rows `row0 ..`.
#[allow(unsafe_code)]
pub fn table_repack(stream: &Stream, table: &DevBuf<u8>, rows: usize, k: usize, units: &mut DevBuf<u16>, row0: usize) -> Result<()> {
    let op = "table_repack";
    table.require(op, rows * k * 2)?;
    units.require(op, (row0 + rows) * k)?;
    let params = ffi::TableRepackParams {
        table: table.ptr(stream).cast(),
        units: units.ptr_mut(stream),
        rows: u32_of(op, rows)?,
        k: u32_of(op, k)?,
        row0: u32_of(op, row0)?,
    };
    call!(table_repack, stream, params)
}

/// The f16 table of embedding and head, in units.
pub struct Table {
    /// `[vocab / 16][hidden / 64][1024]` f16.
    pub units: DevBuf<u16>,
    /// Rows.
    pub vocab: usize,
    /// Inputs.
    pub hidden: usize,
}

/// Where `embed` finds its ids.
#[derive(Clone, Copy)]
pub enum Ids<'a> {
    /// `[tokens]` u32, each below the vocabulary's size.
    List(&'a DevBuf<u32>),
    /// The token of the decode state.
    State(&'a DevBuf<u32>),
}

/// `embed`: `x[m] = table[ids[m]]`, f32.
#[allow(unsafe_code)]
pub fn embed(stream: &Stream, table: &Table, ids: Ids<'_>, tokens: usize, x: &mut DevBuf<f32>) -> Result<()> {
    let op = "embed";
    table.units.require(op, table.vocab * table.hidden)?;
    x.require(op, tokens * table.hidden)?;
    let ids = match ids {
        Ids::List(ids) => {
            ids.require(op, tokens)?;
            ids.ptr(stream)
        }
        Ids::State(state) => {
            state.require(op, STATE_TOKEN + tokens)?;
            state.ptr(stream).wrapping_add(STATE_TOKEN)
        }
    };
    let params = ffi::EmbedParams {
        units: table.units.ptr(stream),
        ids,
        x: x.ptr_mut(stream),
        tokens: u32_of(op, tokens)?,
        hidden: u32_of(op, table.hidden)?,
        vocab: u32_of(op, table.vocab)?,
    };
    call!(embed, stream, params)
}

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
) -> Result<()> {
    let op = "layernorm";
    let hidden = norm.weight.len();
    norm.bias.require(op, hidden)?;
    x.require(op, tokens * hidden)?;
    out.require(op, tokens * hidden)?;
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

/// `permute`: `out[m, i] = x[m, source[i]]`; every `source[i]` is below its length.
#[allow(unsafe_code)]
pub fn permute(stream: &Stream, x: &DevBuf<u16>, source: &DevBuf<u32>, tokens: usize, out: &mut DevBuf<u16>) -> Result<()> {
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
    /// Decode state; its first word is the position of the first token.
    pub state: &'a DevBuf<u32>,
    /// Tokens of the call. The caller has checked that position + tokens <= max_context.
    pub tokens: usize,
    /// Positions the cache and the rotary table have room for.
    pub max_context: usize,
}

impl Span<'_> {
    fn position(&self, op: &str, stream: &Stream) -> Result<*const u32> {
        self.state.require(op, STATE_WORDS)?;
        Ok(self.state.ptr(stream).wrapping_add(STATE_POSITION))
    }
}

/// `rope`: rotates the queries of `qkv [tokens, heads + 2, 64]` in place, the key into the cache, copies the value there.
/// `table [max_context, 32, 2]` holds cos and sin.
#[allow(unsafe_code)]
pub fn rope(stream: &Stream, qkv: &mut DevBuf<u16>, heads: usize, cache: &mut LayerCache, table: &DevBuf<f32>, span: Span<'_>) -> Result<()> {
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
        position: span.position(op, stream)?,
        tokens: u32_of(op, span.tokens)?,
        heads: u32_of(op, heads)?,
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

    /// Bytes of device memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.partials.bytes() + self.arrivals.bytes()
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
) -> Result<ffi::AttnParams> {
    qkv.require(op, span.tokens * (heads + 2) * HEAD_DIM)?;
    cache.k.require(op, span.max_context * HEAD_DIM)?;
    cache.v.require(op, span.max_context * HEAD_DIM)?;
    output.out.require(op, output.first + span.tokens.saturating_sub(1) * output.stride + heads * HEAD_DIM)?;
    Ok(ffi::AttnParams {
        qkv: qkv.ptr(stream),
        k_cache: cache.k.ptr(stream),
        v_cache: cache.v.ptr(stream),
        position: span.position(op, stream)?,
        out: output.out.ptr_mut(stream).wrapping_add(output.first),
        tokens: u32_of(op, span.tokens)?,
        heads: u32_of(op, heads)?,
        out_stride: u32_of(op, output.stride)?,
        max_context: u32_of(op, span.max_context)?,
        ..Default::default()
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
    let mut params = attn_params(op, stream, qkv, heads, cache, span, output)?;
    let groups = span.tokens * heads.div_ceil(UNIT_ROWS);
    let chunks = span.max_context.div_ceil(ATTN_CHUNK);
    scratch.partials.require(op, groups * chunks * UNIT_ROWS * ATTN_ROW_FLOATS)?;
    scratch.arrivals.require(op, groups)?;
    params.partials = scratch.partials.ptr_mut(stream);
    params.arrivals = scratch.arrivals.ptr_mut(stream);
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

/// `head`: logits `[tokens, vocab]` f32 of rows `first ..` of `x [.., hidden]`, at most [`GEMV_TOKENS`] tokens.
#[allow(unsafe_code)]
pub fn head(stream: &Stream, table: &Table, x: &DevBuf<u16>, first: usize, tokens: usize, logits: &mut DevBuf<f32>) -> Result<()> {
    let op = "head";
    table.units.require(op, table.vocab * table.hidden)?;
    x.require(op, (first + tokens) * table.hidden)?;
    logits.require(op, tokens * table.vocab)?;
    let params = ffi::HeadParams {
        units: table.units.ptr(stream),
        x: x.ptr(stream).wrapping_add(first * table.hidden),
        logits: logits.ptr_mut(stream),
        tokens: u32_of(op, tokens)?,
        hidden: u32_of(op, table.hidden)?,
        vocab: u32_of(op, table.vocab)?,
    };
    call!(head, stream, params)
}

/// What the sampler keeps on the GPU from step to step.
pub struct SamplerState {
    /// Position, token, step, length of the history.
    pub state: DevBuf<u32>,
    /// Every token so far.
    history: DevBuf<u32>,
    /// One bit an id: it is in the history.
    seen: DevBuf<u32>,
    /// Processed logits.
    scratch: DevBuf<f32>,
    /// Where tokens arrive on the host.
    pub tokens: MappedTokens,
}

impl SamplerState {
    /// For a history of up to `history_capacity` tokens.
    pub fn new(gpu: &super::Gpu, stream: &Stream, vocab: usize, history_capacity: usize) -> Result<SamplerState> {
        Ok(SamplerState {
            state: DevBuf::zeros(stream, "decode state", STATE_WORDS)?,
            history: DevBuf::zeros(stream, "history", history_capacity)?,
            seen: DevBuf::zeros(stream, "seen tokens", vocab.div_ceil(32))?,
            scratch: DevBuf::zeros(stream, "sampler scratch", vocab)?,
            tokens: MappedTokens::new(gpu, 64)?,
        })
    }

    /// Sets the position of the next call.
    pub fn set_position(&mut self, stream: &Stream, position: usize) -> Result<()> {
        self.state.upload(stream, STATE_POSITION, &[u32_of("position", position)?])
    }
}

/// `start`: makes `history` the sampler's history, for a generation whose first token follows what was prefilled.
#[allow(unsafe_code)]
pub fn start(stream: &Stream, sampler: &mut SamplerState, history: &[u32], vocab: usize) -> Result<()> {
    let op = "start";
    sampler.history.upload(stream, 0, history)?;
    sampler.seen.require(op, vocab.div_ceil(32))?;
    sampler.state.require(op, STATE_WORDS)?;
    let length = u32_of(op, history.len())?;
    let params = ffi::StartParams {
        history: sampler.history.ptr(stream),
        seen: sampler.seen.ptr_mut(stream),
        state: sampler.state.ptr_mut(stream).cast(),
        length,
        // `sample` counts up: after the first token the position is that of the token, the length of the history.
        position: length.wrapping_sub(1),
        vocab: u32_of(op, vocab)?,
    };
    call!(start, stream, params)
}

/// `sample`: chooses a token from row 0 of `logits [vocab]` and advances the state.
#[allow(unsafe_code)]
pub fn sample(stream: &Stream, sampler: &mut SamplerState, logits: &DevBuf<f32>, vocab: usize, sampling: &Sampling) -> Result<()> {
    let op = "sample";
    logits.require(op, vocab)?;
    sampler.scratch.require(op, vocab)?;
    sampler.seen.require(op, vocab.div_ceil(32))?;
    sampler.state.require(op, STATE_WORDS)?;
    let params = ffi::SampleParams {
        logits: logits.ptr(stream),
        scratch: sampler.scratch.ptr_mut(stream),
        history_capacity: u32_of(op, sampler.history.len())?,
        history: sampler.history.ptr_mut(stream),
        seen: sampler.seen.ptr_mut(stream),
        state: sampler.state.ptr_mut(stream).cast(),
        out_capacity: u32_of(op, sampler.tokens.capacity())?,
        out: sampler.tokens.ptr_mut()?.cast(),
        vocab: u32_of(op, vocab)?,
        top_k: u32::try_from(sampling.top_k).unwrap_or(u32::MAX),
        no_repeat_ngram_size: u32::try_from(sampling.no_repeat_ngram_size).unwrap_or(u32::MAX),
        seed_low: sampling.seed as u32,
        seed_high: (sampling.seed >> 32) as u32,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
    };
    call!(sample, stream, params)
}

/// `unpack_check`: the number of (code, activation) pairs for which this GPU's tensor cores do not keep subnormals.
#[allow(unsafe_code)]
pub fn unpack_check(stream: &Stream) -> Result<u32> {
    let mut mismatches = DevBuf::<u32>::zeros(stream, "mismatches", 1)?;
    call!(unpack_check, stream, ffi::UnpackCheckParams { mismatches: mismatches.ptr_mut(stream) })?;
    Ok(mismatches.download(stream, 0, 1)?[0])
}

/// `stream_read`: reads all of `data` once with `blocks` blocks; gives the exclusive or of its words by way of `mix [1]`.
#[allow(unsafe_code)]
pub fn stream_read(stream: &Stream, data: &DevBuf<u8>, mix: &mut DevBuf<u32>, blocks: usize) -> Result<()> {
    let op = "stream_read";
    mix.require(op, 1)?;
    let params = ffi::StreamReadParams {
        data: data.ptr(stream),
        mix: mix.ptr_mut(stream),
        bytes: data.len() as u64,
        blocks: u32_of(op, blocks)?,
    };
    call!(stream_read, stream, params)
}
