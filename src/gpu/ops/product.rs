//! Quantised products, and making their weights: `gptq_gemv`, `gptq_batch`, `gptq_gemm`, `gptq_repack`,
//! `row_factors`.

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::{AttnScratch, call, check, launch_on, u32_of};
use crate::error::{Error, Result};
use crate::layout::{UNIT_CODE_BYTES, UNIT_INPUTS, UNIT_ROWS};

/// A quantised matrix [n, k] in units.
pub struct Int4Matrix {
    /// `[n / 16][k / 64][unit_bytes]`
    pub units: DevBuf<u8>,
    /// `[n / 16][8][2]` f16: rows g and g + 8; set by [`row_factors`], which follows the last [`gptq_repack`].
    pub row_factors: DevBuf<u16>,
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
    pub fn new(
        stream: &Stream,
        n: usize,
        k: usize,
        scales_per_row: usize,
        has_zeros: bool,
    ) -> Result<Int4Matrix> {
        let bytes = n / UNIT_ROWS * (k / UNIT_INPUTS) * Self::unit_bytes(scales_per_row, has_zeros);
        let units = DevBuf::zeros(stream, "weights", bytes)?;
        let row_factors = DevBuf::zeros(stream, "row factors", n)?;
        Ok(Int4Matrix { units, row_factors, n, k, scales_per_row, has_zeros })
    }

    /// Bytes of device memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.units.bytes() + self.row_factors.bytes()
    }

    /// Rows `rows`, after the buffers were found large enough.
    fn params(&self, op: &str, stream: &Stream, rows: &std::ops::Range<usize>) -> Result<ffi::GptqMatrix> {
        let tile_bytes = self.k / UNIT_INPUTS * Self::unit_bytes(self.scales_per_row, self.has_zeros);
        self.units.require(op, self.n / UNIT_ROWS * tile_bytes)?;
        self.row_factors.require(op, self.n)?;
        let whole_tiles = rows.start.is_multiple_of(UNIT_ROWS) && rows.end.is_multiple_of(UNIT_ROWS);
        if rows.start >= rows.end || rows.end > self.n || !whole_tiles {
            return Err(Error::Cuda { op: op.into(), what: format!("rows {rows:?} of {}", self.n) });
        }
        Ok(ffi::GptqMatrix {
            units: self.units.ptr(stream).wrapping_add(rows.start / UNIT_ROWS * tile_bytes),
            n: u32_of(op, rows.len())?,
            k: u32_of(op, self.k)?,
            scales_per_row: u32_of(op, self.scales_per_row)?,
            has_zeros: u32::from(self.has_zeros),
            row_factors: self.row_factors.ptr(stream).wrapping_add(rows.start).cast(),
        })
    }
}

/// Where a quantised product goes; see `GptqOutput` in `cuda/kernels.h`.
pub enum MatmulOutput<'a> {
    /// f32 sums of each K slice apart: `[slices, tokens, n]`.
    Partials(&'a mut DevBuf<f32>),
    /// Added to a residual, with the bias.
    Residual {
        /// `[tokens, n]` f32.
        x: &'a mut DevBuf<f32>,
        /// `[n]`.
        bias: Option<&'a DevBuf<f32>>,
    },
    /// f16: the rows below `split_row` as they are, the others through GELU.
    Split {
        /// `[tokens, split_row]`.
        out: &'a mut DevBuf<u16>,
        /// `[tokens, gelu_stride]`, of which each row's first `n - split_row` are written.
        gelu_out: &'a mut DevBuf<u16>,
        /// Values between two tokens in `gelu_out`.
        gelu_stride: usize,
        /// A multiple of 16.
        split_row: usize,
        /// `[n]` of the whole matrix.
        bias: Option<&'a DevBuf<f32>>,
        /// For [`MatmulKernel::Batch`] right in front of an `attn_decode` whose output is [`awaited`](super::AttnOutput::awaited): its
        /// scratch. It begins when the rows below `split_row` are there.
        announced: Option<&'a AttnScratch>,
        /// The product that reads all this: [`MatmulKernel::Batch`] on sm_90a brings its first weights into L2, so that it need not wait for
        /// memory. For a product of other weights, or none, it is some traffic in vain.
        next: Option<NextProduct<'a>>,
    },
}

/// A product by [`MatmulKernel::Batch`] that comes later in the stream, with as many tokens.
#[derive(Clone, Copy)]
pub struct NextProduct<'a> {
    /// Its matrix.
    pub w: &'a Int4Matrix,
    /// Its K slices.
    pub slices: usize,
    /// The first input that attention writes, if it begins before attention has ended: see [`Activations::attention`].
    pub attention: Option<usize>,
}

impl NextProduct<'_> {
    fn params(&self, op: &str, stream: &Stream) -> Result<ffi::GptqNext> {
        if self.slices == 0 {
            return Err(Error::Cuda { op: op.into(), what: "the next product has no slices".into() });
        }
        Ok(ffi::GptqNext {
            w: self.w.params(op, stream, &(0..self.w.n))?,
            slices: u32_of(op, self.slices)?,
            attn_input: u32_of(op, self.attention.unwrap_or(0))?,
        })
    }
}

/// Which kernel computes a quantised product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatmulKernel {
    /// `gptq_gemv`: at most [`GEMV_TOKENS`](super::GEMV_TOKENS) tokens, at the speed of memory.
    Gemv,
    /// `gptq_batch`: at most [`BATCH_TOKENS`](super::BATCH_TOKENS) tokens, near the speed of memory.
    Batch,
    /// `gptq_gemm`: any number.
    Gemm,
}

impl MatmulKernel {
    /// The fastest for the products of a prompt of so many tokens. 5 to 8 take 33 us a layer by `gptq_batch` on an H200, where `gptq_gemv`
    /// takes 51 for 8.
    #[must_use]
    pub fn of_prompt(tokens: usize) -> MatmulKernel {
        match tokens {
            0..=4 => MatmulKernel::Gemv,
            m if m <= super::BATCH_TOKENS => MatmulKernel::Batch,
            _ => MatmulKernel::Gemm,
        }
    }
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
    /// For [`MatmulKernel::Batch`] right behind an `attn_decode` of as many tokens whose output is
    /// [`awaited`](super::AttnOutput::awaited): its scratch, and the first input that it writes. Those before were there before it, so the
    /// product overtakes it in a step that is captured (`src/gpu/overtake.rs`).
    pub attention: Option<(&'a AttnScratch, usize)>,
}

/// Where the sums of rows `rows` go, after the buffers were found large enough for `tokens` tokens.
fn output_params(
    op: &str,
    stream: &Stream,
    matrix_n: usize,
    rows: &std::ops::Range<usize>,
    tokens: usize,
    slices: usize,
    output: MatmulOutput<'_>,
) -> Result<ffi::GptqOutput> {
    let n = rows.len();

    let mut y = ffi::GptqOutput::default();
    match output {
        MatmulOutput::Partials(partials) => {
            partials.require(op, slices * tokens * n)?;
            y.partials = partials.ptr_mut(stream);
        }
        MatmulOutput::Residual { x, bias } => {
            x.require(op, tokens * n)?;
            bias.map_or(Ok(()), |b| b.require(op, n))?;
            y.residual = x.ptr_mut(stream);
            y.bias = bias.map_or(std::ptr::null(), |b| b.ptr(stream));
        }
        MatmulOutput::Split { out, gelu_out, gelu_stride, split_row, bias, announced: _, next: _ } => {
            out.require(op, tokens * split_row)?;
            if rows.end > split_row {
                gelu_out.require(op, (tokens - 1) * gelu_stride + rows.end - split_row)?;
            }
            bias.map_or(Ok(()), |b| b.require(op, matrix_n))?;
            if rows.start != 0 && rows.start != split_row {
                return Err(Error::Cuda {
                    op: op.into(),
                    what: format!("rows {rows:?} cross the split at {split_row}"),
                });
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
    Ok(y)
}

/// The words of attention behind a product, if it announces its rows, and the product whose weights it brings into L2.
fn neighbours(
    op: &str,
    stream: &Stream,
    kernel: MatmulKernel,
    tokens: usize,
    output: &MatmulOutput<'_>,
) -> Result<(*mut u32, ffi::GptqNext)> {
    let none = (std::ptr::null_mut(), ffi::GptqNext::default());
    let MatmulOutput::Split { announced, next, .. } = output else { return Ok(none) };
    if kernel != MatmulKernel::Batch {
        return match announced {
            Some(_) => Err(Error::Cuda { op: op.into(), what: "it announces nothing to attention".into() }),
            None => Ok(none),
        };
    }
    let announce = announced.map_or(Ok(none.0), |scratch| scratch.ready(op, stream, tokens))?;
    let next = next.map_or(Ok(none.1), |next| next.params(op, stream))?;
    Ok((announce, next))
}

/// `gptq_gemv` / `gptq_batch` / `gptq_gemm`: `y[m, row] = sum_k x[m, k] W[row, k]` for rows `rows` of `w` (multiples of 16).
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
        MatmulKernel::Batch => "gptq_batch",
        MatmulKernel::Gemm => "gptq_gemm",
    };
    let matrix = w.params(op, stream, &rows)?;
    if a.tokens == 0 || a.stride < w.k {
        return Err(Error::Cuda {
            op: op.into(),
            what: format!("{} tokens of {} inputs, wanted {}", a.tokens, a.stride, w.k),
        });
    }
    a.x.require(op, (a.tokens - 1) * a.stride + w.k)?;
    let (announce, next) = neighbours(op, stream, kernel, a.tokens, &output)?;
    let y = output_params(op, stream, w.n, &rows, a.tokens, slices, output)?;
    let (ready, attn_input) = match a.attention {
        Some((scratch, first)) if kernel == MatmulKernel::Batch => {
            (scratch.ready(op, stream, a.tokens)?, u32_of(op, first)?)
        }
        Some(_) => return Err(Error::Cuda { op: op.into(), what: "it does not await attention".into() }),
        None => (std::ptr::null_mut(), 0),
    };
    let overtakes = a.attention.is_some() && stream.can_overtake();
    let split = if kernel == MatmulKernel::Gemm { stream.split_sums()? } else { None };
    let params = ffi::GptqMatmulParams {
        w: matrix,
        x: a.x.ptr(stream),
        x_stride: u32_of(op, a.stride)?,
        tokens: u32_of(op, a.tokens)?,
        slices: u32_of(op, slices)?,
        y,
        // Written by the kernel; kernels of one stream run in order, and nothing else has these pointers.
        split_sums: split.map_or(std::ptr::null_mut(), |s| s.sums.ptr(stream).cast_mut()),
        split_flags: split.map_or(std::ptr::null_mut(), |s| s.flags.ptr(stream).cast_mut()),
        ready,
        attn_input,
        overtakes: u32::from(overtakes),
        announce,
        next,
    };
    match kernel {
        MatmulKernel::Gemv => call!(gptq_gemv, stream, params),
        MatmulKernel::Batch => call!(gptq_batch, stream, params),
        MatmulKernel::Gemm => call!(gptq_gemm, stream, params),
    }?;
    if overtakes { stream.overtake() } else { Ok(()) }
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
    /// Number of groups.
    pub groups: usize,
    /// 1 (v1) or 0 (v2).
    pub zero_offset: u8,
}

/// `gptq_repack`: writes `raw` into rows `row0 ..` and inputs `input0 ..` of `w`.
#[allow(unsafe_code)]
pub fn gptq_repack(
    stream: &Stream,
    raw: &RawGptq<'_>,
    w: &mut Int4Matrix,
    row0: usize,
    input0: usize,
) -> Result<()> {
    let op = "gptq_repack";
    let base = raw.bytes.ptr(stream);
    let at = |offset: usize, bytes: usize| -> Result<*const u8> {
        raw.bytes.require(op, offset + bytes)?;
        if !offset.is_multiple_of(4) {
            return Err(Error::Cuda {
                op: op.into(),
                what: format!("offset {offset} is not a multiple of 4"),
            });
        }
        Ok(base.wrapping_add(offset))
    };
    if row0 + raw.n > w.n || input0 + raw.k > w.k {
        return Err(Error::Cuda {
            op: op.into(),
            what: format!("[{}, {}] at ({row0}, {input0}) of [{}, {}]", raw.n, raw.k, w.n, w.k),
        });
    }
    w.units.require(
        op,
        w.n / UNIT_ROWS * (w.k / UNIT_INPUTS) * Int4Matrix::unit_bytes(w.scales_per_row, w.has_zeros),
    )?;
    let params = ffi::GptqRepackParams {
        qweight: at(raw.qweight, raw.k / 8 * raw.n * 4)?.cast(),
        qzeros: at(raw.qzeros, raw.groups * (raw.n / 8) * 4)?.cast(),
        scales: at(raw.scales, raw.groups * raw.n * 2)?.cast(),
        group: at(raw.group, raw.k / 32 * 4)?.cast(),
        source_input: raw.source_input.map_or(Ok(std::ptr::null()), |o| at(o, raw.k * 4))?.cast(),
        n: u32_of(op, raw.n)?,
        k: u32_of(op, raw.k)?,
        groups: u32_of(op, raw.groups)?,
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

/// `row_factors`: sets those of `w`, of which all parts are there. Before that `gptq_batch` and
/// `gptq_gemm` give no sums.
#[allow(unsafe_code)]
pub fn row_factors(stream: &Stream, w: &mut Int4Matrix) -> Result<()> {
    let matrix = w.params("row_factors", stream, &(0..w.n))?;
    let params = ffi::RowFactorsParams { w: matrix, factors: w.row_factors.ptr_mut(stream).cast() };
    call!(row_factors, stream, params)
}
