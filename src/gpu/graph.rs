//! A decode step as a CUDA graph: one launch instead of two hundred.

use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaStream, result};

use super::context::{Stream, driver_error};
use crate::error::{Error, Result};

/// A captured sequence of launches, to be replayed on one stream.
pub struct StepGraph {
    graph: CudaGraph,
    stream: Arc<CudaStream>,
}

// SAFETY: a graph must not be used by two threads at once; `launch` takes `&mut self`, so it never is. Moving it to another
// thread is allowed: graphs belong to the context, not to a thread.
#[allow(unsafe_code)]
unsafe impl Send for StepGraph {}

impl StepGraph {
    /// Captures what `enqueue` puts on the stream it is given; nothing runs yet. That is a stream of the capture's own: others may
    /// work on `stream`, where the graph will run, and must not be caught with it.
    #[allow(unsafe_code)]
    pub fn capture(stream: &Stream, enqueue: impl FnOnce(&Stream) -> Result<()>) -> Result<StepGraph> {
        let op = "capturing the decode step";
        let apart = stream.another()?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        apart.inner.begin_capture(mode).map_err(|e| driver_error(op, e))?;
        let enqueued = enqueue(&apart);
        // The capture must end even if an op failed.
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = apart.inner.end_capture(flags);
        enqueued?;
        let graph = graph.map_err(|e| driver_error(op, e))?;
        let graph = graph.ok_or(Error::Cuda { op: op.into(), what: "the driver gave no graph".into() })?;
        let stream = Arc::clone(&stream.inner);
        // SAFETY: `graph` and `stream` are alive, and no other thread has this graph yet.
        let uploaded = unsafe { result::graph::upload(graph.cu_graph_exec(), stream.cu_stream()) };
        uploaded.map_err(|e| driver_error(op, e))?;
        Ok(StepGraph { graph, stream })
    }

    /// Queues the whole sequence.
    #[allow(unsafe_code)]
    pub fn launch(&mut self) -> Result<()> {
        let op = "launching the decode step";
        self.stream.context().bind_to_thread().map_err(|e| driver_error(op, e))?;
        // SAFETY: `graph` and `stream` live in `self`, which no other thread uses meanwhile (`&mut`); the buffers the graph works on
        // belong to whoever captured it, and are freed on this stream, behind the launch.
        let launched = unsafe { result::graph::launch(self.graph.cu_graph_exec(), self.stream.cu_stream()) };
        launched.map_err(|e| driver_error(op, e))
    }
}
