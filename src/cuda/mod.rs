//! The `cuda` device: a model on a GPU, its timelines and its batches. Same methods as [`crate::cpu`], which is its truth.
//!
//! ```text
//! persistent  which models the persistent kernel takes
//! model       CudaModel: the weights, and the stream all share
//! sequences   sequences that are decoded together: caches, scratch, sampler, the decode step
//! timeline    CudaTimeline: one sequence, which may speculate
//! batch       CudaBatch: several sequences
//! ```
//!
//! While tokens are generated the GPU is steps ahead of the host: the sampler leaves tokens on the device, where the next step
//! finds them, and writes them to pinned memory, where the host does.

mod batch;
mod model;
mod persistent;
mod sequences;
mod timeline;

pub use batch::CudaBatch;
pub use model::CudaModel;
pub use timeline::CudaTimeline;
