//! Quantised products: `gptq_gemv`, `gptq_batch`, `gptq_gemm`.

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::{AttnScratch, Int4Matrix, call, check, launch_on, u32_of};
use crate::error::{Error, Result};
use crate::layout::UNIT_INPUTS;
use crate::planes;

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
        /// `gelu_out` gets [planes](crate::planes), if the activations are some: rows of `gelu_stride` inputs.
        planes: bool,
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
}

impl NextProduct<'_> {
    fn params(&self, op: &str, stream: &Stream) -> Result<ffi::GptqNext> {
        if self.slices == 0 {
            return Err(Error::Cuda { op: op.into(), what: "the next product has no slices".into() });
        }
        Ok(ffi::GptqNext {
            w: self.w.product_params(op, stream, &(0..self.w.n), self.slices)?,
            slices: u32_of(op, self.slices)?,
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

/// Activations of a product: `[tokens, stride]` f16, or [planes](crate::planes).
#[derive(Clone, Copy)]
pub struct Activations<'a> {
    /// The values.
    pub x: &'a DevBuf<u16>,
    /// Values between two tokens.
    pub stride: usize,
    /// Tokens.
    pub tokens: usize,
    /// They are planes, for a [`MatmulKernel::Batch`] of 9 to 16 tokens whose matrix [takes them](gptq_batch_planes).
    pub planes: bool,
    /// For [`MatmulKernel::Batch`] right behind an `attn_decode` of as many tokens whose output is
    /// [`awaited`](super::AttnOutput::awaited): its scratch. It writes the [last inputs](Int4Matrix::with_attn_input); those before were there
    /// before it, so the product overtakes it in a step that is captured (`src/gpu/overtake.rs`).
    pub attention: Option<&'a AttnScratch>,
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
        MatmulOutput::Split {
            out,
            gelu_out,
            gelu_stride,
            split_row,
            planes,
            bias,
            announced: _,
            next: _,
        } => {
            out.require(op, tokens * split_row)?;
            if planes {
                gelu_out.require(op, planes::len(gelu_stride.max(rows.end.saturating_sub(split_row))))?;
            } else if rows.end > split_row {
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
            y.planes = u32::from(planes);
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
    let matrix = w.product_params(op, stream, &rows, slices)?;
    if a.tokens == 0 || a.stride < w.k {
        return Err(Error::Cuda {
            op: op.into(),
            what: format!("{} tokens of {} inputs, wanted {}", a.tokens, a.stride, w.k),
        });
    }
    a.x.require(op, if a.planes { planes::len(a.stride) } else { (a.tokens - 1) * a.stride + w.k })?;
    let (announce, next) = neighbours(op, stream, kernel, a.tokens, &output)?;
    let y = output_params(op, stream, w.n, &rows, a.tokens, slices, output)?;
    let ready = match a.attention {
        Some(scratch) if kernel == MatmulKernel::Batch => scratch.ready(op, stream, a.tokens)?,
        Some(_) => return Err(Error::Cuda { op: op.into(), what: "it does not await attention".into() }),
        None => std::ptr::null_mut(),
    };
    let overtakes = a.attention.is_some() && stream.can_overtake();
    let split = if kernel == MatmulKernel::Gemm { stream.split_sums()? } else { None };
    let by_copy = kernel == MatmulKernel::Batch && !matrix.near.is_null();
    let params = ffi::GptqMatmulParams {
        w: matrix,
        x: a.x.ptr(stream),
        x_stride: u32_of(op, a.stride)?,
        tokens: u32_of(op, a.tokens)?,
        slices: u32_of(op, slices)?,
        planes: u32::from(a.planes),
        y,
        // Written by the kernel; kernels of one stream run in order, and nothing else has these pointers.
        split_sums: split.map_or(std::ptr::null_mut(), |s| s.sums.ptr(stream).cast_mut()),
        split_flags: split.map_or(std::ptr::null_mut(), |s| s.flags.ptr(stream).cast_mut()),
        ready,
        overtakes: u32::from(overtakes),
        announce,
        next,
        claims: if by_copy { w.claims(stream) } else { ffi::SideClaims::default() },
    };
    if (a.planes || params.y.planes != 0) && kernel != MatmulKernel::Batch {
        return Err(Error::Cuda {
            op: op.into(),
            what: "got planes of bytes, wanted rows of f16: gptq_batch alone takes planes".into(),
        });
    }
    match kernel {
        MatmulKernel::Gemv => call!(gptq_gemv, stream, params),
        MatmulKernel::Batch => call!(gptq_batch, stream, params),
        MatmulKernel::Gemm => call!(gptq_gemm, stream, params),
    }?;
    if overtakes { stream.overtake() } else { Ok(()) }
}

/// Whether `gptq_batch` of 9 to 16 tokens takes [planes](crate::planes) for `w`: on sm_90a, one scale for 64 inputs, no zero points.
///
/// # Errors
/// The driver fails, or `w` is broken.
#[allow(unsafe_code)]
pub fn gptq_batch_planes(stream: &Stream, w: &Int4Matrix) -> Result<bool> {
    let matrix = w.params("gptq_batch", stream, &(0..w.n))?;
    launch_on(stream)?; // the device it asks about is the thread's
    // SAFETY: reads one struct, which says a shape; its pointers are not followed.
    Ok(unsafe { ffi::gptq_batch_planes(&raw const matrix) } == 1)
}

/// K slices a product is cut into so that one fits `gptq_gemv`.
#[must_use]
pub fn slices(k: usize) -> usize {
    (k / UNIT_INPUTS).div_ceil(ffi::PEREGRINE_SLICE_UNITS as usize)
}
