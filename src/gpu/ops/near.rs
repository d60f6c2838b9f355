//! Weights once more for products of more than 8 texts, in the order in which their blocks read them, by the sides of L2: `gptq_near` for
//! `gptq_batch` (`cuda/near.cuh`), `table_near` for `head` (`cuda/head_near.cuh`).

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::super::sides::Sides;
use super::claims::Claims;
use super::{Int4Matrix, Table, call, check, launch_on, u32_of};
use crate::error::Result;

/// The copy, and the words by which blocks take their shares of it.
pub(super) struct Near {
    pieces: DevBuf<u8>,
    claims: Claims,
    sides: u32,
}

impl Near {
    /// Bytes of a copy of so many pieces; 0 where there are no sides.
    fn bytes_of(stream: &Stream, pieces: u32) -> u64 {
        if stream.sides().is_some() { Claims::bytes_with(pieces as usize / 2) as u64 } else { 0 }
    }

    /// A copy of so many pieces, which `lay` fills: it gets their address, and by which bits they lie.
    fn new(stream: &Stream, pieces: u32, lay: impl FnOnce(*mut u8, u32) -> Result<()>) -> Result<Near> {
        let pairs = pieces as usize / 2; // two streams of as many
        let mut pieces = DevBuf::on_sides(stream, "weights for several texts", Claims::bytes_with(pairs))?;
        let sides = stream.sides().map_or(0, Sides::mask);
        lay(pieces.ptr_mut(stream), sides)?;
        // A product asks for weights before it waits for what is in front of it.
        stream.synchronize()?;
        Ok(Near { pieces, claims: Claims::behind(stream, pairs), sides })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.pieces.bytes()
    }

    pub(super) fn ptr(&self, stream: &Stream) -> *const u8 {
        self.pieces.ptr(stream)
    }

    /// The bits by which its pieces lie.
    pub(super) fn sides(&self) -> u32 {
        self.sides
    }

    /// The next set of words.
    pub(super) fn claims(&self, stream: &Stream) -> ffi::SideClaims {
        self.claims.next(stream, &self.pieces)
    }
}

/// Bytes of the copy of a matrix for products of `slices` slices; 0 where there is none: no sides, or another kernel.
pub(super) fn matrix_bytes(stream: &Stream, w: &Int4Matrix, slices: usize) -> Result<u64> {
    Ok(Near::bytes_of(stream, matrix_pieces(stream, w, slices)?))
}

#[allow(unsafe_code)]
fn matrix_pieces(stream: &Stream, w: &Int4Matrix, slices: usize) -> Result<u32> {
    let op = "gptq_near";
    let (matrix, slices) = (w.params(op, stream, &(0..w.n))?, u32_of(op, slices)?);
    launch_on(stream)?; // the device it asks about is the thread's
    // SAFETY: reads one struct, which says a shape; its pointers are not followed.
    Ok(unsafe { ffi::gptq_near_pieces(&raw const matrix, slices) })
}

/// `gptq_near`.
#[allow(unsafe_code)]
pub(super) fn lay_matrix(stream: &Stream, w: &Int4Matrix, slices: usize) -> Result<Near> {
    let op = "gptq_near";
    Near::new(stream, matrix_pieces(stream, w, slices)?, |to, sides| {
        let w = w.params(op, stream, &(0..w.n))?;
        let params = ffi::GptqNearParams { w, slices: u32_of(op, slices)?, to, sides };
        call!(gptq_near, stream, params)
    })
}

/// Bytes of the copy of a table; 0 where there is none: no sides, or another kernel.
pub(super) fn table_bytes(stream: &Stream, table: &Table) -> Result<u64> {
    Ok(Near::bytes_of(stream, table_pieces(stream, &table_params(stream, table)?)?))
}

fn table_params(stream: &Stream, table: &Table) -> Result<ffi::TableNearParams> {
    let op = "table_near";
    table.require(op)?;
    Ok(ffi::TableNearParams {
        units: table.units.ptr(stream),
        to: std::ptr::null_mut(),
        vocab: u32_of(op, table.vocab)?,
        hidden: u32_of(op, table.hidden)?,
        packed: u32::from(table.packed),
        sides: 0,
    })
}

#[allow(unsafe_code)]
fn table_pieces(stream: &Stream, params: &ffi::TableNearParams) -> Result<u32> {
    launch_on(stream)?; // the device it asks about is the thread's
    // SAFETY: reads one struct, which says a shape; its pointers are not followed.
    Ok(unsafe { ffi::table_near_pieces(&raw const *params) })
}

/// `table_near`.
#[allow(unsafe_code)]
pub(super) fn lay_table(stream: &Stream, table: &Table) -> Result<Near> {
    let params = table_params(stream, table)?;
    Near::new(stream, table_pieces(stream, &params)?, |to, sides| {
        let params = ffi::TableNearParams { to, sides, ..params };
        call!(table_near, stream, params)
    })
}
