//! Keys and values of one timeline on the GPU: f16 `[max_context, 64]` each, a layer. One head is shared by all queries, so the
//! whole cache of Falcon-7B is 8 KiB a token, 16 MiB at 2048.

use crate::error::Result;
use crate::gpu::ops::LayerCache;
use crate::gpu::{DevBuf, Stream};
use crate::layout::HEAD_DIM;

/// The cache of all layers.
pub(crate) struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    pub(crate) max_context: usize,
}

impl KvCache {
    pub(crate) fn new(stream: &Stream, layers: usize, max_context: usize) -> Result<KvCache> {
        let layer = |_| -> Result<LayerCache> {
            Ok(LayerCache {
                k: DevBuf::zeros(stream, "key cache", max_context * HEAD_DIM)?,
                v: DevBuf::zeros(stream, "value cache", max_context * HEAD_DIM)?,
            })
        };
        Ok(KvCache { layers: (0..layers).map(layer).collect::<Result<_>>()?, max_context })
    }
}
