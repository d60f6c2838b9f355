//! layernorm, permute.

use peregrine::gpu::DevBuf;
use peregrine::gpu::ops::{self, Norm, PendingSum};
use peregrine::reference;

use crate::kit::*;

/// f16 rounding of the output: 2.8e-4 at most. Measured: 2.4e-4.
const F16_TOLERANCE: f64 = 3e-4;

#[test]
fn layernorm_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    for hidden in [64, 320, 4544, 8192] {
        let mut random = Random::new(hidden as u64);
        let (weight, bias) = (random.values(hidden, 1.0), random.values(hidden, 0.5));
        let norm = Norm {
            weight: DevBuf::from_host(&stream, "weight", &weight).unwrap(),
            bias: DevBuf::from_host(&stream, "bias", &bias).unwrap(),
            epsilon: 1e-5,
        };
        for (m, slices) in [(1, 0), (1, 5), (8, 5), (65, 0), (128, 3)] {
            let mut x = random.values(m * hidden, 3.0);
            let partials = random.values(slices * m * hidden, 1.0);
            let sum_bias = random.values(hidden, 1.0);
            let partials_gpu = DevBuf::from_host(&stream, "partials", &partials).unwrap();
            let sum_bias_gpu = DevBuf::from_host(&stream, "bias", &sum_bias).unwrap();
            let run = |x: &[f32]| {
                let mut x = DevBuf::from_host(&stream, "x", x).unwrap();
                let mut out = nan16(&stream, m * hidden);
                let pending = (slices > 0).then_some(PendingSum {
                    partials: &partials_gpu,
                    slices,
                    bias: Some(&sum_bias_gpu),
                });
                ops::layernorm(&stream, &norm, &mut x, pending, m, &mut out, false).unwrap();
                (x.download(&stream, 0, m * hidden).unwrap(), out.download(&stream, 0, m * hidden).unwrap())
            };
            let (new_x, out) = run(&x);
            assert!(run(&x) == (new_x.clone(), out.clone()), "second run differs");
            for part in partials.chunks(m * hidden) {
                reference::add(&mut x, part);
            }
            if slices > 0 {
                x.chunks_mut(hidden).for_each(|row| reference::add(row, &sum_bias));
            }
            assert_eq!(new_x, x, "the residual is added in slice order");
            let want = reference::layernorm(&x, &weight, &bias, 1e-5);
            assert_close(
                &format!("layernorm {hidden} m {m} slices {slices}"),
                &to_f32(&out),
                &want,
                F16_TOLERANCE,
            );
        }
    }
}

#[test]
fn permute_gathers() {
    let Some((_, stream)) = gpu() else { return };
    for (n, m) in [(64, 1), (320, 3), (4544, 263), (4544, 264), (4544, 265), (22720, 9), (22720, 265)] {
        let mut random = Random::new(n as u64);
        let x = random.halves(m * n, 1.0);
        let source: Vec<u32> = (0..n).map(|_| (random.bits() % n as u64) as u32).collect();
        let want: Vec<u16> =
            x.chunks(n).flat_map(|row| source.iter().map(|&i| row[i as usize]).collect::<Vec<_>>()).collect();
        let (x, source) = (
            DevBuf::from_host(&stream, "x", &x).unwrap(),
            DevBuf::from_host(&stream, "source", &source).unwrap(),
        );
        let mut out = nan16(&stream, m * n);
        ops::permute(&stream, &x, &source, m, &mut out).unwrap();
        assert!(out.download(&stream, 0, m * n).unwrap() == want);
    }
}

/// An index beyond the row must not leave it.
#[test]
fn permute_clamps_its_source() {
    let Some((_, stream)) = gpu() else { return };
    let x = DevBuf::from_host(&stream, "x", &Random::new(1).halves(64, 1.0)).unwrap();
    let source = DevBuf::from_host(&stream, "source", &[u32::MAX; 64]).unwrap();
    let mut out = nan16(&stream, 64);
    ops::permute(&stream, &x, &source, 1, &mut out).unwrap();
    assert_eq!(out.download(&stream, 0, 64).unwrap(), vec![x.download(&stream, 63, 1).unwrap()[0]; 64]);
}
