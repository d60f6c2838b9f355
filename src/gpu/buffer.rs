//! Device memory, pinned staging for uploads, and the pinned words the sampler writes tokens to.

use std::time::{Duration, Instant};

use cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr, PinnedHostSlice, ValidAsZeroBits};

use super::context::{Event, Gpu, Stream, driver_error};
use super::pages::Memory;
use crate::error::{Error, Result};
use crate::sampler::Sampled;

/// A run of device memory with a name for error messages.
pub struct DevBuf<T> {
    pub(super) slice: Memory<T>,
    pub(super) name: &'static str,
    /// Elements in front and behind that are not part of it: see [`DevBuf::guarded`].
    pub(super) margin: usize,
}

impl<T: DeviceRepr + ValidAsZeroBits + Copy> DevBuf<T> {
    /// `elems` zeros.
    ///
    /// # Errors
    /// [`Error::OutOfGpuMemory`] with the buffer's name and size.
    pub fn zeros(stream: &Stream, name: &'static str, elems: usize) -> Result<DevBuf<T>> {
        let made = stream.inner.alloc_zeros(elems);
        let slice =
            made.map_err(|e| with_size(stream, name, elems * size_of::<T>(), driver_error(name, e)))?;
        Ok(DevBuf { slice: Memory::of_slice(slice), name, margin: 0 })
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
        self.slice.len() - 2 * self.margin
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of device memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.len() * size_of::<T>()) as u64
    }

    /// Copies `host` to elements `first ..`; waits until the copy is done with `host`.
    pub fn upload(&mut self, stream: &Stream, first: usize, host: &[T]) -> Result<()> {
        if host.is_empty() {
            return Ok(());
        }
        let (name, len, margin) = (self.name, self.len(), self.margin);
        let wrong = || Error::Cuda {
            op: format!("upload to {name}"),
            what: format!("elements {first}..{} of {len}", first + host.len()),
        };
        if first + host.len() > len {
            return Err(wrong());
        }
        let place = margin + first..margin + first + host.len();
        let mut view = self.slice.try_slice_mut(place).ok_or_else(wrong)?;
        stream.inner.memcpy_htod(host, &mut view).map_err(|e| driver_error(name, e))
    }

    /// Elements `first .. first + count`, after everything queued before.
    pub fn download(&self, stream: &Stream, first: usize, count: usize) -> Result<Vec<T>> {
        let wrong = || Error::Cuda {
            op: format!("download of {}", self.name),
            what: format!("elements {first}..{} of {}", first + count, self.len()),
        };
        if first + count > self.len() {
            return Err(wrong());
        }
        let place = self.margin + first..self.margin + first + count;
        let view = self.slice.try_slice(place).ok_or_else(wrong)?;
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
        (pointer as *const T).wrapping_add(self.margin)
    }

    pub(super) fn ptr_mut(&mut self, stream: &Stream) -> *mut T {
        let (pointer, _guard) = self.slice.device_ptr_mut(&stream.inner);
        (pointer as *mut T).wrapping_add(self.margin)
    }
}

/// If memory ran out: by whom, how much was wanted, how much there is.
pub(super) fn with_size(stream: &Stream, name: &str, bytes: usize, error: Error) -> Error {
    match error {
        Error::OutOfGpuMemory { .. } => Error::OutOfGpuMemory {
            what: name.into(),
            needed_bytes: bytes as u64,
            free_bytes: stream.inner.context().mem_get_info().ok().map(|(free, _)| free as u64),
        },
        other => other,
    }
}

/// Two pinned host buffers that take turns: one is filled while the other is copied to the GPU.
pub struct Staging {
    halves: [(PinnedHostSlice<u8>, Event); 2],
    turn: usize,
    /// Before and behind each copy.
    copies: Vec<(Event, Event)>,
    fill_time: Duration,
    wait_time: Duration,
}

impl Staging {
    /// Bytes of one half: large enough for full speed, small beside a checkpoint.
    pub const HALF_BYTES: usize = 32 << 20;

    /// Allocates the two halves.
    pub fn new(gpu: &Gpu, stream: &Stream) -> Result<Staging> {
        let half = || -> Result<(PinnedHostSlice<u8>, Event)> {
            Ok((pinned(gpu, Self::HALF_BYTES)?, stream.record(false)?))
        };
        Ok(Staging {
            halves: [half()?, half()?],
            turn: 0,
            copies: Vec::new(),
            fill_time: Duration::ZERO,
            wait_time: Duration::ZERO,
        })
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
        let began = Instant::now();
        event.wait()?; // the copy that used this half two turns ago
        self.wait_time += began.elapsed();
        let host = half.as_mut_slice().map_err(|e| driver_error("staging", e))?;
        let Some(host) = host.get_mut(..bytes) else {
            return Err(Error::Cuda {
                op: "staging".into(),
                what: format!("{bytes} bytes, wanted at most {}", Self::HALF_BYTES),
            });
        };
        let began = Instant::now();
        fill(host);
        self.fill_time += began.elapsed();
        let before = stream.record(true)?;
        to.upload(stream, first, host)?;
        self.copies.push((before, stream.record(true)?));
        stream.record_again(event)
    }

    /// How long the halves were being filled, and how long that had to wait for copies.
    #[must_use]
    pub fn host_times(&self) -> (Duration, Duration) {
        (self.fill_time, self.wait_time)
    }

    /// How long the copies took on the GPU, all of which must be done.
    pub fn copy_time(&self) -> Result<Duration> {
        total_time(&self.copies)
    }
}

/// The time between the events of each pair, all of them reached, in all.
pub fn total_time(spans: &[(Event, Event)]) -> Result<Duration> {
    spans.iter().try_fold(Duration::ZERO, |sum, (start, end)| {
        Ok(sum + Duration::from_secs_f32(end.milliseconds_since(start)?.max(0.0) / 1e3))
    })
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

/// Words of a `SampledToken`: id, log probability, fault, emitted, drafts, step.
const TOKEN_WORDS: usize = 6;

/// A token that has arrived from the GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrival {
    /// The token.
    pub sampled: Sampled,
    /// Its place in its step: 0 for a step's first, then one more for each draft that was right.
    pub row: usize,
    /// Drafts of its step.
    pub drafts: usize,
}

/// Rings of `SampledToken` in pinned host memory, one a slot: the sampler kernel writes, the host reads without a copy.
pub struct MappedTokens {
    /// Of `_words`, whose own accessors wait for an event, which a stream that is being captured cannot.
    base: *mut u32,
    slots: usize,
    capacity: usize,
    _words: PinnedHostSlice<u32>,
}

// SAFETY: `base` points into `_words`, which is `Send` and moves along; the memory itself stays where it is.
#[allow(unsafe_code)]
unsafe impl Send for MappedTokens {}

impl MappedTokens {
    /// Room for `capacity` tokens a slot.
    pub fn new(gpu: &Gpu, slots: usize, capacity: usize) -> Result<MappedTokens> {
        let mut words: PinnedHostSlice<u32> = pinned(gpu, slots * capacity * TOKEN_WORDS)?;
        words.as_mut_slice().map_err(|e| driver_error("tokens", e))?.fill(0);
        let base = words.as_mut_ptr().map_err(|e| driver_error("tokens", e))?;
        Ok(MappedTokens { base, slots, capacity, _words: words })
    }

    /// Tokens a slot has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Refuses a slot that is not there.
    fn first_word(&self, slot: usize) -> Result<usize> {
        if slot < self.slots {
            return Ok(slot * self.capacity * TOKEN_WORDS);
        }
        Err(Error::Cuda { op: "tokens".into(), what: format!("slot {slot} of {}", self.slots) })
    }

    pub(super) fn slot_mut(&mut self, slot: usize) -> Result<*mut u32> {
        Ok(self.base.wrapping_add(self.first_word(slot)?))
    }

    /// The tokens of one step of a slot, of which token `first` (from 1) of the generation is the first; none if the slot was done
    /// before. The caller has waited for an event behind the `sample` of that step.
    pub fn arrived(&self, slot: usize, first: usize) -> impl Iterator<Item = Result<Arrival>> + '_ {
        let count = self.words(slot, first).map_or(1, |words| words.map_or(0, |words| words[3] as usize));
        (0..count.min(self.capacity)).filter_map(move |row| self.read(slot, first, row).transpose())
    }

    /// Token `first + row` of the generation.
    fn read(&self, slot: usize, first: usize, row: usize) -> Result<Option<Arrival>> {
        let Some([id, logprob, fault, _, drafts, _]) = self.words(slot, first + row)? else {
            return Ok(None);
        };
        if fault > 0 {
            return Err(Error::Cuda {
                op: "sample".into(),
                what: format!(
                    "the logit of token {} is not a finite number: damaged weights or an overflow",
                    fault - 1
                ),
            });
        }
        let sampled = Sampled { id, logprob: f32::from_bits(logprob) };
        Ok(Some(Arrival { sampled, row, drafts: drafts as usize }))
    }

    /// The words of token `step` (from 1), if it is there.
    #[allow(unsafe_code)]
    fn words(&self, slot: usize, step: usize) -> Result<Option<[u32; TOKEN_WORDS]>> {
        let at = self.first_word(slot)? + step.wrapping_sub(1) % self.capacity * TOKEN_WORDS;
        let words: [u32; TOKEN_WORDS] = std::array::from_fn(|i| {
            // SAFETY: `at + i` < slots * capacity * TOKEN_WORDS, the length of `_words`, by `first_word` and the modulo.
            let address = unsafe { self.base.add(at + i) };
            // SAFETY: aligned and in bounds as above; volatile, since the GPU writes this memory behind the compiler's back.
            unsafe { address.read_volatile() }
        });
        Ok((step > 0 && words[5] as usize == step).then_some(words))
    }
}

/// What a block of `decode_step` waited for in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepFault {
    /// 1 + what was waited for, see `DecodeFault` in `cuda/kernels.h`.
    pub fault: u32,
    /// Of the model.
    pub layer: u32,
    /// Of the kernel.
    pub block: u32,
}

/// Words of a `DecodeFault`.
const FAULT_WORDS: usize = 3;

/// A `DecodeFault` in pinned host memory: `decode_step` writes it before it gives up, and it can be read when the GPU is lost.
pub struct MappedFault {
    /// Of `_words`; see [`MappedTokens`].
    base: *mut u32,
    _words: PinnedHostSlice<u32>,
}

// SAFETY: as of `MappedTokens`.
#[allow(unsafe_code)]
unsafe impl Send for MappedFault {}

impl MappedFault {
    /// No fault.
    pub fn new(gpu: &Gpu) -> Result<MappedFault> {
        let mut words: PinnedHostSlice<u32> = pinned(gpu, FAULT_WORDS)?;
        words.as_mut_slice().map_err(|e| driver_error("decode fault", e))?.fill(0);
        let base = words.as_mut_ptr().map_err(|e| driver_error("decode fault", e))?;
        Ok(MappedFault { base, _words: words })
    }

    pub(super) fn ptr_mut(&mut self) -> *mut u32 {
        self.base
    }

    /// The fault, if there was one.
    #[must_use]
    #[allow(unsafe_code)]
    pub fn get(&self) -> Option<StepFault> {
        let [fault, layer, block] = std::array::from_fn(|i| {
            // SAFETY: `i` < FAULT_WORDS = 3, the length of `_words`.
            let address = unsafe { self.base.add(i) };
            // SAFETY: aligned and in bounds as above; volatile, since the GPU writes this memory behind the compiler's back.
            unsafe { address.read_volatile() }
        });
        (fault > 0).then_some(StepFault { fault, layer, block })
    }
}
