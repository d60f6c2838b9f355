//! What the GPU tests share: the GPU or a loud skip, the lab's seeded data and comparison with failures that panic.

use peregrine::gpu::ops::Int4Matrix;
use peregrine::gpu::{DevBuf, Stream};
use peregrine::lab::kit::{self, Format};

pub use crate::gpu::gpu;
pub use peregrine::lab::kit::{G64, NAN16, Quantised, Random, to_f32};

pub fn nan16(stream: &Stream, n: usize) -> DevBuf<u16> {
    DevBuf::from_host(stream, "output", &vec![NAN16; n]).unwrap()
}

pub fn nan32(stream: &Stream, n: usize) -> DevBuf<f32> {
    DevBuf::from_host(stream, "output", &vec![f32::NAN; n]).unwrap()
}

/// Fails unless `got` has no NaN and ||got - want|| <= tolerance ||want||; names the worst element. Prints what it measured.
pub fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let kit::Difference { relative, worst } = kit::difference(got, want);
    let (g, w) = (got[worst], want[worst]);
    assert!(g.is_finite(), "{what}: element {worst} is {g}, wanted {w}");
    eprintln!(
        "MEASURED {what}: relative L2 {relative:.2e} (tolerance {tolerance:.1e}), worst [{worst}] {g} for {w}"
    );
    assert!(
        relative <= tolerance,
        "{what}: relative L2 {relative:.3e} > {tolerance:.1e}; worst [{worst}] got {g} wanted {w}"
    );
}

pub const FORMATS: [Format; 6] = [
    G64,
    Format { asymmetric: true, ..G64 },
    Format { group_size: 32, ..G64 },
    Format { group_size: 32, asymmetric: true, act_order: false },
    Format { group_size: 128, act_order: true, ..G64 },
    Format { group_size: usize::MAX, ..G64 },
];

/// A matrix on the GPU made of parts at (row, input), by `gptq_repack`.
pub fn repack(stream: &Stream, n: usize, k: usize, parts: &[(&Quantised, usize, usize)]) -> Int4Matrix {
    kit::repack(stream, n, k, parts).unwrap()
}
