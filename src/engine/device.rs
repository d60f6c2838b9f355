//! The two devices behind one set of methods: an enum and a `match`, because there will not be a third.

use std::sync::Arc;

use super::{LoadOptions, MemoryUse};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::cpu::{CpuModel, CpuTimeline};
#[cfg(feature = "cuda")]
use crate::cuda::{CudaModel, CudaTimeline};
use crate::error::{Error, Result};
use crate::layout::HEAD_DIM;
use crate::reference;
use crate::sampler::{Sampled, Sampling};
use crate::speculate::Tally;
use crate::timing::LoadPart;
#[cfg(feature = "cuda")]
use crate::timing::LoadTimes;

/// Where a model runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Device {
    /// The first GPU if it can be used, else the CPU.
    #[default]
    Auto,
    /// The reference implementation.
    Cpu,
    /// The GPU of this number, counted as the CUDA driver counts.
    Cuda(usize),
}

/// A model on its device.
pub(super) enum Model {
    Cpu(Arc<CpuModel>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<CudaModel>),
}

impl Model {
    /// Loads `checkpoint`; the text is why `Auto` fell back to the CPU. How long the parts took goes to `parts`.
    pub(super) fn load(
        checkpoint: &Arc<Checkpoint>,
        options: &LoadOptions,
        parts: &mut Vec<LoadPart>,
    ) -> Result<(Model, Option<String>)> {
        let cpu = || Ok(Model::Cpu(Arc::new(CpuModel::load(Arc::clone(checkpoint))?)));
        match options.device {
            Device::Cpu => Ok((cpu()?, None)),
            Device::Cuda(ordinal) => Ok((Model::load_cuda(checkpoint, ordinal, options, parts)?, None)),
            Device::Auto => match Model::load_cuda(checkpoint, 0, options, parts) {
                Ok(model) => Ok((model, None)),
                Err(Error::NoGpu(reason)) => Ok((cpu()?, Some(reason))),
                Err(error) => Err(error),
            },
        }
    }

    #[cfg(feature = "cuda")]
    fn load_cuda(
        checkpoint: &Checkpoint,
        ordinal: usize,
        options: &LoadOptions,
        parts: &mut Vec<LoadPart>,
    ) -> Result<Model> {
        let model = Arc::new(CudaModel::load(checkpoint, ordinal, options.progress)?);
        parts.extend_from_slice(model.load_parts());
        let mut times = LoadTimes::begin();
        CudaTimeline::warm_up(&model)?;
        times.lap("warm-up of all kernels, graphs");
        parts.extend_from_slice(times.parts());
        Ok(Model::Cuda(model))
    }

    #[cfg(not(feature = "cuda"))]
    fn load_cuda(_: &Checkpoint, ordinal: usize, _: &LoadOptions, _: &mut Vec<LoadPart>) -> Result<Model> {
        Err(Error::NoGpu(format!("cuda:{ordinal}: this build has no CUDA; build with --features cuda")))
    }

    pub(super) fn device_name(&self) -> String {
        match self {
            Model::Cpu(_) => format!("cpu (reference, {} threads)", reference::threads()),
            #[cfg(feature = "cuda")]
            Model::Cuda(model) => model.device_name(),
        }
    }

    pub(super) fn memory(&self, config: &ModelConfig) -> MemoryUse {
        let kv_values_per_token = (2 * HEAD_DIM * config.num_layers) as u64;
        match self {
            Model::Cpu(model) => MemoryUse {
                weight_bytes: model.weight_bytes(),
                step_weight_bytes: model.step_weight_bytes(),
                kv_bytes_per_token: kv_values_per_token * 4,
                gpu_used_bytes: None,
            },
            #[cfg(feature = "cuda")]
            Model::Cuda(model) => MemoryUse {
                weight_bytes: model.weight_bytes(),
                step_weight_bytes: model.step_weight_bytes(),
                kv_bytes_per_token: kv_values_per_token * 2,
                gpu_used_bytes: model.gpu_used_bytes().ok(),
            },
        }
    }

    pub(super) fn timeline(&self, max_context: usize) -> Result<Timeline> {
        match self {
            Model::Cpu(model) => {
                Ok(Timeline::Cpu(Box::new(CpuTimeline::new(Arc::clone(model), max_context)?)))
            }
            #[cfg(feature = "cuda")]
            Model::Cuda(model) => {
                Ok(Timeline::Cuda(Box::new(CudaTimeline::new(Arc::clone(model), max_context)?)))
            }
        }
    }
}

/// One sequence on its device; see [`CpuTimeline`] for what the methods do.
pub(super) enum Timeline {
    Cpu(Box<CpuTimeline>),
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaTimeline>),
}

impl Timeline {
    pub(super) fn position(&self) -> usize {
        match self {
            Timeline::Cpu(timeline) => timeline.position(),
            #[cfg(feature = "cuda")]
            Timeline::Cuda(timeline) => timeline.position(),
        }
    }

    pub(super) fn rewind(&mut self, position: usize) -> Result<()> {
        match self {
            Timeline::Cpu(timeline) => timeline.rewind(position),
            #[cfg(feature = "cuda")]
            Timeline::Cuda(timeline) => timeline.rewind(position),
        }
    }

    pub(super) fn prefill(&mut self, ids: &[u32]) -> Result<()> {
        match self {
            Timeline::Cpu(timeline) => timeline.prefill(ids),
            #[cfg(feature = "cuda")]
            Timeline::Cuda(timeline) => timeline.prefill(ids),
        }
    }

    pub(super) fn logits(
        &mut self,
        ids: &[u32],
        token_by_token: bool,
        sink: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        match self {
            Timeline::Cpu(timeline) => timeline.logits(ids, token_by_token, sink),
            #[cfg(feature = "cuda")]
            Timeline::Cuda(timeline) => timeline.logits(ids, token_by_token, sink),
        }
    }

    pub(super) fn begin(&mut self, sampling: &Sampling, stop_ids: &[u32], history: &[u32]) -> Result<()> {
        match self {
            Timeline::Cpu(timeline) => timeline.begin(sampling, stop_ids, history),
            #[cfg(feature = "cuda")]
            Timeline::Cuda(timeline) => timeline.begin(sampling, stop_ids, history),
        }
    }

    pub(super) fn next_token(&mut self) -> Result<Sampled> {
        match self {
            Timeline::Cpu(timeline) => timeline.next_token(),
            #[cfg(feature = "cuda")]
            Timeline::Cuda(timeline) => timeline.next_token(),
        }
    }

    pub(super) fn tally(&self) -> Tally {
        match self {
            Timeline::Cpu(timeline) => timeline.tally(),
            #[cfg(feature = "cuda")]
            Timeline::Cuda(timeline) => timeline.tally(),
        }
    }
}
