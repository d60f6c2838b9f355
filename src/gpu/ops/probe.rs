//! What is asked of a GPU, not of a model: `unpack_check`, `sides`, `stream_read`, `mma_peak`.

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::{call, check, launch_on, u32_of};
use crate::error::Result;
use crate::layout::PIECE_BYTES;

/// What `unpack_check` found of a GPU's tensor cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exactness {
    /// f16 subnormals are kept, in every product of a code and an activation: all kernels of quantised weights need that.
    pub subnormals: bool,
    /// Sums that f32 can hold are exact, all that were tried: `decode_step` needs that.
    pub sums: bool,
}

/// `unpack_check`: what this GPU's tensor cores give exactly.
#[allow(unsafe_code)]
pub fn unpack_check(stream: &Stream) -> Result<Exactness> {
    let mut exact = DevBuf::<u32>::zeros(stream, "exact products and sums", 2)?;
    call!(unpack_check, stream, ffi::UnpackCheckParams { exact: exact.ptr_mut(stream) })?;
    let counted = exact.download(stream, 0, 2)?;
    Ok(Exactness {
        subnormals: counted[0] == ffi::PEREGRINE_UNPACK_PRODUCTS,
        sums: counted[1] == ffi::PEREGRINE_UNPACK_SUMS,
    })
}

const _: () = assert!(PIECE_BYTES == ffi::PEREGRINE_PIECE_BYTES as usize);

/// What a multiprocessor found in [`sides`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SideTimes {
    /// Its number.
    pub smid: u32,
    /// Cycles of each piece.
    pub cycles: Vec<u32>,
}

/// `sides`: how many cycles atomics on each of the `pieces` of `data` (in units of [`PIECE_BYTES`]) take each of `blocks`
/// multiprocessors. Waits for the answer.
#[allow(unsafe_code)]
pub fn sides(
    stream: &Stream,
    data: &mut DevBuf<u8>,
    pieces: &[u32],
    blocks: usize,
) -> Result<Vec<SideTimes>> {
    let op = "sides";
    let pieces_of_data = pieces.iter().max().map_or(0, |&last| last as usize + 1);
    data.require(op, pieces_of_data * PIECE_BYTES)?;
    let count = pieces.len();
    let pieces = DevBuf::from_host(stream, "pieces", pieces)?;
    let mut cycles = DevBuf::<u32>::zeros(stream, "cycles", blocks * count)?;
    let mut smid = DevBuf::<u32>::zeros(stream, "numbers of multiprocessors", blocks)?;
    let mut turn = DevBuf::<u32>::zeros(stream, "turn", 1)?;
    let params = ffi::SidesParams {
        data: data.ptr_mut(stream).cast(),
        pieces: pieces.ptr(stream),
        cycles: cycles.ptr_mut(stream),
        smid: smid.ptr_mut(stream),
        turn: turn.ptr_mut(stream),
        count: u32_of(op, count)?,
        blocks: u32_of(op, blocks)?,
    };
    call!(sides, stream, params)?;
    let cycles = cycles.download(stream, 0, blocks * count)?;
    let smid = smid.download(stream, 0, blocks)?;
    let rows = cycles.chunks_exact(count.max(1)).map(<[u32]>::to_vec);
    Ok(smid.into_iter().zip(rows).map(|(smid, cycles)| SideTimes { smid, cycles }).collect())
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

/// `mma_peak`: `rounds` rounds of dense f16 products in each of `blocks` blocks; `sum [1]` keeps them.
#[allow(unsafe_code)]
pub fn mma_peak(stream: &Stream, sum: &mut DevBuf<f32>, rounds: usize, blocks: usize) -> Result<()> {
    let op = "mma_peak";
    sum.require(op, 1)?;
    let params = ffi::MmaPeakParams {
        sum: sum.ptr_mut(stream),
        flop: std::ptr::null_mut(),
        rounds: u32_of(op, rounds)?,
        blocks: u32_of(op, blocks)?,
    };
    call!(mma_peak, stream, params)
}

/// FLOP of a round of one block of [`mma_peak`], which differ with the GPU.
#[allow(unsafe_code)]
pub fn mma_peak_flop(stream: &Stream) -> Result<f64> {
    let mut flop = DevBuf::<f32>::zeros(stream, "flop", 2)?;
    let to = flop.ptr_mut(stream);
    let params = ffi::MmaPeakParams { sum: to.wrapping_add(1), flop: to, rounds: 1, blocks: 1 };
    call!(mma_peak, stream, params)?;
    Ok(f64::from(flop.download(stream, 0, 1)?[0]))
}
