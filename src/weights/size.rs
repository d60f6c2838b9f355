//! How many bytes the weights take, and how many of them a pass reads.

use super::on_sides::WeightsOnSides;
use super::{Layer, Weights};
use crate::gpu::DevBuf;
use crate::gpu::ops::Norm;

impl Weights {
    /// Bytes of device memory that a pass reads: of an embedding that is not the head hardly anything.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.plain_bytes() - if self.head.is_some() { self.embedding.units.bytes() } else { 0 }
    }

    /// Bytes of device memory, with the copies there are.
    pub(crate) fn bytes(&self) -> u64 {
        let head = self.head();
        let near = self.matrices().map(|w| w.bytes() - w.plain_bytes()).sum::<u64>() + head.bytes()
            - head.units.bytes();
        self.plain_bytes() + near + self.on_sides.as_ref().map_or(0, WeightsOnSides::bytes)
    }

    /// Those of them that are no copy.
    fn plain_bytes(&self) -> u64 {
        let norm = |n: &Norm| n.weight.bytes() + n.bias.bytes();
        let optional = |b: &Option<DevBuf<f32>>| b.as_ref().map_or(0, DevBuf::bytes);
        let source = |b: &Option<DevBuf<u32>>| b.as_ref().map_or(0, DevBuf::bytes);
        let layer = |l: &Layer| {
            norm(&l.norm)
                + l.qkv_up.plain_bytes()
                + l.down_dense.plain_bytes()
                + optional(&l.qkv_up_bias)
                + optional(&l.down_dense_bias)
                + source(&l.qkv_source)
                + source(&l.up_source)
                + source(&l.down_dense_source)
        };
        self.embedding.units.bytes()
            + self.head.as_ref().map_or(0, |h| h.units.bytes())
            + self.layers.iter().map(layer).sum::<u64>()
            + norm(&self.final_norm)
            + self.rope_table.bytes()
    }
}
