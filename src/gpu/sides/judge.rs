//! What the sides are, from measured times alone.

use super::{NONE, PIECE_BYTES, PROBES, SMIDS, SideTimes, Sides, UNIT_PIECES};

/// The sides, from the cycles of each piece of a page by one multiprocessor, and of [`PROBES`] of the same page by each; `None` if anything
/// is doubtful. The page's first piece is on side 0.
pub(super) fn judge(page: &[u32], times: &[SideTimes]) -> Option<Sides> {
    let mask = mask_of(page)?;
    let side_of = sides_of(mask, times)?;
    let page_bytes = page.len() * PIECE_BYTES;
    Some(Sides { mask, page_bytes, block_of: deal(&side_of, times.len())?, side_of })
}

fn parity(piece: usize, mask: u32) -> bool {
    ((piece * PIECE_BYTES) as u32 & mask).count_ones() % 2 == 1
}

/// Whether two times are clearly apart: a near atomic and a far one differ by a third of the lesser and more.
fn apart(near: u32, far: u32) -> bool {
    far.saturating_sub(near) > near / 16
}

/// The bits of [`Sides::mask`], from the cycles of each piece of a page: those within it, and the first one above, by which pages alternate.
fn mask_of(cycles: &[u32]) -> Option<u32> {
    let count = cycles.len();
    if count < UNIT_PIECES || !count.is_power_of_two() {
        return None;
    }
    let mut sorted = cycles.to_vec();
    sorted.sort_unstable();
    let near = sorted[count / 2 - 1];
    if !apart(near, sorted[count / 2]) {
        return None;
    }
    let far: Vec<bool> = cycles.iter().map(|&c| c > near).collect();
    let turns = |bit: usize| (0..count).filter(|i| far[*i] != far[i ^ bit]).count() > count / 2;
    let bits = (0..count.ilog2()).map(|bit| 1usize << bit).filter(|&bit| turns(bit));
    let mask = bits.chain([count]).fold(0, |mask, bit| mask | (bit * PIECE_BYTES) as u32);
    let right = (0..count).all(|i| (far[i] != far[0]) == parity(i, mask));
    (mask & PIECE_BYTES as u32 != 0 && right).then_some(mask)
}

/// The side of each multiprocessor, by its number.
fn sides_of(mask: u32, times: &[SideTimes]) -> Option<Vec<u8>> {
    let mut side_of = vec![NONE; SMIDS];
    let mut differences = Vec::new();
    for SideTimes { smid, cycles } in times {
        let mut sums = [0u32; 2];
        for (&piece, cycles) in PROBES.iter().zip(cycles) {
            sums[usize::from(parity(piece as usize, mask))] += cycles;
        }
        let side = u8::from(sums[1] < sums[0]);
        let [near, far] = if side == 0 { sums } else { [sums[1], sums[0]] };
        let place = side_of[..SMIDS - 1].get_mut(*smid as usize)?;
        if cycles.len() != PROBES.len() || *place != NONE || !apart(near, far) {
            return None;
        }
        *place = side;
        differences.push(far - near);
    }
    differences.sort_unstable();
    let median = *differences.get(differences.len() / 2)?;
    (differences[0] >= median / 2).then_some(side_of)
}

/// [`Sides::block_of`]: multiprocessors of side 0 get even blocks, those of side 1 odd ones, and who is left what is left.
fn deal(side_of: &[u8], blocks: usize) -> Option<Vec<u8>> {
    let of_side = |side: u8| (0..side_of.len()).filter(move |&smid| side_of[smid] == side);
    let fewest = of_side(0).count().min(of_side(1).count());
    let blocks = u8::try_from(blocks).ok().filter(|&blocks| fewest * 3 >= usize::from(blocks))?;
    let (mut block_of, mut left) = (vec![NONE; side_of.len()], Vec::new());
    let mut numbers = [0, 1].map(|side| (side..blocks).step_by(2));
    for (side, numbers) in (0..).zip(&mut numbers) {
        for smid in of_side(side) {
            match numbers.next() {
                Some(number) => block_of[smid] = number,
                None => left.push(smid),
            }
        }
    }
    for (smid, number) in left.into_iter().zip(numbers.into_iter().flatten()) {
        block_of[smid] = number;
    }
    Some(block_of)
}

/// The side of a page's first piece, from the cycles of the first two pieces of each unit by a multiprocessor of side `near`; `None` if
/// the units contradict each other.
pub(super) fn side_of_page(mask: u32, near: u32, cycles: &[u32]) -> Option<usize> {
    let units = cycles.chunks_exact(2).enumerate();
    let mut sides =
        units.map(|(unit, pair)| (pair[0] >= pair[1]) ^ parity(unit * UNIT_PIECES, mask) ^ (near == 1));
    let first = sides.next()?;
    sides.all(|side| side == first).then_some(usize::from(first))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// Bits 12, 13, 15, 17, 19: an H200's.
    const H200: u32 = 0xab000;

    /// A GPU for which atomics take some 300 cycles near and 500 far, and up to `noise` more.
    struct Fake {
        mask: u32,
        noise: u32,
        pieces: usize,
        side_of: Vec<bool>,
    }

    impl Fake {
        /// `ones` of `count` multiprocessors are on side 1: every other one, as long as there are.
        fn new(count: usize, ones: usize) -> Fake {
            let mut side_of: Vec<bool> = (0..count).map(|smid| smid % 2 == 1 && smid / 2 < ones).collect();
            let more = ones.saturating_sub(count / 2);
            side_of.iter_mut().filter(|side| !**side).take(more).for_each(|side| *side = true);
            Fake { mask: H200, noise: 40, pieces: UNIT_PIECES, side_of }
        }

        fn cycles(&self, smid: usize, piece: usize) -> u32 {
            let random = (smid as u32 * 512 + piece as u32).wrapping_mul(2_654_435_761) >> 8;
            let far = parity(piece, self.mask) != self.side_of[smid];
            300 + 200 * u32::from(far) + random % (self.noise + 1)
        }

        fn page(&self, smid: usize) -> Vec<u32> {
            (0..self.pieces).map(|piece| self.cycles(smid, piece)).collect()
        }

        fn times(&self) -> Vec<SideTimes> {
            let cycles = |smid| PROBES.iter().map(|&piece| self.cycles(smid, piece as usize)).collect();
            // In the order of blocks, which is not that of multiprocessors.
            let smids = (0..self.side_of.len()).rev();
            smids.map(|smid| SideTimes { smid: smid as u32, cycles: cycles(smid) }).collect()
        }

        fn judged(&self) -> Option<Sides> {
            let by_any = [0, 1, 5].map(|smid| judge(&self.page(smid), &self.times()));
            let [first, others @ ..] = by_any;
            // Whoever measured the page: side 0 is its first piece's.
            assert!(others.iter().all(|sides| *sides == first));
            first
        }
    }

    fn check(sides: &Sides, fake: &Fake) {
        let count = fake.side_of.len();
        assert_eq!(sides.block_of.len(), SMIDS);
        let mut blocks = sides.block_of[..count].to_vec();
        blocks.sort_unstable();
        assert!(blocks.iter().enumerate().all(|(i, &block)| i == usize::from(block)), "{blocks:?}");
        assert!(sides.block_of[count..].iter().all(|&block| block == NONE));
        for (smid, &side) in fake.side_of.iter().enumerate() {
            assert_eq!(sides.side_of(smid as u32), Some(u32::from(side)));
        }
        assert_eq!(sides.side_of(count as u32), None);
    }

    fn far_blocks(sides: &Sides, fake: &Fake) -> usize {
        let blocks = sides.block_of.iter().zip(&fake.side_of);
        blocks.filter(|(block, side)| (*block % 2 == 1) != **side).count()
    }

    #[test]
    fn halves_are_told() {
        for mask in [H200, 0xb3000] {
            let fake = Fake { mask, ..Fake::new(132, 66) };
            let sides = fake.judged().unwrap();
            assert_eq!(sides.mask(), mask | 1 << 21);
            check(&sides, &fake);
            assert_eq!(far_blocks(&sides, &fake), 0);
        }
    }

    #[test]
    fn larger_pages_have_more_bits() {
        for (mask, wanted) in
            [(H200, H200 | 1 << 23), (H200 | 1 << 21, H200 | 5 << 21), (H200 | 1 << 22, H200 | 3 << 22)]
        {
            let sides = Fake { mask, pieces: 4 * UNIT_PIECES, ..Fake::new(132, 66) }.judged().unwrap();
            assert_eq!((sides.mask(), sides.page_bytes), (wanted, 8 << 20));
        }
        let mut page = Fake { pieces: 4 * UNIT_PIECES, ..Fake::new(132, 66) }.page(0);
        page[2 * UNIT_PIECES..3 * UNIT_PIECES].reverse(); // the other side
        assert!(mask_of(&page).is_none(), "a page that is not one piece");
        let mask = H200 | 5 << 21;
        for near in [0, 1] {
            let other = 1 - near as usize;
            assert_eq!(
                side_of_page(mask, near, &[300, 500, 500, 300, 300, 500, 500, 300]),
                Some(near as usize)
            );
            assert_eq!(side_of_page(mask, near, &[500, 300, 300, 500, 500, 300, 300, 500]), Some(other));
            assert_eq!(side_of_page(mask, near, &[500, 300, 500, 300, 500, 300, 300, 500]), None);
        }
    }

    #[test]
    fn what_is_left_plays_what_is_left() {
        for (count, ones) in [(132, 70), (132, 62), (114, 58), (113, 56), (113, 57), (113, 50)] {
            let fake = Fake::new(count, ones);
            let sides = fake.judged().unwrap();
            check(&sides, &fake);
            assert_eq!(far_blocks(&sides, &fake), ones.abs_diff(count / 2), "{ones} of {count}");
        }
    }

    #[test]
    fn holes_have_no_block() {
        let fake = Fake::new(132, 66);
        let mut times = fake.times();
        times.retain(|times| ![7, 8, 131].contains(&times.smid));
        let sides = judge(&fake.page(0), &times).unwrap();
        assert_eq!((sides.block_of[7], sides.side_of(7), sides.block_of[131]), (NONE, None, NONE));
        let mut blocks: Vec<u8> = sides.block_of.iter().copied().filter(|&block| block != NONE).collect();
        blocks.sort_unstable();
        assert!(blocks.into_iter().eq(0..129));
    }

    #[test]
    fn doubts_leave_no_sides() {
        let good = Fake::new(132, 66);
        assert!(good.judged().is_some());
        assert!(Fake { noise: 2000, ..Fake::new(132, 66) }.judged().is_none(), "noise");
        assert!(Fake::new(132, 40).judged().is_none(), "fewer than a third on side 1");
        assert!(Fake::new(132, 132).judged().is_none(), "no other side");
        assert!(Fake { mask: 0xaa000, ..Fake::new(132, 66) }.judged().is_none(), "bit 12 is not of the mask");
        assert!(Fake { mask: 0, ..Fake::new(132, 66) }.judged().is_none(), "no mask");
        assert!(Fake::new(255, 127).judged().is_some());
        assert!(Fake::new(256, 128).judged().is_none(), "too many multiprocessors");

        let (page, times) = (good.page(0), good.times());
        let flat: Vec<u32> = page.iter().map(|cycles| 300 + cycles % 10).collect();
        assert!(judge(&flat, &times).is_none(), "no gap");
        let mut swapped = page.clone();
        swapped.swap(100, 101);
        assert!(judge(&swapped, &times).is_none(), "two pieces against the mask");
        let mut disturbed = page.clone();
        disturbed[0] += 200;
        assert!(judge(&disturbed, &times).is_none(), "a piece that was disturbed");
        assert!(judge(&page[..511], &times).is_none(), "a piece less");
        assert!(judge(&[], &[]).is_none());
        assert!(judge(&page, &[]).is_none());

        let with = |change: fn(&mut SideTimes)| {
            let mut times = good.times();
            change(&mut times[17]);
            judge(&page, &times)
        };
        assert!(with(|_| ()).is_some());
        assert!(with(|times| times.smid = 3).is_none(), "the same multiprocessor twice");
        assert!(with(|times| times.smid = 255).is_none(), "a number too high");
        assert!(with(|times| times.smid = u32::MAX).is_none(), "a number much too high");
        assert!(with(|times| times.cycles = vec![400; PROBES.len()]).is_none(), "near both sides");
        assert!(with(|times| times.cycles.truncate(2)).is_none(), "a probe less");
    }
}
