//! How long a launch takes: cold and warm, and two kernels in turns. `peregrine lab` and `cargo bench --bench kernels` both show it so.

use crate::error::Result;
use crate::gpu::ops;
use crate::gpu::{DevBuf, Gpu, Stream};
use crate::measure::machine::Ceilings;
use crate::measure::stats;
use crate::measure::work::Work;

/// Bytes that are read in front of a cold launch: more than three times an H200's L2.
const FLUSH_BYTES: usize = 192 << 20;
/// Batches whose median counts.
pub const BATCHES: usize = 21;
/// A batch of warm launches takes about this long, microseconds.
const BATCH_US: f64 = 300.0;

/// Microseconds of a launch, batch by batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Times {
    /// One launch between two events, behind reads that fill the L2 with other data.
    pub cold: Vec<f64>,
    /// Launches one after the other on the same buffers, overlapping where the GPU can do that.
    pub warm: Vec<f64>,
}

/// What is timed: it queues its kernel.
pub type Launch<'a> = &'a mut dyn FnMut(&Stream) -> Result<()>;

/// Times launches on one stream.
pub struct Timer<'a> {
    stream: &'a Stream,
    flush: DevBuf<u8>,
    mix: DevBuf<u32>,
    blocks: usize,
}

impl<'a> Timer<'a> {
    /// With a buffer to flush the L2 with.
    ///
    /// # Errors
    /// [`crate::Error::OutOfGpuMemory`].
    pub fn new(gpu: &Gpu, stream: &'a Stream) -> Result<Timer<'a>> {
        Ok(Timer {
            stream,
            flush: DevBuf::zeros(stream, "flush", FLUSH_BYTES)?,
            mix: DevBuf::zeros(stream, "mix", 1)?,
            blocks: gpu.multiprocessors()? * 8,
        })
    }

    /// Microseconds of one of `count` launches between two events. With `cold` the L2 is full of other data at first.
    ///
    /// # Errors
    /// A driver failure.
    pub fn batch(&mut self, launch: Launch<'_>, count: usize, cold: bool) -> Result<f64> {
        if cold {
            ops::stream_read(self.stream, &self.flush, &mut self.mix, self.blocks)?;
        }
        let start = self.stream.record(true)?;
        (0..count).try_for_each(|_| launch(self.stream))?;
        let end = self.stream.record(true)?;
        end.wait()?;
        Ok(f64::from(end.milliseconds_since(&start)?) * 1e3 / count as f64)
    }

    /// Launches of a warm batch.
    fn count(&mut self, launch: Launch<'_>) -> Result<usize> {
        self.batch(launch, 1, false)?;
        let one = self.batch(launch, 8, false)?;
        Ok(((BATCH_US / one) as usize).clamp(4, 128))
    }

    /// Cold and warm times of a launch.
    ///
    /// # Errors
    /// A driver failure.
    pub fn times(&mut self, launch: Launch<'_>) -> Result<Times> {
        let count = self.count(launch)?;
        let mut times = Times { cold: Vec::new(), warm: Vec::new() };
        for _ in 0..BATCHES {
            times.warm.push(self.batch(launch, count, false)?);
        }
        for _ in 0..BATCHES {
            times.cold.push(self.batch(launch, 1, true)?);
        }
        Ok(times)
    }

    /// Warm times of a launch with the built-in kernel and with another one, in turns. `swap` puts the other in place (true), or the
    /// built-in one.
    ///
    /// # Errors
    /// A driver failure.
    pub fn in_turns(&mut self, launch: Launch<'_>, swap: &dyn Fn(bool)) -> Result<[Vec<f64>; 2]> {
        swap(false);
        let count = self.count(launch)?;
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..=BATCHES {
            for turn in 0..2 {
                let other = (round + turn) % 2;
                swap(other == 1);
                let us = self.batch(launch, count, false)?;
                if round > 0 {
                    times[other].push(us);
                }
            }
        }
        swap(false);
        Ok(times)
    }
}

/// `12.34 (12.20 - 12.60)`: median, and the 10th and the 90th percentile.
#[must_use]
pub fn spread(us: &[f64]) -> String {
    let [low, median, high] = [0.1, 0.5, 0.9].map(|q| stats::quantile(us, q));
    format!("{median:.2} ({low:.2} - {high:.2})")
}

/// What a reader of [`row`]s must know.
pub const NOTE: &str =
    "Rates and share are of the cold time, one launch between two events, which are some 2 us of it";

/// The line above [`row`]s.
#[must_use]
pub fn heading() -> String {
    format!(
        "{:<44} {:>24} {:>24} {:>8} {:>8} {:>8} {:>8}",
        "call, us", "cold (10 - 90 %)", "warm (10 - 90 %)", "GB/s", "TFLOP/s", "floor us", "of floor"
    )
}

/// What was seen of a call: both times, and of the cold one the rates and the floor's share.
#[must_use]
pub fn row(label: &str, work: Work, times: &Times, ceilings: Ceilings) -> String {
    let cold = stats::median(&times.cold);
    let floor = work.floor_seconds(ceilings.bytes_per_second, ceilings.flop_per_second) * 1e6;
    format!(
        "{label:<44} {:>24} {:>24} {:>8.0} {:>8.1} {floor:>8.2} {:>6.0} %",
        spread(&times.cold),
        spread(&times.warm),
        work.bytes / cold / 1e3,
        work.flop / cold / 1e6,
        floor / cold * 100.0
    )
}
