//! The words by which the blocks of a product take their shares of what lies by the sides of L2 (`cuda/claims.cuh`).

use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use crate::layout::PIECE_BYTES;

/// Sets of words, which launches take in turn. One's blocks claim their shares when those of the launch before have waited for all that is
/// in front of them: the one before that, which had these words, has ended.
const SETS: usize = 2;
/// From one set's words in a piece to the next one's.
const SET_BYTES: usize = 128;
/// Pairs of pieces behind a copy's, one of which has the words.
const SPARE_PAIRS: usize = 16;
const PAIR_BYTES: usize = 2 * PIECE_BYTES;

/// Words behind a copy, in the same buffer.
pub(super) struct Claims {
    /// Where their pair begins.
    words: usize,
    turn: AtomicUsize,
    side_of: [u32; 8],
}

impl Claims {
    /// Bytes of a buffer for a copy of so many pairs of pieces: with the spare ones, which stay zero.
    pub(super) fn bytes_with(pairs: usize) -> usize {
        if pairs == 0 { 0 } else { (pairs + SPARE_PAIRS) * PAIR_BYTES }
    }

    /// Behind a copy of `pairs` pairs of pieces.
    pub(super) fn behind(stream: &Stream, pairs: usize) -> Claims {
        let (mut mask, mut side_of) = (0, [0; 8]);
        if let Some(sides) = stream.sides() {
            mask = sides.mask();
            for smid in 0..u32::BITS * side_of.len() as u32 {
                side_of[(smid / u32::BITS) as usize] |=
                    sides.side_of(smid).unwrap_or(0) << (smid % u32::BITS);
            }
        }
        Claims { words: words_pair(pairs, mask) * PAIR_BYTES, turn: AtomicUsize::new(0), side_of }
    }

    /// The next set of words, of those in `pieces`.
    pub(super) fn next(&self, stream: &Stream, pieces: &DevBuf<u8>) -> ffi::SideClaims {
        let set = self.turn.fetch_add(1, Ordering::Relaxed) % SETS;
        // Written by the kernel. Two launches side by side that have one set end with a fault, and no share is multiplied that is none.
        let words = pieces.ptr(stream).wrapping_add(self.words + set * SET_BYTES).cast_mut();
        ffi::SideClaims { words: words.cast(), side_of: self.side_of }
    }
}

/// The first pair behind the copy's whose first piece is on side 0. Were there none, blocks would wait a little longer for their shares.
fn words_pair(pairs: usize, mask: u32) -> usize {
    let in_order = |pair: &usize| ((pair * PAIR_BYTES) as u32 & mask).count_ones().is_multiple_of(2);
    (pairs..pairs + SPARE_PAIRS).find(in_order).unwrap_or(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_lie_behind_the_copy_in_a_pair_whose_first_piece_is_on_side_0() {
        for mask in [0x2a_b000, 0xb_3000, 0x20_1000, u32::MAX, 0] {
            for pairs in [1, 37, 9360, 9504] {
                let pair = words_pair(pairs, mask);
                assert!((pairs * PAIR_BYTES..Claims::bytes_with(pairs)).contains(&(pair * PAIR_BYTES)));
                assert!(pair * PAIR_BYTES + PAIR_BYTES <= Claims::bytes_with(pairs));
                // The side of the pair's first piece, as `Sides::mask` has it.
                let side = ((pair * PAIR_BYTES) as u32 & mask).count_ones() % 2;
                assert!(side == 0 || mask == 0x20_1000, "{mask:#x} {pairs}: pair {pair}");
            }
        }
        const { assert!(SETS * SET_BYTES <= PIECE_BYTES) };
        assert_eq!(Claims::bytes_with(0), 0);
    }
}
