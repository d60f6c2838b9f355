//! One GPU and the streams work is put on.
//!
//! The driver is loaded at run time: without it, [`Gpu::open`] says so in one line and nothing else of this module can be
//! reached. cudarc's own entry points panic when libcuda is missing, so its presence is asked for first.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use cudarc::driver::sys::{
    CUdevice_attribute, CUevent_flags, CUresult, CUstreamCaptureStatus, cuDriverGetVersion, is_culib_present,
};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};

use super::buffer::DevBuf;
use super::ffi;
use super::pages::Spares;
use crate::error::{Error, Result};

/// The oldest GPU there are kernels for (Ampere), as major * 10 + minor.
const MIN_CAPABILITY: i32 = 80;
/// The GPU whose kernels say when a successor may start (Hopper). Others run the PTX of sm_80, which does not: there the
/// stream must order the kernels.
const OVERLAP_CAPABILITY: i32 = 90;
/// The CUDA version whose runtime is linked in, as the driver counts it: it must be at least this new.
const MIN_DRIVER_VERSION: i32 = 13000;
const MIN_DRIVER: &str = "580 (CUDA 13.0)";

/// Turns a driver's code into this crate's error; `op` is what was being done.
pub(super) fn driver_error(op: &str, error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            Error::OutOfGpuMemory { what: op.into(), needed_bytes: 0, free_bytes: None }
        }
        // The enum's name alone: formatting a DriverError calls into the driver, which may be what failed.
        code => Error::Cuda { op: op.into(), what: format!("the CUDA driver said {code:?}") },
    }
}

/// The stream of the models of each GPU, by its number: see [`Gpu::shared_stream`].
static SHARED_STREAMS: Mutex<Vec<(usize, Weak<CudaStream>)>> = Mutex::new(Vec::new());

/// An opened GPU.
#[derive(Clone)]
pub struct Gpu {
    pub(super) context: Arc<CudaContext>,
    name: String,
    capability: i32,
}

impl Gpu {
    /// Opens GPU `ordinal` of those `CUDA_VISIBLE_DEVICES` leaves.
    ///
    /// # Errors
    /// [`Error::NoGpu`] if there is no driver, it is too old, or there is no such GPU or one older than sm_80.
    #[allow(unsafe_code)]
    pub fn open(ordinal: usize) -> Result<Gpu> {
        // SAFETY: loading libcuda runs its initialisers, which NVIDIA ships to be loaded by any program.
        if !unsafe { is_culib_present() } {
            return Err(Error::NoGpu(format!(
                "no CUDA driver: libcuda.so was not found; install an NVIDIA driver {MIN_DRIVER} or newer"
            )));
        }
        let mut version = 0;
        // SAFETY: libcuda is there, checked above; the call writes one integer and works before initialisation.
        let asked = unsafe { cuDriverGetVersion(&raw mut version) };
        if asked == CUresult::CUDA_SUCCESS && version < MIN_DRIVER_VERSION {
            return Err(Error::NoGpu(format!(
                "the NVIDIA driver is too old: it knows CUDA {}.{}, wanted driver {MIN_DRIVER} or newer",
                version / 1000,
                version % 1000 / 10
            )));
        }
        let no_gpu = |e: DriverError| {
            match e.0 {
            CUresult::CUDA_ERROR_NO_DEVICE => Error::NoGpu("no NVIDIA GPU was found".into()),
            CUresult::CUDA_ERROR_STUB_LIBRARY => Error::NoGpu(
                "the libcuda.so found is a toolkit's stub, not a driver; take the stubs folder off LD_LIBRARY_PATH".into(),
            ),
            CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | CUresult::CUDA_ERROR_INVALID_PTX => {
                Error::NoGpu(format!("the NVIDIA driver is too old: wanted {MIN_DRIVER} or newer"))
            }
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Error::OutOfGpuMemory { what: "the CUDA context".into(), needed_bytes: 0, free_bytes: None }
            }
            code => Error::NoGpu(format!("cannot use GPU {ordinal}: the CUDA driver said {code:?}")),
        }
        };
        let count = CudaContext::device_count().map_err(no_gpu)?;
        if usize::try_from(count).unwrap_or(0) <= ordinal {
            return Err(Error::NoGpu(format!("there is no GPU {ordinal}: the driver shows {count}")));
        }
        let context = CudaContext::new(ordinal).map_err(no_gpu)?;
        let (major, minor) = context.compute_capability().map_err(no_gpu)?;
        let name = context.name().map_err(no_gpu)?;
        let capability = major * 10 + minor;
        if capability < MIN_CAPABILITY {
            return Err(Error::NoGpu(format!(
                "{name} is sm_{capability}: the kernels need sm_{MIN_CAPABILITY} (Ampere) or newer"
            )));
        }
        // SAFETY: every buffer is used on the stream it was allocated on: all of a model's are of one stream
        // (`Gpu::shared_stream`), and what is captured on another (`StepGraph::capture`) runs on that one. What is not freed in
        // stream order, pinned memory, is dropped after the stream was synchronised (`Sequences::drop`).
        unsafe { context.disable_event_tracking() };
        Ok(Gpu { context, name, capability })
    }

    /// For example `NVIDIA H200`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, major * 10 + minor: 90 for Hopper.
    #[must_use]
    pub fn capability(&self) -> i32 {
        self.capability
    }

    /// Its number, as [`Gpu::open`] counts.
    #[must_use]
    pub fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// Free and total bytes of GPU memory.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let (free, total) =
            self.context.mem_get_info().map_err(|e| driver_error("reading the GPU's memory", e))?;
        Ok((free as u64, total as u64))
    }

    /// Blocks `decode_step` takes on this GPU, one a multiprocessor; 0 where it cannot run.
    #[allow(unsafe_code)]
    pub(super) fn decode_step_blocks(&self, has_zeros: bool) -> Result<usize> {
        // The kernel is compiled for sm_90 alone.
        if !cfg!(peregrine_sm90) || self.capability != OVERLAP_CAPABILITY {
            return Ok(0);
        }
        self.context.bind_to_thread().map_err(|e| driver_error("using the GPU from this thread", e))?;
        let mut blocks = 0;
        // SAFETY: `blocks` is one u32, which is all the call writes.
        let code = unsafe { ffi::decode_step_blocks(u32::from(has_zeros), &raw mut blocks) };
        if code == 0 {
            return Ok(blocks as usize);
        }
        Err(Error::Cuda { op: "decode_step".into(), what: format!("preparing it failed ({code})") })
    }

    /// Its place on the bus, as NVML names it: `0000:3b:00.0`.
    #[must_use]
    pub fn pci_id(&self) -> Option<String> {
        let part = |attribute| self.context.attribute(attribute).ok();
        let domain = part(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
        let bus = part(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
        let device = part(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
        Some(format!("{domain:04x}:{bus:02x}:{device:02x}.0"))
    }

    /// Streaming multiprocessors: 132 on an H200.
    pub fn multiprocessors(&self) -> Result<usize> {
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count =
            self.context.attribute(attribute).map_err(|e| driver_error("reading the GPU's attributes", e))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// A new stream. Its kernels may overlap with their predecessors where the GPU can do that.
    pub fn stream(&self) -> Result<Stream> {
        Ok(self.stream_of(self.context.new_stream().map_err(|e| driver_error("making a stream", e))?))
    }

    /// The stream of all models on this GPU. Two persistent kernels on two streams could each hold a part of the multiprocessors and
    /// wait for the rest for ever; on one stream they run one after the other. (Those of two processes run at once under MPS alone.)
    pub fn shared_stream(&self) -> Result<Stream> {
        let ordinal = self.context.ordinal();
        let mut streams = SHARED_STREAMS.lock().unwrap_or_else(PoisonError::into_inner);
        streams.retain(|(_, stream)| stream.strong_count() > 0);
        let known = streams.iter().find(|(of, _)| *of == ordinal).and_then(|(_, stream)| stream.upgrade());
        if let Some(inner) = known {
            return Ok(self.stream_of(inner));
        }
        let stream = self.stream()?;
        streams.push((ordinal, Arc::downgrade(&stream.inner)));
        Ok(stream)
    }

    fn stream_of(&self, inner: Arc<CudaStream>) -> Stream {
        let debug = crate::trace::switches();
        Stream {
            inner,
            overlap: cfg!(peregrine_sm90) && self.capability == OVERLAP_CAPABILITY && !debug.sync,
            sync: debug.sync,
            splits: true,
            split_sums: OnceLock::new(),
            spares: Mutex::default(),
        }
    }
}

/// A queue of work on one GPU.
pub struct Stream {
    pub(super) inner: Arc<CudaStream>,
    /// Launch kernels with programmatic dependent launch.
    pub(super) overlap: bool,
    /// `PEREGRINE_SYNC=1`: wait after every launch, so that a fault names its op.
    pub(super) sync: bool,
    /// `gptq_gemm` is given room for [`SplitSums`], so that it spreads a product over all multiprocessors. Not while capturing.
    splits: bool,
    split_sums: OnceLock<SplitSums>,
    /// Pages for `DevBuf::on_sides`, until `Stream::drop_spare_pages`.
    pub(super) spares: Mutex<Spares>,
}

/// What `gptq_gemm` needs to share tiles between blocks. Kernels of one stream use it one after the other.
pub(super) struct SplitSums {
    /// `[multiprocessors, GEMM_TILE]`: 17 MB on an H200.
    pub(super) sums: DevBuf<f32>,
    /// `[multiprocessors, GEMM_GROUPS]`, zero between kernels.
    pub(super) flags: DevBuf<u32>,
}

impl Stream {
    /// Whether what is queued is being captured.
    pub(super) fn captures(&self) -> bool {
        let status = self.inner.capture_status();
        !matches!(status, Ok(CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE))
    }

    /// One more stream of the same GPU and kind.
    pub(super) fn another(&self) -> Result<Stream> {
        let inner = self.inner.context().new_stream().map_err(|e| driver_error("making a stream", e))?;
        // It captures, and nothing may be allocated meanwhile.
        let (splits, split_sums, spares) = (false, OnceLock::new(), Mutex::default());
        Ok(Stream { inner, overlap: self.overlap, sync: self.sync, splits, split_sums, spares })
    }

    /// Room for shared tiles, allocated when it is first wanted; `None`: this stream's kernels do without.
    pub(super) fn split_sums(&self) -> Result<Option<&SplitSums>> {
        if !self.splits {
            return Ok(None);
        }
        if self.split_sums.get().is_none() {
            let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
            let context = self.inner.context();
            let count =
                context.attribute(attribute).map_err(|e| driver_error("reading the GPU's attributes", e))?;
            let count = usize::try_from(count).unwrap_or(0);
            let sums =
                DevBuf::zeros(self, "sums of shared tiles", count * ffi::PEREGRINE_GEMM_TILE as usize)?;
            let flags =
                DevBuf::zeros(self, "flags of shared tiles", count * ffi::PEREGRINE_GEMM_GROUPS as usize)?;
            // Another thread may have been faster: then its buffers serve, and these are freed in stream order.
            let _ = self.split_sums.set(SplitSums { sums, flags });
        }
        Ok(self.split_sums.get())
    }
}

/// A point in a stream that can be waited for.
pub struct Event(CudaEvent);

impl Stream {
    /// Waits until everything queued is done.
    ///
    /// # Errors
    /// [`Error::Cuda`] if a kernel failed.
    pub fn synchronize(&self) -> Result<()> {
        self.inner.synchronize().map_err(|e| driver_error("waiting for the GPU", e))
    }

    /// Marks the end of what is queued so far. `timed` events measure time.
    pub fn record(&self, timed: bool) -> Result<Event> {
        let flags =
            if timed { CUevent_flags::CU_EVENT_DEFAULT } else { CUevent_flags::CU_EVENT_DISABLE_TIMING };
        let event =
            self.inner.context().new_event(Some(flags)).map_err(|e| driver_error("making an event", e))?;
        event.record(&self.inner).map_err(|e| driver_error("recording an event", e))?;
        Ok(Event(event))
    }

    /// Records `event` again.
    pub fn record_again(&self, event: &Event) -> Result<()> {
        event.0.record(&self.inner).map_err(|e| driver_error("recording an event", e))
    }
}

impl Event {
    /// Waits until the stream has reached it.
    ///
    /// # Errors
    /// [`Error::Cuda`] if a kernel before it failed.
    pub fn wait(&self) -> Result<()> {
        self.0.synchronize().map_err(|e| driver_error("waiting for the GPU", e))
    }

    /// Milliseconds from `start` to this event; both must be timed and reached.
    pub fn milliseconds_since(&self, start: &Event) -> Result<f32> {
        start.0.elapsed_ms(&self.0).map_err(|e| driver_error("reading an event", e))
    }
}
