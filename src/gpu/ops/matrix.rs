//! A quantised matrix on the GPU, and making it: `gptq_repack`, `row_factors`.

use std::sync::OnceLock;

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::near::{self, Near};
use super::{call, check, launch_on, u32_of};
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
    /// 0: attention writes none of the inputs.
    attn_input: usize,
    /// And for how many slices it was made.
    near: OnceLock<(Near, usize)>,
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
        let near = OnceLock::new();
        Ok(Int4Matrix { units, row_factors, n, k, scales_per_row, has_zeros, attn_input: 0, near })
    }

    /// Attention writes the inputs from `first` on, and none before: each slice of `gptq_batch` on Hopper ends with its share of them.
    #[must_use]
    pub fn with_attn_input(self, first: usize) -> Int4Matrix {
        Int4Matrix { attn_input: first, near: OnceLock::new(), ..self }
    }

    /// Bytes of the copy that [`Int4Matrix::lay_near`] would make; 0: none, or it is there.
    pub fn near_bytes(&self, stream: &Stream, slices: usize) -> Result<u64> {
        if self.near.get().is_some() { Ok(0) } else { near::matrix_bytes(stream, self, slices) }
    }

    /// Makes a copy of this matrix that `gptq_batch` reads faster in products of `slices` slices and 9 to 64 tokens, with the same sums; not
    /// where L2 has no sides. Waits for the stream. Products by it must not run side by side: they must be of one stream.
    pub fn lay_near(&self, stream: &Stream, slices: usize) -> Result<()> {
        if self.near_bytes(stream, slices)? > 0 {
            let near = near::lay_matrix(stream, self, slices)?;
            let _ = self.near.set((near, slices)); // somebody else was faster
        }
        Ok(())
    }

    /// Bytes of device memory, with the copy of [`Int4Matrix::lay_near`].
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.plain_bytes() + self.near.get().map_or(0, |(near, _)| near.bytes())
    }

    /// Bytes of device memory that a pass reads.
    #[must_use]
    pub fn plain_bytes(&self) -> u64 {
        self.units.bytes() + self.row_factors.bytes()
    }

    /// For a product that reads the copy of [`Int4Matrix::lay_near`]. Those that do not, ask for none: see `near`'s sets of words.
    pub(super) fn claims(&self, stream: &Stream) -> ffi::SideClaims {
        self.near.get().map_or(ffi::SideClaims::default(), |(near, _)| near.claims(stream))
    }

    /// The same for a product of `slices` slices, which may read the copy of [`Int4Matrix::lay_near`]: this program's own kernel, all rows.
    pub(super) fn product_params(
        &self,
        op: &str,
        stream: &Stream,
        rows: &std::ops::Range<usize>,
        slices: usize,
    ) -> Result<ffi::GptqMatrix> {
        let mut params = self.params(op, stream, rows)?;
        let near = self.near.get().filter(|(_, of)| *of == slices && *rows == (0..self.n));
        if let Some((near, _)) = near.filter(|_| super::is_built_in("gptq_batch")) {
            params.near = near.ptr(stream);
            params.sides = near.sides();
        }
        Ok(params)
    }

    /// Rows `rows`, after the buffers were found large enough.
    pub(super) fn params(
        &self,
        op: &str,
        stream: &Stream,
        rows: &std::ops::Range<usize>,
    ) -> Result<ffi::GptqMatrix> {
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
            attn_input: u32_of(op, self.attn_input)?,
            ..ffi::GptqMatrix::default()
        })
    }
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
    w.near = OnceLock::new(); // it would be a copy of what was there before
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
