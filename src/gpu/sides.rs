//! The two sides of L2, and memory that is laid out by them.
//!
//! L2 of a Hopper GPU has two halves, with half of the multiprocessors at each; what lies behind the other half takes longer, and the link
//! between them is narrower than both. The side of a byte is the parity of some bits of its physical address. Those within a page are an
//! address' own and found here by measuring ([`ops::sides`]); the others add one unknown bit a page, measured for each. The driver takes
//! some 30 us to show a page, whatever its size: pages are as large as they are found to be one piece of memory. Nothing but
//! speed depends on any of it: where a measurement leaves a doubt, there are no sides, and buffers lie anywhere.

mod judge;

use std::sync::{Arc, OnceLock, PoisonError};

use cudarc::driver::sys::CUdevice_attribute;

use super::buffer::{DevBuf, with_size};
use super::context::{Stream, driver_error};
use super::ops::{self, SideTimes};
use super::pages::{self, Memory, Page, Range, Spares, UNIT_BYTES};
use crate::error::{Error, Result};
use crate::layout::PIECE_BYTES;
use judge::{judge, side_of_page};

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
