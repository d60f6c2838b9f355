//! `gptq_near`: a matrix once more for `gptq_batch`, in the order in which its blocks read it, by the sides of L2 (`cuda/near.cuh`).

use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::{Int4Matrix, call, check, launch_on, u32_of};
use crate::error::Result;
use crate::layout::PIECE_BYTES;

/// Sets of words, which products take in turn. One's blocks claim their shares when those of the product before have waited for all that is
/// in front of them: the one before that, which had these words, has ended.
const SETS: usize = 2;
/// From one set's words in a piece to the next one's.
const SET_BYTES: usize = 128;
/// Pairs of pieces behind the copy's, one of which has the words.
const SPARE_PAIRS: usize = 16;
const PAIR_BYTES: usize = 2 * PIECE_BYTES;

/// The copy, and the words by which blocks take their shares of it.
pub(super) struct Near {
    /// Those of the copy, and [`SPARE_PAIRS`].
    pieces: DevBuf<u8>,
    /// Where the words' pair begins.
    words: usize,
    turn: AtomicUsize,
    slices: usize,
    sides: u32,
    side_of: [u32; 8],
}

impl Near {
    /// Bytes of the copy for products of `slices` slices; 0 where there is none: no sides, or another kernel.
    pub(super) fn bytes_of(stream: &Stream, w: &Int4Matrix, slices: usize) -> Result<u64> {
        if stream.sides().is_none() {
            return Ok(0);
        }
        Ok(bytes(pairs(stream, w, slices)?) as u64)
    }

    #[allow(unsafe_code)]
    pub(super) fn copy(stream: &Stream, w: &Int4Matrix, slices: usize) -> Result<Near> {
        let op = "gptq_near";
        let pairs = pairs(stream, w, slices)?;
        let mut pieces = DevBuf::on_sides(stream, "weights for several texts", bytes(pairs))?;
        let (mut mask, mut side_of) = (0, [0; 8]);
        if let Some(sides) = stream.sides() {
            mask = sides.mask();
            for smid in 0..u32::BITS * side_of.len() as u32 {
                side_of[(smid / u32::BITS) as usize] |=
                    sides.side_of(smid).unwrap_or(0) << (smid % u32::BITS);
            }
        }
        let params = ffi::GptqNearParams {
            w: w.params(op, stream, &(0..w.n))?,
            slices: u32_of(op, slices)?,
            to: pieces.ptr_mut(stream),
            sides: mask,
        };
        call!(gptq_near, stream, params)?;
        // A product asks for weights before it waits for what is in front of it.
        stream.synchronize()?;
        let words = words_pair(pairs, mask) * PAIR_BYTES;
        Ok(Near { pieces, words, turn: AtomicUsize::new(0), slices, sides: mask, side_of })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.pieces.bytes()
    }

    /// Whether it was made for as many slices.
    pub(super) fn fits(&self, slices: usize) -> bool {
        self.slices == slices
    }

    pub(super) fn add_to(&self, matrix: &mut ffi::GptqMatrix, stream: &Stream) {
        matrix.near = self.pieces.ptr(stream);
        matrix.sides = self.sides;
    }

    /// The next set of words.
    pub(super) fn claims(&self, stream: &Stream) -> ffi::GptqClaims {
        let set = self.turn.fetch_add(1, Ordering::Relaxed) % SETS;
        // Written by the kernel. Two launches side by side that have one set end with a fault, and no share is multiplied that is none.
        let words = self.pieces.ptr(stream).wrapping_add(self.words + set * SET_BYTES).cast_mut();
        ffi::GptqClaims { words: words.cast(), side_of: self.side_of }
    }
}

/// Bytes of the buffer for a copy of so many pairs of pieces: with the spare ones, which stay zero.
fn bytes(pairs: usize) -> usize {
    if pairs == 0 { 0 } else { (pairs + SPARE_PAIRS) * PAIR_BYTES }
}

/// The first pair behind the copy's whose first piece is on side 0. Were there none, blocks would wait a little longer for their shares.
fn words_pair(pairs: usize, mask: u32) -> usize {
    let in_order = |pair: &usize| ((pair * PAIR_BYTES) as u32 & mask).count_ones().is_multiple_of(2);
    (pairs..pairs + SPARE_PAIRS).find(in_order).unwrap_or(pairs)
}

/// Pairs of pieces of the copy.
#[allow(unsafe_code)]
fn pairs(stream: &Stream, w: &Int4Matrix, slices: usize) -> Result<usize> {
    let op = "gptq_near";
    let (matrix, slices) = (w.params(op, stream, &(0..w.n))?, u32_of(op, slices)?);
    launch_on(stream)?; // the device it asks about is the thread's
    // SAFETY: reads one struct, which says a shape; its pointers are not followed.
    let pieces = unsafe { ffi::gptq_near_pieces(&raw const matrix, slices) };
    Ok(pieces as usize / 2) // two streams of as many
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_lie_behind_the_copy_in_a_pair_whose_first_piece_is_on_side_0() {
        for mask in [0x2a_b000, 0xb_3000, 0x20_1000, u32::MAX, 0] {
            for pairs in [1, 37, 9360, 9504] {
                let pair = words_pair(pairs, mask);
                assert!((pairs * PAIR_BYTES..bytes(pairs)).contains(&(pair * PAIR_BYTES)));
                assert!(pair * PAIR_BYTES + PAIR_BYTES <= bytes(pairs));
                // The side of the pair's first piece, as `Sides::mask` has it.
                let side = ((pair * PAIR_BYTES) as u32 & mask).count_ones() % 2;
                assert!(side == 0 || mask == 0x20_1000, "{mask:#x} {pairs}: pair {pair}");
            }
        }
        const { assert!(SETS * SET_BYTES <= PIECE_BYTES) };
        assert_eq!(bytes(0), 0);
    }
}
