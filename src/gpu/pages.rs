//! Device memory in pages, and addresses that show it: the driver's virtual memory management.
//!
//! [`Page`] is memory without an address, [`Range`] shows some in an order of choice, [`Memory`] is what a buffer lies in. [`Spares`] are
//! pages of which is known on which side of L2 they are ([`super::sides`]).

use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUdevice_attribute, CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc,
    CUmemAllocationGranularity_flags, CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationType,
    CUmemGenericAllocationHandle, CUmemLocation, CUmemLocationType,
};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream};

use super::context::{Stream, driver_error};
use crate::error::{Error, Result};

/// What pages come in multiples of: what the GPU translates at once, so that within it bits of an address are bits of the memory's own.
pub(super) const UNIT_BYTES: usize = 2 << 20;

/// What the operations are called in errors.
const OP: &str = "mapping memory";

fn location(context: &CudaContext) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: context.cu_device() }
}

fn properties(context: &CudaContext) -> CUmemAllocationProp {
    CUmemAllocationProp {
        type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: location(context),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

/// Whether there are pages on this GPU, in multiples of [`UNIT_BYTES`].
#[allow(unsafe_code)]
pub(super) fn supported(context: &CudaContext) -> Result<bool> {
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED;
    if context.attribute(attribute).map_err(|e| driver_error(OP, e))? != 1 {
        return Ok(false);
    }
    context.bind_to_thread().map_err(|e| driver_error(OP, e))?;
    let (properties, mut bytes) = (properties(context), 0);
    let least = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    // SAFETY: the driver is there, as it gave the context, and has the function, as `Gpu::open` asked for one of CUDA 13; it reads one
    // struct and writes one integer.
    let asked = unsafe { sys::cuMemGetAllocationGranularity(&raw mut bytes, &raw const properties, least) };
    asked.result().map_err(|e| driver_error(OP, e))?;
    Ok(bytes == UNIT_BYTES)
}

/// Some device memory, which no address shows by itself.
pub(super) struct Page {
    handle: CUmemGenericAllocationHandle,
    bytes: usize,
}

impl Page {
    /// `bytes` of memory, a multiple of [`UNIT_BYTES`], whatever is in it.
    ///
    /// # Errors
    /// [`Error::OutOfGpuMemory`]
    #[allow(unsafe_code)]
    pub(super) fn make(context: &CudaContext, bytes: usize) -> Result<Arc<Page>> {
        context.bind_to_thread().map_err(|e| driver_error(OP, e))?;
        let (properties, mut handle) = (properties(context), 0);
        // SAFETY: as in `supported`; a size that is none is refused.
        let made = unsafe { sys::cuMemCreate(&raw mut handle, bytes, &raw const properties, 0) };
        made.result().map_err(|e| driver_error(OP, e))?;
        Ok(Arc::new(Page { handle, bytes }))
    }
}

impl Drop for Page {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the handle is of `make`, and given back here alone. Addresses that show the page keep its memory themselves.
        // A driver that will not take it back has lost the GPU, and says so elsewhere.
        let _ = unsafe { sys::cuMemRelease(self.handle) };
    }
}

/// Addresses at which pages are seen, one after the other.
pub(super) struct Range {
    address: CUdeviceptr,
    /// Of the addresses.
    bytes: usize,
    /// Bytes at which pages are seen by now: all, once it is made.
    shown: usize,
    pages: Vec<Arc<Page>>,
    stream: Arc<CudaStream>,
}

impl Range {
    /// Shows the pages, for work on `stream`, at an address that is a multiple of two of them.
    #[allow(unsafe_code)]
    pub(super) fn map(stream: &Stream, pages: Vec<Arc<Page>>) -> Result<Range> {
        let context = stream.inner.context();
        context.bind_to_thread().map_err(|e| driver_error(OP, e))?;
        let bytes = pages.iter().map(|page| page.bytes).sum();
        let (alignment, mut address) = (pages.first().map_or(0, |page| 2 * page.bytes), 0);
        // SAFETY: the driver is there, as it gave the pages; it writes one integer.
        let reserved = unsafe { sys::cuMemAddressReserve(&raw mut address, bytes, alignment, 0, 0) };
        reserved.result().map_err(|e| driver_error(OP, e))?;
        let mut range = Range { address, bytes, shown: 0, pages, stream: Arc::clone(&stream.inner) };
        for page in &range.pages {
            let at = range.address + range.shown as CUdeviceptr;
            // SAFETY: the page's bytes from `at` on were reserved above, among those of all, and show nothing yet; `page` holds its handle.
            let mapped = unsafe { sys::cuMemMap(at, page.bytes, 0, page.handle, 0) };
            mapped.result().map_err(|e| driver_error(OP, e))?;
            range.shown += page.bytes;
        }
        let flags = CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = CUmemAccessDesc { location: location(context), flags };
        // SAFETY: all of the range shows pages by now; one descriptor is read.
        let allowed = unsafe { sys::cuMemSetAccess(range.address, bytes, &raw const access, 1) };
        allowed.result().map_err(|e| driver_error(OP, e))?;
        Ok(range)
    }
}

impl Drop for Range {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // Whatever fails here has lost the GPU, and says so elsewhere.
        let _ = self.stream.context().bind_to_thread();
        let _ = self.stream.synchronize();
        if self.shown > 0 {
            // SAFETY: these addresses show pages since `map`, and all work on them is done, waited for above.
            let _ = unsafe { sys::cuMemUnmap(self.address, self.shown) };
        }
        // SAFETY: reserved by `map`, given back here alone, and nothing is seen there any more.
        let _ = unsafe { sys::cuMemAddressFree(self.address, self.bytes) };
    }
}

/// What a buffer lies in: memory of the driver's allocator, or a range of pages.
pub(super) struct Memory<T> {
    slice: ManuallyDrop<CudaSlice<T>>,
    /// Where the slice lies, if not in memory of its own.
    range: Option<Range>,
}

impl<T> Memory<T> {
    /// The allocator's.
    pub(super) fn of_slice(slice: CudaSlice<T>) -> Memory<T> {
        Memory { slice: ManuallyDrop::new(slice), range: None }
    }
}

impl Memory<u8> {
    /// The first `bytes` of a range, whatever is in them.
    #[allow(unsafe_code)]
    pub(super) fn of_range(range: Range, bytes: usize) -> Result<Memory<u8>> {
        if bytes > range.shown {
            let what = format!("{bytes} bytes of a range of {}", range.shown);
            return Err(Error::Cuda { op: OP.into(), what });
        }
        // SAFETY: there are `bytes` bytes, checked above, for as long as the range lives, which stays beside the slice; any bits are a u8.
        let slice = unsafe { range.stream.upgrade_device_ptr::<u8>(range.address, bytes) };
        Ok(Memory { slice: ManuallyDrop::new(slice), range: Some(range) })
    }
}

impl<T> Deref for Memory<T> {
    type Target = CudaSlice<T>;
    fn deref(&self) -> &CudaSlice<T> {
        &self.slice
    }
}

impl<T> DerefMut for Memory<T> {
    fn deref_mut(&mut self) -> &mut CudaSlice<T> {
        &mut self.slice
    }
}

impl<T> Drop for Memory<T> {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: taken here alone, and nobody sees `self` behind its drop.
        let slice = unsafe { ManuallyDrop::take(&mut self.slice) };
        if self.range.is_some() {
            slice.leak(); // The range gives the memory back.
        }
    }
}

/// Pages to make buffers of, by the side of their first piece.
pub(super) struct Spares<P = Arc<Page>> {
    pub(super) of_side: [Vec<P>; 2],
    /// Pages that are not one piece of memory, so of no side.
    pub(super) unfit: Vec<P>,
    /// Units that are in the way of pages that would not be one piece.
    pub(super) fillers: Vec<P>,
}

impl<P> Default for Spares<P> {
    fn default() -> Spares<P> {
        Spares { of_side: [Vec::new(), Vec::new()], unfit: Vec::new(), fillers: Vec::new() }
    }
}

impl<P> Spares<P> {
    /// How many must be added, at least, for a buffer of `count` pages, which are of sides 0, 1, 0, 1, ...
    pub(super) fn lacking(&self, count: usize) -> usize {
        let [even, odd] = &self.of_side;
        count.div_ceil(2).saturating_sub(even.len()) + (count / 2).saturating_sub(odd.len())
    }

    /// The pages of such a buffer. Where a side is used up, one of the other side, or of none: the buffer is then as right, but not as
    /// fast. `None` if there are fewer than `count` in all.
    pub(super) fn take(&mut self, count: usize) -> Option<Vec<P>> {
        let Spares { of_side: [even, odd], unfit, .. } = self;
        if even.len() + odd.len() + unfit.len() < count {
            return None;
        }
        let taken = (0..count).map_while(|slot| match slot % 2 {
            0 => even.pop().or_else(|| unfit.pop()).or_else(|| odd.pop()),
            _ => odd.pop().or_else(|| unfit.pop()).or_else(|| even.pop()),
        });
        Some(taken.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spares(even: usize, odd: usize) -> Spares<usize> {
        Spares { of_side: [vec![0; even], vec![1; odd]], ..Spares::default() }
    }

    #[test]
    fn pages_alternate() {
        let mut spares = spares(5, 3);
        assert_eq!(spares.lacking(5), 0);
        assert_eq!(spares.take(5), Some(vec![0, 1, 0, 1, 0]));
        assert_eq!(spares.of_side.map(|pages| pages.len()), [2, 1]);
    }

    #[test]
    fn what_lacks_is_counted_a_side() {
        assert_eq!(spares(0, 0).lacking(27), 27);
        assert_eq!(spares(14, 13).lacking(27), 0);
        assert_eq!(spares(20, 10).lacking(27), 3);
        assert_eq!(spares(10, 20).lacking(27), 4);
        assert_eq!(spares(0, 9).lacking(1), 1);
    }

    #[test]
    fn the_other_side_helps_out() {
        let mut one_sided = spares(0, 4);
        assert_eq!(one_sided.take(3), Some(vec![1, 1, 1]));
        assert_eq!(one_sided.take(2), None);
        assert_eq!(one_sided.of_side[1].len(), 1);
        let mut unfit = Spares { unfit: vec![2; 2], fillers: vec![3; 9], ..spares(1, 1) };
        assert_eq!(unfit.lacking(4), 2);
        assert_eq!(unfit.take(5), None);
        assert_eq!(unfit.take(4), Some(vec![0, 1, 2, 2]));
    }
}
