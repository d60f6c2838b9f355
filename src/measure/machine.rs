//! The machine: what it is, how its GPU is while it works, and what it can do at best, measured in the same run.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

#[cfg(feature = "cuda")]
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::gpu::nvml::Nvml;
#[cfg(feature = "cuda")]
use crate::gpu::ops;
#[cfg(feature = "cuda")]
use crate::gpu::{DevBuf, Gpu, Stream};

/// What the memory and the tensor cores do at best.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// Bytes a second, read once: `cuda/stream_read.cu` over 4 GiB.
    pub bytes_per_second: f64,
    /// Dense f16 operations a second with f32 sums: `cuda/mma_peak.cu`.
    pub flop_per_second: f64,
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, flop) = (self.bytes_per_second / 1e12, self.flop_per_second / 1e12);
        write!(f, "{bytes:.2} TB/s, {flop:.0} TFLOP/s dense f16")
    }
}

/// What an H200 gave, for floors where nothing can be measured.
pub const H200: Ceilings = Ceilings { bytes_per_second: 4.45e12, flop_per_second: 9.0e14 };

/// Bytes of the buffer that is read.
#[cfg(feature = "cuda")]
const READ_BYTES: usize = 4 << 30;
/// Of the products: a few milliseconds, so that the clock is the one that heavy work gets.
#[cfg(feature = "cuda")]
const ROUNDS: usize = 4000;
/// Launches of each, of which the median counts.
#[cfg(feature = "cuda")]
const LAUNCHES: usize = 9;

/// Measures the ceilings, in some 100 ms; takes up to 4 GiB of GPU memory meanwhile.
///
/// # Errors
/// [`crate::Error::OutOfGpuMemory`], or a driver failure.
#[cfg(feature = "cuda")]
pub fn ceilings(gpu: &Gpu, stream: &Stream) -> Result<Ceilings> {
    let (free, _) = gpu.memory()?;
    let bytes = READ_BYTES.min(free as usize / 2) / 4096 * 4096;
    let multiprocessors = gpu.multiprocessors()?;
    let data = DevBuf::<u8>::zeros(stream, "data to read", bytes)?;
    let mut mix = DevBuf::<u32>::zeros(stream, "mix", 1)?;
    let mut sum = DevBuf::<f32>::zeros(stream, "sum", 1)?;
    let read = time(stream, || ops::stream_read(stream, &data, &mut mix, multiprocessors * 8))?;
    let flop = ops::mma_peak_flop(stream)? * (ROUNDS * multiprocessors) as f64;
    let product = time(stream, || ops::mma_peak(stream, &mut sum, ROUNDS, multiprocessors))?;
    Ok(Ceilings { bytes_per_second: bytes as f64 / read, flop_per_second: flop / product })
}

/// Median seconds of a launch, after one that is not counted.
#[cfg(feature = "cuda")]
fn time(stream: &Stream, mut launch: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut seconds = Vec::with_capacity(LAUNCHES);
    for i in 0..=LAUNCHES {
        let start = stream.record(true)?;
        launch()?;
        let end = stream.record(true)?;
        end.wait()?;
        if i > 0 {
            seconds.push(f64::from(end.milliseconds_since(&start)?) / 1e3);
        }
    }
    Ok(super::stats::median(&seconds))
}

/// How a GPU was during something; numbers NVML does not give are 0. Its clock of the multiprocessors is not that of those whose tensor
/// cores work: on an H200 1800 MHz where NVML has 1980.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Seen {
    /// Lowest clock of the multiprocessors, MHz.
    pub least_sm_mhz: u32,
    /// Highest clock of the multiprocessors, MHz.
    pub most_sm_mhz: u32,
    /// Clock of the memory, MHz.
    pub memory_mhz: u32,
    /// Highest temperature, degrees Celsius.
    pub celsius: u32,
    /// Highest power, watts.
    pub watts: f64,
    /// Looks it was seen in.
    pub looks: usize,
}

/// Looks at the GPU every few milliseconds until it is asked what it saw.
pub struct Monitor {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Seen>>,
}

/// Between two looks. A look takes some 50 us of a core and nothing of the GPU.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
const PERIOD: Duration = Duration::from_millis(10);

impl Monitor {
    /// Begins to watch. The first look is after a moment: a GPU that was idle has not raised its clock yet.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn watch(gpu: Option<&Gpu>) -> Monitor {
        let stop = Arc::new(AtomicBool::new(false));
        let nvml = gpu.and_then(Nvml::open);
        let thread = nvml.map(|nvml| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || look_until(&nvml, &stop))
        });
        Monitor { stop, thread }
    }

    /// Watches nothing: this build knows no GPU.
    #[cfg(not(feature = "cuda"))]
    #[must_use]
    pub fn watch(_: Option<&()>) -> Monitor {
        Monitor { stop: Arc::default(), thread: None }
    }

    /// Ends it; `None` without NVML.
    #[must_use]
    pub fn seen(mut self) -> Option<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take()?.join().ok().filter(|seen| seen.looks > 0)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(feature = "cuda")]
fn look_until(nvml: &Nvml, stop: &AtomicBool) -> Seen {
    let mut seen = Seen { least_sm_mhz: u32::MAX, ..Seen::default() };
    loop {
        std::thread::sleep(PERIOD);
        if stop.load(Ordering::Relaxed) {
            return seen;
        }
        let look = nvml.look();
        seen.least_sm_mhz = seen.least_sm_mhz.min(look.sm_mhz);
        seen.most_sm_mhz = seen.most_sm_mhz.max(look.sm_mhz);
        seen.memory_mhz = look.memory_mhz;
        seen.celsius = seen.celsius.max(look.celsius);
        seen.watts = seen.watts.max(look.watts);
        seen.looks += 1;
    }
}

/// What a GPU is measured with: its context, and a stream for ceilings. Without one, or in a build that knows none, all answers are
/// `None`.
#[derive(Default)]
pub struct Instruments {
    #[cfg(feature = "cuda")]
    gpu: Option<(Gpu, Stream)>,
}

#[cfg(feature = "cuda")]
impl Instruments {
    /// Of GPU `ordinal`, if it is there. Its context is made here and kept.
    #[must_use]
    pub fn open(ordinal: usize) -> Instruments {
        let opened = Gpu::open(ordinal).and_then(|gpu| Ok((gpu.clone(), gpu.shared_stream()?)));
        Instruments { gpu: opened.ok() }
    }

    /// The ceilings, measured now.
    ///
    /// # Errors
    /// As [`ceilings`].
    pub fn ceilings(&self) -> Result<Option<Ceilings>> {
        self.gpu.as_ref().map(|(gpu, stream)| ceilings(gpu, stream)).transpose()
    }

    /// Begins to watch.
    #[must_use]
    pub fn watch(&self) -> Monitor {
        Monitor::watch(self.gpu.as_ref().map(|(gpu, _)| gpu))
    }

    /// Name of the GPU, and version of its driver.
    #[must_use]
    pub fn names(&self) -> Option<(String, String)> {
        let (gpu, _) = self.gpu.as_ref()?;
        let driver = Nvml::open(gpu).map_or(String::new(), |nvml| nvml.driver().to_owned());
        Some((gpu.name().to_owned(), driver))
    }

    /// The GPU and the stream.
    #[must_use]
    pub fn gpu(&self) -> Option<&(Gpu, Stream)> {
        self.gpu.as_ref()
    }
}

#[cfg(not(feature = "cuda"))]
impl Instruments {
    /// None.
    #[must_use]
    pub fn open(_ordinal: usize) -> Instruments {
        Instruments::default()
    }

    /// None.
    ///
    /// # Errors
    /// Never.
    pub fn ceilings(&self) -> crate::error::Result<Option<Ceilings>> {
        Ok(None)
    }

    /// Sees nothing.
    #[must_use]
    pub fn watch(&self) -> Monitor {
        Monitor::watch(None)
    }

    /// None.
    #[must_use]
    pub fn names(&self) -> Option<(String, String)> {
        None
    }
}
