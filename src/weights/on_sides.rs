//! What decode steps on Hopper read, once more: matrices by the sides of L2 (`cuda/sides.cuh`, `cuda/near.cuh`).

use super::{Layer, Weights};
use crate::error::{Error, Result};
use crate::gpu::ops::{self, OnSides};
use crate::gpu::{Gpu, Stream};

/// All matrices by the sides of L2, for `decode_step`.
pub(crate) struct WeightsOnSides {
    /// `qkv_up` and `down_dense` of each layer.
    pub(crate) layers: Vec<(OnSides, OnSides)>,
    pub(crate) head: OnSides,
}

impl WeightsOnSides {
    /// Bytes of device memory.
    pub(super) fn bytes(&self) -> u64 {
        self.head.bytes() + self.layers.iter().map(|(a, b)| a.bytes() + b.bytes()).sum::<u64>()
    }
}

impl Weights {
    /// Makes the copy that `decode_step` reads faster, where L2 has sides and half of the memory that is free is enough for it: the other
    /// kernels want plain units (`cuda/sides.cuh` says why), and there is no GPU with sides that has little memory.
    ///
    /// # Errors
    /// A driver failure. That there is no memory for it is none.
    pub(crate) fn lay_on_sides(&mut self, gpu: &Gpu, stream: &Stream) -> Result<()> {
        let (free, _) = gpu.memory()?;
        if self.read_bytes() <= free / 2 {
            self.on_sides = match self.copy_on_sides(stream) {
                Err(Error::OutOfGpuMemory { .. }) => None, // somebody else was faster
                copied => copied?,
            };
            stream.drop_spare_pages();
        }
        stream.synchronize()
    }

    /// Makes the copy that `gptq_batch` and `head` read faster, under the same conditions; not twice. For steps of more texts than
    /// `decode_step` takes: without them it is memory for nothing.
    ///
    /// # Errors
    /// A driver failure. That there is no memory for it is none.
    pub(crate) fn lay_near(&self, gpu: &Gpu, stream: &Stream) -> Result<()> {
        let slices = |layer: &Layer| ops::slices(layer.down_dense.k);
        let matrices = || self.layers.iter().flat_map(|l| [(&l.qkv_up, 1), (&l.down_dense, slices(l))]);
        let mut bytes = self.head().near_bytes(stream)?;
        for (w, slices) in matrices() {
            bytes += w.near_bytes(stream, slices)?;
        }
        if bytes == 0 || bytes > gpu.memory()?.0 / 2 {
            return Ok(());
        }
        let laid = matrices().try_for_each(|(w, slices)| w.lay_near(stream, slices));
        let laid = laid.and_then(|()| self.head().lay_near(stream));
        stream.drop_spare_pages();
        match laid {
            Err(Error::OutOfGpuMemory { .. }) => Ok(()), // somebody else was faster; what is laid is read
            laid => laid,
        }
    }

    fn copy_on_sides(&self, stream: &Stream) -> Result<Option<WeightsOnSides>> {
        let Some(head) = OnSides::table(stream, self.head())? else { return Ok(None) };
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let both = (OnSides::matrix(stream, &layer.qkv_up)?, OnSides::matrix(stream, &layer.down_dense)?);
            let (Some(qkv_up), Some(down_dense)) = both else { return Ok(None) };
            layers.push((qkv_up, down_dense));
        }
        Ok(Some(WeightsOnSides { layers, head }))
    }
}
