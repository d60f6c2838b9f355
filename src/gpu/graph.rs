//! A decode step as a CUDA graph: one launch instead of two hundred.

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::context::{Stream, driver_error};
use crate::error::{Error, Result};

/// A captured sequence of launches, to be replayed on the stream it was captured on.
pub struct StepGraph(CudaGraph);

// SAFETY: a graph must not be used by two threads at once; `launch` takes `&mut self`, so it never is. Moving it to another
// thread is allowed: graphs belong to the context, not to a thread.
#[allow(unsafe_code)]
unsafe impl Send for StepGraph {}

impl StepGraph {
    /// Captures what `enqueue` puts on `stream`; nothing runs yet.
    pub fn capture(stream: &Stream, enqueue: impl FnOnce() -> Result<()>) -> Result<StepGraph> {
        let op = "capturing the decode step";
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.inner.begin_capture(mode).map_err(|e| driver_error(op, e))?;
        let enqueued = enqueue();
        // The capture must end even if an op failed, or the stream would stay unusable.
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.inner.end_capture(flags);
        enqueued?;
        let graph = graph.map_err(|e| driver_error(op, e))?;
        let graph = graph.ok_or(Error::Cuda { op: op.into(), what: "the driver gave no graph".into() })?;
        graph.upload().map_err(|e| driver_error(op, e))?;
        Ok(StepGraph(graph))
    }

    /// Queues the whole sequence.
    pub fn launch(&mut self) -> Result<()> {
        self.0.launch().map_err(|e| driver_error("launching the decode step", e))
    }
}
