//! A kernel of a captured step that begins beside the one in front of it and waits for the one before that.
//!
//! ```text
//! as captured       a ~~~> b ~~~> c       c begins as b lets it (`overlap_next()`), `wait_previous()` waits for the end of b
//! c overtakes b     a ~~~> b ---> c       c begins when all blocks of b have begun
//!                    `~~~~~~~~~~> c       `wait_previous()` waits for the end of a
//! ```
//!
//! A stream has no words for that, a graph has (CUDA driver API, `CUgraphEdgeData`): the edges are changed as soon as they were captured.

use std::ptr::{from_mut, null, null_mut};

use cudarc::driver::DriverError;
use cudarc::driver::sys::{
    self, CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER, CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, CUgraph,
    CUgraphDependencyType, CUgraphEdgeData, CUgraphNode, CUresult, CUstreamCaptureStatus,
};

use super::context::{Stream, driver_error};
use crate::error::{Error, Result};

const OP: &str = "letting a kernel of the decode step overtake another";

/// To a kernel that begins when all blocks of the other have begun.
const BEGUN: CUgraphEdgeData =
    edge(CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER, CUgraphDependencyType::CU_GRAPH_DEPENDENCY_TYPE_DEFAULT);
/// To one that begins when all have called `overlap_next()`, and waits for their end in `wait_previous()`.
const OVERLAP: CUgraphEdgeData = edge(
    CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC,
    CUgraphDependencyType::CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC,
);

#[allow(clippy::cast_possible_truncation)] // 0, 1 or 2
const fn edge(from_port: u32, type_: CUgraphDependencyType) -> CUgraphEdgeData {
    CUgraphEdgeData { from_port: from_port as u8, to_port: 0, type_: type_ as u8, reserved: [0; 5] }
}

impl Stream {
    /// Whether this is a step that is being captured, and kernels overlap.
    pub(super) fn can_overtake(&self) -> bool {
        self.overlap && self.captures()
    }

    /// The kernel queued last overtakes the one before it: its `wait_previous()` waits for the end of what that one follows. What it needs
    /// of the kernel it overtook must be told to it otherwise, and what comes behind takes its end for that of both (`cuda/ready.cuh`).
    /// Only where it [can](Stream::can_overtake).
    ///
    /// # Errors
    /// [`Error::Cuda`] if the last three kernels do not follow each other.
    pub(super) fn overtake(&self) -> Result<()> {
        let (graph, last) = self.captured()?;
        let overtaken = predecessor(last)?;
        let first = predecessor(overtaken)?;
        change(graph, overtaken, last, OVERLAP, sys::cuGraphRemoveDependencies_v2)?;
        change(graph, overtaken, last, BEGUN, sys::cuGraphAddDependencies_v2)?;
        change(graph, first, last, OVERLAP, sys::cuGraphAddDependencies_v2)
    }

    /// The graph that is being captured, and what was captured last.
    #[allow(unsafe_code)]
    fn captured(&self) -> Result<(CUgraph, CUgraphNode)> {
        let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let (mut graph, mut nodes, mut edges, mut count) = (null_mut(), null(), null(), 0);
        // SAFETY: `self` owns the stream, and the driver writes to locals of the types it wants.
        let code = unsafe {
            sys::cuStreamGetCaptureInfo_v3(
                self.inner.cu_stream(),
                from_mut(&mut status),
                null_mut(),
                from_mut(&mut graph),
                from_mut(&mut nodes),
                from_mut(&mut edges),
                from_mut(&mut count),
            )
        };
        done(code)?;
        if count != 1 || nodes.is_null() {
            return Err(not_in_line(count));
        }
        // SAFETY: there is one, checked above; the driver keeps it until the next call for this stream.
        Ok((graph, unsafe { *nodes }))
    }
}

/// What alone a node of a captured graph follows, overlapping.
#[allow(unsafe_code)]
fn predecessor(node: CUgraphNode) -> Result<CUgraphNode> {
    let (mut nodes, mut edges, mut count) = ([null_mut(); 2], [BEGUN; 2], 2);
    // SAFETY: the node is one of the graph that is being captured, where `captured` or this function found it; there is room for `count` of
    // what the driver writes.
    let code = unsafe {
        sys::cuGraphNodeGetDependencies_v2(node, nodes.as_mut_ptr(), edges.as_mut_ptr(), from_mut(&mut count))
    };
    done(code)?;
    if count == 1 && edges[0] == OVERLAP { Ok(nodes[0]) } else { Err(not_in_line(count)) }
}

type Change =
    unsafe fn(CUgraph, *const CUgraphNode, *const CUgraphNode, *const CUgraphEdgeData, usize) -> CUresult;

/// Adds or removes an edge.
#[allow(unsafe_code)]
fn change(
    graph: CUgraph,
    from: CUgraphNode,
    to: CUgraphNode,
    edge: CUgraphEdgeData,
    how: Change,
) -> Result<()> {
    // SAFETY: both nodes are of the graph, where `captured` and `predecessor` found them, and which lives while it is being captured; one
    // edge, read from locals.
    done(unsafe { how(graph, &raw const from, &raw const to, &raw const edge, 1) })
}

fn done(code: CUresult) -> Result<()> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(driver_error(OP, DriverError(code))),
    }
}

fn not_in_line(count: usize) -> Error {
    Error::Cuda { op: OP.into(), what: format!("it follows {count} others, wanted one, overlapping") }
}
