//! Keys and values on the GPU: f16 `[slots, max_context, 64]` each, a layer; a slot is one sequence. One head is shared by all
//! queries, so the cache of Falcon-7B is 8 KiB a token, 16 MiB at 2048.

use crate::error::Result;
use crate::gpu::Stream;
use crate::gpu::ops::LayerCache;

/// The cache of all layers.
pub(crate) struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    pub(crate) max_context: usize,
}

impl KvCache {
    pub(crate) fn new(stream: &Stream, layers: usize, slots: usize, max_context: usize) -> Result<KvCache> {
        let layers = (0..layers).map(|_| LayerCache::new(stream, slots, max_context));
        Ok(KvCache { layers: layers.collect::<Result<_>>()?, max_context })
    }
}
