//! How long a call takes: cold and warm, and two kernels in turns.

use super::calls::Call;
use crate::error::Result;
use crate::gpu::ops;
use crate::gpu::{DevBuf, Gpu, Stream};
use crate::measure::stats;

/// Bytes that are read in front of a cold launch: more than three times an H200's L2.
const FLUSH_BYTES: usize = 192 << 20;
/// Batches whose median counts.
const BATCHES: usize = 21;
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

/// Times calls on one stream.
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
    fn batch(&mut self, call: &mut dyn Call, count: usize, cold: bool) -> Result<f64> {
        if cold {
            ops::stream_read(self.stream, &self.flush, &mut self.mix, self.blocks)?;
        }
        let start = self.stream.record(true)?;
        (0..count).try_for_each(|_| call.launch(self.stream))?;
        let end = self.stream.record(true)?;
        end.wait()?;
        Ok(f64::from(end.milliseconds_since(&start)?) * 1e3 / count as f64)
    }

    /// Launches of a warm batch.
    fn count(&mut self, call: &mut dyn Call) -> Result<usize> {
        self.batch(call, 1, false)?;
        let one = self.batch(call, 8, false)?;
        Ok(((BATCH_US / one) as usize).clamp(4, 128))
    }

    /// Cold and warm times of a call.
    ///
    /// # Errors
    /// A driver failure.
    pub fn times(&mut self, call: &mut dyn Call) -> Result<Times> {
        call.reset(self.stream)?;
        let count = self.count(call)?;
        let mut times = Times { cold: Vec::new(), warm: Vec::new() };
        for _ in 0..BATCHES {
            times.warm.push(self.batch(call, count, false)?);
        }
        for _ in 0..BATCHES {
            times.cold.push(self.batch(call, 1, true)?);
        }
        Ok(times)
    }

    /// Warm times of a call with the built-in kernel and with another one, in turns. `swap` puts the other in place (true), or the
    /// built-in one.
    ///
    /// # Errors
    /// A driver failure.
    pub fn in_turns(&mut self, call: &mut dyn Call, swap: &dyn Fn(bool)) -> Result<[Vec<f64>; 2]> {
        call.reset(self.stream)?;
        swap(false);
        let count = self.count(call)?;
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..=BATCHES {
            for turn in 0..2 {
                let other = (round + turn) % 2;
                swap(other == 1);
                let us = self.batch(call, count, false)?;
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
