//! Measuring: what `peregrine bench`, `peregrine lab` and `cargo bench` share.
//!
//! ```text
//! stats      medians, spread, and whether one of two sets of times is slower
//! row        one result with everything needed to compare it later: JSON, CSV, tables
//! run        tests of a loaded model: prompts and answers of given lengths, at a depth, for several texts
//! work       bytes and FLOPs of a prompt and a step, by the model's shape
//! machine    the GPU while it works, and its measured ceilings      plot       pictures, in one file
//! breakdown  each op of a prompt and a step beside its floor (GPU only)
//! ```

#[cfg(feature = "cuda")]
pub mod breakdown;
pub mod machine;
mod panel;
pub mod plot;
pub mod row;
pub mod run;
pub mod stats;
pub mod work;
