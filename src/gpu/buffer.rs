//! Device memory, pinned staging for uploads, and the pinned words the sampler writes tokens to.

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr, PinnedHostSlice, ValidAsZeroBits};

use super::context::{Event, Gpu, Stream, driver_error};
use crate::error::{Error, Result};
use crate::sampler::Sampled;

/// A run of device memory with a name for error messages.
pub struct DevBuf<T> {
    slice: CudaSlice<T>,
    name: &'static str,
}

impl<T: DeviceRepr + ValidAsZeroBits + Copy> DevBuf<T> {
    /// `elems` zeros.
    ///
    /// # Errors
    /// [`Error::OutOfGpuMemory`] with the buffer's name and size.
    pub fn zeros(stream: &Stream, name: &'static str, elems: usize) -> Result<DevBuf<T>> {
        let slice = stream.inner.alloc_zeros(elems).map_err(|e| match driver_error(name, e) {
            Error::OutOfGpuMemory { .. } => Error::OutOfGpuMemory {
                what: name.into(),
                needed_bytes: (elems * size_of::<T>()) as u64,
                free_bytes: stream.inner.context().mem_get_info().ok().map(|(free, _)| free as u64),
            },
            other => other,
        })?;
        Ok(DevBuf { slice, name })
    }

    /// A copy of `host`.
    pub fn from_host(stream: &Stream, name: &'static str, host: &[T]) -> Result<DevBuf<T>> {
        let mut buffer = DevBuf::zeros(stream, name, host.len())?;
        buffer.upload(stream, 0, host)?;
        Ok(buffer)
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slice.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slice.is_empty()
    }

    /// Bytes of device memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.slice.len() * size_of::<T>()) as u64
    }

    /// Copies `host` to elements `first ..`; waits until the copy is done with `host`.
    pub fn upload(&mut self, stream: &Stream, first: usize, host: &[T]) -> Result<()> {
        if host.is_empty() {
            return Ok(());
        }
        let (name, len) = (self.name, self.slice.len());
        let mut view = self.slice.try_slice_mut(first..first + host.len()).ok_or_else(|| Error::Cuda {
            op: format!("upload to {name}"),
            what: format!("elements {first}..{} of {len}", first + host.len()),
        })?;
        stream.inner.memcpy_htod(host, &mut view).map_err(|e| driver_error(name, e))
    }

    /// Elements `first .. first + count`, after everything queued before.
    pub fn download(&self, stream: &Stream, first: usize, count: usize) -> Result<Vec<T>> {
        let view = self.slice.try_slice(first..first + count).ok_or_else(|| Error::Cuda {
            op: format!("download of {}", self.name),
            what: format!("elements {first}..{} of {}", first + count, self.slice.len()),
        })?;
        let host = stream.inner.clone_dtoh(&view).map_err(|e| driver_error(self.name, e))?;
        stream.synchronize()?;
        Ok(host)
    }

    /// Refuses a buffer with fewer than `wanted` elements; what a launcher's pointer arithmetic rests on.
    pub(super) fn require(&self, op: &str, wanted: usize) -> Result<()> {
        if self.len() >= wanted {
            return Ok(());
        }
        Err(Error::Cuda {
            op: op.into(),
            what: format!("{} has {} elements, wanted {wanted}", self.name, self.len()),
        })
    }

    pub(super) fn ptr(&self, stream: &Stream) -> *const T {
        let (pointer, _guard) = self.slice.device_ptr(&stream.inner);
        pointer as *const T
    }

    pub(super) fn ptr_mut(&mut self, stream: &Stream) -> *mut T {
        let (pointer, _guard) = self.slice.device_ptr_mut(&stream.inner);
        pointer as *mut T
    }
}

/// Two pinned host buffers that take turns: one is filled while the other is copied to the GPU.
pub struct Staging {
    halves: [(PinnedHostSlice<u8>, Event); 2],
    turn: usize,
}

impl Staging {
    /// Bytes of one half: large enough for full speed, small beside a checkpoint.
    pub const HALF_BYTES: usize = 32 << 20;

    /// Allocates the two halves.
    pub fn new(gpu: &Gpu, stream: &Stream) -> Result<Staging> {
        let half = || -> Result<(PinnedHostSlice<u8>, Event)> {
            Ok((pinned(gpu, Self::HALF_BYTES)?, stream.record(false)?))
        };
        Ok(Staging { halves: [half()?, half()?], turn: 0 })
    }

    /// Lets `fill` write up to `bytes` (at most [`Staging::HALF_BYTES`]) and copies them to bytes `first ..` of `to`.
    pub fn copy(
        &mut self,
        stream: &Stream,
        to: &mut DevBuf<u8>,
        first: usize,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let (half, event) = &mut self.halves[self.turn];
        self.turn ^= 1;
        event.wait()?; // the copy that used this half two turns ago
        let host = half.as_mut_slice().map_err(|e| driver_error("staging", e))?;
        let Some(host) = host.get_mut(..bytes) else {
            return Err(Error::Cuda {
                op: "staging".into(),
                what: format!("{bytes} bytes, wanted at most {}", Self::HALF_BYTES),
            });
        };
        fill(host);
        to.upload(stream, first, host)?;
        stream.record_again(event)
    }
}

#[allow(unsafe_code)]
fn pinned<T: DeviceRepr>(gpu: &Gpu, elems: usize) -> Result<PinnedHostSlice<T>> {
    // Flag 0, not cudarc's default of write-combined memory, which is very slow to read.
    // SAFETY: the memory is unset; both users are plain integers, for which any bits are a value.
    let made = unsafe { gpu.context.alloc_pinned_with_flags(elems, 0) };
    made.map_err(|e| match driver_error("pinned host memory", e) {
        // It is the host's memory that ran out here.
        Error::OutOfGpuMemory { .. } => {
            Error::Io("not enough host memory that can be pinned for uploads".into())
        }
        other => other,
    })
}

/// Words of a `SampledToken`: id, log probability, fault, step.
const TOKEN_WORDS: usize = 4;

/// A ring of `SampledToken` in pinned host memory: the sampler kernel writes, the host reads without a copy.
pub struct MappedTokens {
    words: PinnedHostSlice<u32>,
    capacity: usize,
}

impl MappedTokens {
    /// Room for `capacity` tokens.
    pub fn new(gpu: &Gpu, capacity: usize) -> Result<MappedTokens> {
        let mut words: PinnedHostSlice<u32> = pinned(gpu, capacity * TOKEN_WORDS)?;
        words.as_mut_slice().map_err(|e| driver_error("tokens", e))?.fill(0);
        Ok(MappedTokens { words, capacity })
    }

    /// Tokens it has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub(super) fn ptr_mut(&mut self) -> Result<*mut u32> {
        self.words.as_mut_ptr().map_err(|e| driver_error("tokens", e))
    }

    /// The token of `step` (from 1). The caller has waited for an event behind the `sample` launch of that step.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the logits were not all numbers, or the step's token is not there.
    #[allow(unsafe_code)]
    pub fn read(&self, step: u32) -> Result<Sampled> {
        let at = (step as usize - 1) % self.capacity * TOKEN_WORDS;
        let base = self.words.as_ptr().map_err(|e| driver_error("tokens", e))?;
        let word = |i: usize| {
            // SAFETY: `at + i` < capacity * TOKEN_WORDS by the modulo above, the length the words were allocated with.
            let address = unsafe { base.add(at + i) };
            // SAFETY: aligned and in bounds as above; volatile, since the GPU writes this memory behind the compiler's back.
            unsafe { address.read_volatile() }
        };
        if word(3) != step {
            return Err(Error::Cuda {
                op: "sample".into(),
                what: format!("token of step {step} is missing"),
            });
        }
        match word(2) {
            0 => Ok(Sampled { id: word(0), logprob: f32::from_bits(word(1)) }),
            fault => Err(Error::Cuda {
                op: "sample".into(),
                what: format!(
                    "the logit of token {} is not a finite number: damaged weights or an overflow",
                    fault - 1
                ),
            }),
        }
    }
}
