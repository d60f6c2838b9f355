//! The device layer: everything `unsafe` of the GPU is in here, behind wrappers that check shapes.
//!
//! `ffi` (generated from `cuda/kernels.h`) < [`context`], [`buffer`], `pages` < [`spans`], [`swap`] < [`ops`], [`graph`] < [`sides`]; [`nvml`] asks how the GPU
//! is, [`nvtx`] tells profilers what it does. Each block of `unsafe` names the
//! check that proves it. Nothing above this module sees a pointer.

pub mod buffer;
pub mod context;
#[allow(unsafe_code)]
mod ffi;
pub mod graph;
mod guard;
pub mod nvml;
pub mod nvtx;
pub mod ops;
mod overtake;
mod pages;
pub mod sides;
pub mod spans;
pub mod swap;

pub use buffer::{Arrival, DevBuf, MappedFault, MappedTokens, Staging, StepFault, total_time};
pub use context::{Gpu, Stream};
pub use graph::StepGraph;
pub use guard::Guard;
pub use sides::Sides;
