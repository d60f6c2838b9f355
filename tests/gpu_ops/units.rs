//! What quantised weights are made of: gptq_repack, row_factors, unpack_check.

use peregrine::gpu::ops;
use peregrine::repack::{self, InputOrder};

use crate::kit::{FORMATS, Quantised, Random, gpu, repack};

#[test]
fn unpack_check_finds_subnormals_exact() {
    let Some((_, stream)) = gpu() else { return };
    assert_eq!(ops::unpack_check(&stream).unwrap(), 0);
}

#[test]
fn gptq_repack_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let mut random = Random::new(1);
    for format in FORMATS {
        for (n, k) in [(16, 128), (448, 320), (4672, 4544)] {
            let q = Quantised::new(&mut random, n, k, format);
            let matrix = repack(&stream, n, k, &[(&q, 0, 0)]);
            let order = InputOrder::of(&q.tensor()).unwrap();
            let want = repack::gptq_repack(&q.tensor(), &order, matrix.scales_per_row, matrix.has_zeros);
            let got = matrix.units.download(&stream, 0, matrix.units.len()).unwrap();
            assert!(got == want, "{format:?} [{n}, {k}]");
        }
    }
}

/// Rows whose largest scale is any f16: as drawn, times all that leaves them f16, and zero.
#[test]
fn row_factors_match_reference() {
    let Some((_, stream)) = gpu() else { return };
    let mut random = Random::new(12);
    for format in FORMATS {
        for (n, k) in [(16, 64), (448, 320), (4672, 4544)] {
            let mut q = Quantised::new(&mut random, n, k, format);
            q.scale_outputs(|row| if row % 41 == 40 { 0.0 } else { 2f32.powi(row as i32 % 40 - 18) });
            let matrix = repack(&stream, n, k, &[(&q, 0, 0)]);
            let units = matrix.units.download(&stream, 0, matrix.units.len()).unwrap();
            let want = repack::row_factors(&units, k, matrix.scales_per_row, matrix.has_zeros);
            let got = matrix.row_factors.download(&stream, 0, n).unwrap();
            assert!(got == want, "{format:?} [{n}, {k}]");
        }
    }
}
