//! A bench for kernels: each op at Falcon-7B's shapes, checked against the reference and timed beside its floor; a kernel of
//! somebody's own in place of a built-in one, without building the program again.
//!
//! ```text
//! kit      seeded data, comparison           calls    one call of an op: buffers, launch, what the reference gives
//! check    right? twice the same bits? within its buffers?
//! time     cold and warm, and two kernels in turns        list     every op of a step and a prompt, with its floor
//! model    the whole model with a kernel of somebody's own
//! compile  a .cu file to a library           report   registers, shared memory, spills, occupancy
//! ```
//!
//! The tests in `tests/gpu_ops/` are made of the same calls.

pub mod calls;
pub mod check;
pub mod compile;
pub mod kit;
pub mod list;
pub mod model;
pub mod report;
pub mod time;

/// Values of a token.
pub const HIDDEN: usize = 4544;
/// Of the MLP.
pub const FFN: usize = 18176;
/// Query heads.
pub const HEADS: usize = 71;
/// Rows of the table.
pub const VOCAB: usize = 65024;
/// Positions.
pub const CONTEXT: usize = 2048;
/// Layers.
pub const LAYERS: usize = 32;
/// Of the rotary angles.
pub const THETA: f32 = 10000.0;

include!(concat!(env!("OUT_DIR"), "/sources.rs"));

/// The text of a file of `cuda/`.
#[must_use]
pub fn source(name: &str) -> Option<&'static str> {
    SOURCES.iter().find(|(file, _)| *file == name).map(|(_, text)| *text)
}

/// All headers of `cuda/`, with their texts.
pub fn headers() -> impl Iterator<Item = (&'static str, &'static str)> {
    SOURCES.iter().copied().filter(|(name, _)| name.ends_with(".h") || name.ends_with(".cuh"))
}

/// Further files of `cuda/` that an op's launcher hands work to, by name: `gptq_gemm_wgmma.cu` for `gptq_gemm`.
pub fn parts(op: &str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let begins = format!("{op}_");
    SOURCES.iter().copied().filter(move |(name, _)| name.starts_with(&begins) && name.ends_with(".cu"))
}

/// The kernel files of `cuda/`, without their ends.
pub fn names() -> impl Iterator<Item = &'static str> {
    SOURCES.iter().filter_map(|(name, _)| name.strip_suffix(".cu"))
}
