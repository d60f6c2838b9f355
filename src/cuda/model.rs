//! A model on a GPU.

use super::persistent::{self, Facts};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::gpu::ops;
use crate::gpu::{Gpu, Stream};
use crate::timing::{LoadPart, LoadTimes};
use crate::weights::Weights;

/// A model whose weights are on a GPU.
pub struct CudaModel {
    gpu: Gpu,
    /// The one stream of all models on the GPU, their timelines and their batches: two persistent kernels at once could wait for
    /// each other for ever. Timelines on several threads may queue work on it at any time: kernels of one stream run in order,
    /// and a decode step is one launch.
    stream: Stream,
    ordinal: usize,
    config: ModelConfig,
    weights: Weights,
    /// Blocks of the persistent kernel, or why decode steps are one kernel an op.
    persistent: std::result::Result<usize, &'static str>,
    load_times: LoadTimes,
}

impl CudaModel {
    /// Opens GPU `ordinal`, uploads and repacks the weights.
    ///
    /// # Errors
    /// [`Error::NoGpu`], [`Error::OutOfGpuMemory`], or a driver failure.
    pub fn load(
        checkpoint: &Checkpoint,
        ordinal: usize,
        progress: Option<fn(u64, u64)>,
    ) -> Result<CudaModel> {
        let mut load_times = LoadTimes::begin();
        let gpu = Gpu::open(ordinal)?;
        let stream = gpu.shared_stream()?;
        load_times.lap("CUDA context");
        let exact = ops::unpack_check(&stream)?;
        if !exact.subnormals {
            let what = "this GPU's tensor cores do not keep f16 subnormals, which products of quantised weights need";
            return Err(Error::NoGpu(what.into()));
        }
        load_times.lap("first kernel");
        let mut weights = Weights::load(&gpu, &stream, checkpoint, progress, &mut load_times)?;
        let config = checkpoint.config().clone();
        let blocks = ops::decode_step_blocks(&gpu, weights.has_zeros())?;
        let persistent = if crate::trace::switches().no_persistent {
            Err("PEREGRINE_NO_PERSISTENT is set")
        } else {
            persistent::persistent_fits(&Facts::of(&config, &weights, exact.sums, blocks)).map(|()| blocks)
        };
        if persistent.is_ok() {
            weights.lay_on_sides(&gpu, &stream)?;
            load_times.lap("their copy by the sides of L2");
        }
        Ok(CudaModel { gpu, stream, ordinal, config, weights, persistent, load_times })
    }

    /// The same model, decoded by one kernel an op. For comparisons; `PEREGRINE_NO_PERSISTENT=1` does it for a process.
    #[must_use]
    pub fn without_persistent(mut self) -> CudaModel {
        self.weights.on_sides = None;
        CudaModel { persistent: Err("it was switched off"), ..self }
    }

    /// Why decode steps are one kernel an op; `None`: up to 8 tokens are one launch of the persistent kernel.
    #[must_use]
    pub fn why_not_persistent(&self) -> Option<&'static str> {
        self.persistent.err()
    }

    /// For example `NVIDIA H200 (cuda:0)`.
    #[must_use]
    pub fn device_name(&self) -> String {
        format!("{} (cuda:{})", self.gpu.name(), self.ordinal)
    }

    /// How long the parts of [`CudaModel::load`] took.
    #[must_use]
    pub fn load_parts(&self) -> &[LoadPart] {
        self.load_times.parts()
    }

    /// Bytes of the resident weights, with the copies that decode steps read: another one as soon as there was a batch of more than 8 slots.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// Of those, bytes that a decode step reads, once: all but an embedding that is not the head.
    #[must_use]
    pub fn step_weight_bytes(&self) -> u64 {
        self.weights.read_bytes()
    }

    /// Bytes of the head's table.
    #[must_use]
    pub fn head_bytes(&self) -> u64 {
        self.weights.head().units.bytes()
    }

    /// Bytes of GPU memory in use, by anybody.
    pub fn gpu_used_bytes(&self) -> Result<u64> {
        let (free, total) = self.gpu.memory()?;
        Ok(total - free)
    }

    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    pub(super) fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(super) fn weights(&self) -> &Weights {
        &self.weights
    }

    pub(super) fn persistent_blocks(&self) -> Option<usize> {
        self.persistent.ok()
    }
}
