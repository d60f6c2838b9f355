//! The device layer: everything `unsafe` of the GPU is in here, behind wrappers that check shapes.
//!
//! `ffi` (generated from `cuda/kernels.h`) < [`context`], [`buffer`] < [`ops`], [`graph`]. Each block of `unsafe` names the
//! check that proves it. Nothing above this module sees a pointer.

pub mod buffer;
pub mod context;
#[allow(unsafe_code)]
mod ffi;
pub mod graph;
pub mod ops;

pub use buffer::{Arrival, DevBuf, MappedFault, MappedTokens, Staging, StepFault, total_time};
pub use context::{Gpu, Stream};
pub use graph::StepGraph;
