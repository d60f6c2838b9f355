//! The two sides of L2, and memory that is laid out by them.
//!
//! L2 of a Hopper GPU has two halves, with half of the multiprocessors at each; what lies behind the other half takes longer, and the link
//! between them is narrower than both. The side of a byte is the parity of some bits of its physical address. Those within a page are an
//! address' own and found here by measuring ([`ops::sides`]); the others add one unknown bit a page, measured for each. The driver takes
//! some 30 us to show a page, whatever its size: pages are as large as they are found to be one piece of memory. Nothing but
//! speed depends on any of it: where a measurement leaves a doubt, there are no sides, and buffers lie anywhere.

use std::sync::{Arc, OnceLock, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUstreamCaptureStatus};

use super::buffer::{DevBuf, with_size};
use super::context::{Stream, driver_error};
use super::ops::{self, PIECE_BYTES, SideTimes};
use super::pages::{self, Memory, Page, Range, Spares, UNIT_BYTES};
use crate::error::{Error, Result};

/// Whose L2 is known to have two sides: Hopper.
const CAPABILITY: (i32, i32) = (9, 0);
/// GPUs of which the sides are kept, by number.
const GPUS: usize = 64;
/// Measurements by a size of pages before it is given up: what else runs on the GPU may disturb one.
const TRIES: usize = 4;
/// Pages that must be like the one that was measured.
const SAMPLES: usize = 16;
/// Of a page, the pieces by which a multiprocessor's side is told: as many of either parity, since they differ in bit 12.
const PROBES: [u32; 4] = [0, 1, 2, 3];
/// Sizes of pages, the best first.
const PAGE_BYTES: [usize; 3] = [4 * UNIT_BYTES, 2 * UNIT_BYTES, UNIT_BYTES];
const UNIT_PIECES: usize = UNIT_BYTES / PIECE_BYTES;
/// Bytes of pages that are made and measured at once, at least.
const BATCH_BYTES: usize = 128 << 20;
/// Batches for one buffer before its pages are taken as they come.
const BATCHES: usize = 8;
/// Length of [`Sides::block_of`].
const SMIDS: usize = 256;
/// Of a number that is none.
const NONE: u8 = u8::MAX;

/// Which multiprocessors are near which memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sides {
    mask: u32,
    page_bytes: usize,
    block_of: Vec<u8>,
    side_of: Vec<u8>,
}

impl Sides {
    /// The bits of an offset in a buffer of [`DevBuf::on_sides`] (or of an address in it) whose parity is the side of the byte that is
    /// there: bit 12, one from 21 on, and some between them. A piece of [`PIECE_BYTES`] is on one side, the next one on the other.
    #[must_use]
    pub fn mask(&self) -> u32 {
        self.mask
    }

    /// The block each multiprocessor (by its number `%smid`) should play in a kernel of one block a multiprocessor: even ones are near side
    /// 0, odd ones near side 1, as far as the sides have as many. Each block once; 255 for a number that no multiprocessor has. It
    /// has 256 values.
    #[must_use]
    pub fn block_of(&self) -> &[u8] {
        &self.block_of
    }

    /// The side of multiprocessor `smid`: 0 or 1.
    #[must_use]
    pub fn side_of(&self, smid: u32) -> Option<u32> {
        let side = *self.side_of.get(smid as usize)?;
        (side != NONE).then(|| u32::from(side))
    }

    /// Pages of alternating sides for so many bytes, of the stream's spares or new.
    fn pages(&self, stream: &Stream, bytes: usize) -> Result<Vec<Arc<Page>>> {
        let count = bytes.div_ceil(self.page_bytes);
        let mut spares = stream.spares.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..BATCHES {
            let lacking = spares.lacking(count);
            let batch = lacking.max(BATCH_BYTES / self.page_bytes);
            if lacking == 0 || !self.make_spares(stream, batch, &mut spares)? {
                break;
            }
        }
        let out_of_memory = Error::OutOfGpuMemory { what: String::new(), needed_bytes: 0, free_bytes: None };
        spares.take(count).ok_or(out_of_memory)
    }

    /// Adds `count` new pages, or as many as there is memory for: then false.
    fn make_spares(&self, stream: &Stream, count: usize, spares: &mut Spares) -> Result<bool> {
        let mut made = Vec::with_capacity(count);
        while made.len() < count {
            match Page::make(stream.inner.context(), self.page_bytes) {
                Ok(page) => made.push(page),
                Err(Error::OutOfGpuMemory { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        if made.is_empty() {
            return Ok(false);
        }
        let full = made.len() == count;
        let sides = self.measure(stream, &made)?;
        let mut unfit = 0;
        for (page, side) in made.into_iter().zip(sides) {
            match side {
                Some(side) => spares.of_side[side].push(page),
                None => {
                    spares.unfit.push(page);
                    unfit += 1;
                }
            }
        }
        if unfit > 0 && full {
            // The driver takes memory in order: one unit more, and the next pages begin elsewhere.
            spares.fillers.push(Page::make(stream.inner.context(), UNIT_BYTES)?);
        }
        Ok(full)
    }

    /// The side of the first piece of each page; `None` for one that is not one piece of memory.
    fn measure(&self, stream: &Stream, made: &[Arc<Page>]) -> Result<Vec<Option<usize>>> {
        let bytes = made.len() * self.page_bytes;
        let mut seen = buffer("spare pages", Range::map(stream, made.to_vec())?, bytes)?;
        // Two neighbours in each unit, which are on two sides: no threshold is needed to tell which is near.
        let units = (0..bytes / PIECE_BYTES).step_by(UNIT_PIECES);
        let pieces: Vec<u32> = units.flat_map(|first| [first as u32, first as u32 + 1]).collect();
        let times = ops::sides(stream, &mut seen, &pieces, 1)?;
        let pages = |times: &SideTimes| -> Vec<Option<usize>> {
            let near = self.side_of(times.smid).unwrap_or(0);
            let pages = times.cycles.chunks_exact(2 * self.page_bytes / UNIT_BYTES);
            pages.map(|cycles| side_of_page(self.mask, near, cycles)).collect()
        };
        Ok(times.first().map_or_else(Vec::new, pages))
    }
}

/// The side of a page's first piece, from the cycles of the first two pieces of each unit by a multiprocessor of side `near`; `None` if
/// the units contradict each other.
fn side_of_page(mask: u32, near: u32, cycles: &[u32]) -> Option<usize> {
    let units = cycles.chunks_exact(2).enumerate();
    let mut sides =
        units.map(|(unit, pair)| (pair[0] >= pair[1]) ^ parity(unit * UNIT_PIECES, mask) ^ (near == 1));
    let first = sides.next()?;
    sides.all(|side| side == first).then_some(usize::from(first))
}

/// The first `bytes` of a range, whatever is in them.
fn buffer(name: &'static str, range: Range, bytes: usize) -> Result<DevBuf<u8>> {
    Ok(DevBuf { slice: Memory::of_range(range, bytes)?, name, margin: 0 })
}

impl DevBuf<u8> {
    /// `bytes` zeros, laid out by the sides of L2: see [`Sides::mask`]. Without sides as [`DevBuf::zeros`].
    ///
    /// It takes pages of 2 to 8 MB, and leaves some with the stream for the next one: [`Stream::drop_spare_pages`] gives them back.
    ///
    /// # Errors
    /// [`Error::OutOfGpuMemory`] with the buffer's name and size.
    pub fn on_sides(stream: &Stream, name: &'static str, bytes: usize) -> Result<DevBuf<u8>> {
        let Some(sides) = stream.sides().filter(|_| bytes > 0) else {
            return DevBuf::zeros(stream, name, bytes);
        };
        let make = || -> Result<DevBuf<u8>> {
            let pages = sides.pages(stream, bytes)?;
            let mut made = buffer(name, Range::map(stream, pages)?, bytes)?;
            stream.inner.memset_zeros(&mut *made.slice).map_err(|e| driver_error(name, e))?;
            Ok(made)
        };
        make().map_err(|error| {
            stream.drop_spare_pages();
            with_size(stream, name, bytes, error)
        })
    }
}

static FOUND: [OnceLock<Option<Sides>>; GPUS] = [const { OnceLock::new() }; GPUS];

impl Stream {
    /// The sides of this GPU's L2; `None` if there is any doubt, or `PEREGRINE_NO_SIDES` is set. Measured when first asked for in a process,
    /// which waits for the stream; not on one that captures, which sees what was found before.
    #[must_use]
    pub fn sides(&self) -> Option<&'static Sides> {
        let found = FOUND.get(self.inner.context().ordinal())?;
        if found.get().is_none() && self.captures() {
            return None;
        }
        // What the driver would not do leaves no sides either.
        found.get_or_init(|| find(self).unwrap_or(None)).as_ref()
    }

    /// Gives back the pages that [`DevBuf::on_sides`] left over.
    pub fn drop_spare_pages(&self) {
        *self.spares.lock().unwrap_or_else(PoisonError::into_inner) = Spares::default();
    }

    fn captures(&self) -> bool {
        let status = self.inner.capture_status();
        !matches!(status, Ok(CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE))
    }
}

/// Measures a page, and the multiprocessors.
fn find(stream: &Stream) -> Result<Option<Sides>> {
    let context = stream.inner.context();
    let driver = |e| driver_error("reading the GPU's attributes", e);
    if crate::trace::switches().no_sides
        || context.compute_capability().map_err(driver)? != CAPABILITY
        || !pages::supported(context)?
    {
        return Ok(None);
    }
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let multiprocessors = usize::try_from(context.attribute(attribute).map_err(driver)?).unwrap_or(0);
    for page_bytes in PAGE_BYTES {
        // A page may lie across the border of two pieces of memory: each try begins a unit later.
        let mut fillers = Vec::new();
        for _ in 0..TRIES {
            if let Some(sides) = try_pages(stream, page_bytes, multiprocessors)? {
                return Ok(Some(sides));
            }
            fillers.push(Page::make(context, UNIT_BYTES)?);
        }
    }
    Ok(None)
}

/// Measures a page of that size, the multiprocessors, and whether other pages are like it.
fn try_pages(stream: &Stream, page_bytes: usize, multiprocessors: usize) -> Result<Option<Sides>> {
    let pages: Vec<_> =
        (0..SAMPLES).map(|_| Page::make(stream.inner.context(), page_bytes)).collect::<Result<_>>()?;
    let mut page = buffer("a page", Range::map(stream, pages[..1].to_vec())?, page_bytes)?;
    let pieces: Vec<u32> = (0..(page_bytes / PIECE_BYTES) as u32).collect();
    let by_one = ops::sides(stream, &mut page, &pieces, 1)?;
    let by_all = ops::sides(stream, &mut page, &PROBES, multiprocessors)?;
    let cycles = by_one.first().map_or(&[][..], |times| &times.cycles);
    let Some(sides) = judge(cycles, &by_all) else { return Ok(None) };
    let like_it = sides.measure(stream, &pages)?.iter().all(Option::is_some);
    Ok(like_it.then_some(sides))
}

/// The sides, from the cycles of each piece of a page by one multiprocessor, and of [`PROBES`] of the same page by each; `None` if anything
/// is doubtful. The page's first piece is on side 0.
fn judge(page: &[u32], times: &[SideTimes]) -> Option<Sides> {
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
