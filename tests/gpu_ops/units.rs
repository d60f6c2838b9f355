//! What quantised weights are made of: gptq_repack, row_factors, unpack_check.

use peregrine::gpu::ops;
use peregrine::repack::{self, InputOrder};

use peregrine::gpu::DevBuf;

use crate::kit::{FORMATS, Quantised, Random, gpu, repack};

#[test]
fn unpack_check_finds_subnormals_and_sums_exact() {
    let Some((_, stream)) = gpu() else { return };
    let found = ops::unpack_check(&stream).unwrap();
    assert!(found.subnormals && found.sums, "{found:?}");
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

/// Row tiles of one unit, of Falcon's rows and of its head, in memory that is filled before; by no bits, by an H200's, by all.
#[test]
fn to_sides_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let mut random = Random::new(13);
    for (tiles, tile_bytes) in [(1, 544), (3, 544), (16, 1536), (2, 4096), (292, 71 * 544), (65, 71 * 1536)] {
        let units: Vec<u8> = (0..tiles * tile_bytes).map(|_| random.bits() as u8).collect();
        let source = DevBuf::from_host(&stream, "units", &units).unwrap();
        for sides in [0, 0x2a_b000, u32::MAX] {
            let want = repack::to_sides(&units, tile_bytes, sides);
            for _ in 0..2 {
                let mut to = DevBuf::zeros(&stream, "by sides", want.len()).unwrap();
                ops::to_sides(&stream, &source, tiles, tile_bytes, sides, &mut to).unwrap();
                let got = to.download(&stream, 0, want.len()).unwrap();
                assert!(got == want, "{tiles} of {tile_bytes} bytes, sides {sides:#x}");
            }
        }
    }
    let units = DevBuf::<u8>::zeros(&stream, "units", 100).unwrap();
    let mut to = DevBuf::zeros(&stream, "by sides", 8192).unwrap();
    assert!(ops::to_sides(&stream, &units, 1, 100, 0, &mut to).is_err(), "rows of 100 bytes");
    assert!(ops::to_sides(&stream, &units, 2, 64, 0, &mut to).is_err(), "more than there is");
}
