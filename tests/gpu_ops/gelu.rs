//! GELU of every size of value, by each kernel of quantised products: weights times zero, so that only the bias is left.

use peregrine::gpu::DevBuf;
use peregrine::gpu::ops::{self, Activations, MatmulKernel, MatmulOutput};
use peregrine::reference;

use crate::kit::*;

/// Of f16 at y.
fn spacing(y: f32) -> f32 {
    let exponent = y.abs().log2().floor().clamp(-14.0, 15.0);
    (exponent - 10.0).exp2()
}

/// Spacings of f16: rounding to it is off by half a one, the kernels' GELU by 0.16 more. (0.5 v (1 + erff(v / sqrt 2)) in f32: 1.5 near -5.)
const MOST_SPACINGS: f32 = 0.67;

#[test]
fn gptq_gemm_and_others_give_gelu_of_all_sizes() {
    let Some((_, stream)) = gpu() else { return };
    let (qkv, m) = (80, 3); // the split lies within 64 rows
    let mut bias = vec![0.25; qkv];
    bias.extend((-4096..4096).map(|i| i as f32 / 512.0)); // -8 to 8
    bias.extend((0..1024).map(|i| (i as f32 / 16.0 - 60.0).exp2() * if i % 2 == 0 { 1.0 } else { -1.0 }));
    bias.extend([
        -0.0, 100.0, -100.0, 65504.0, -65504.0, -1e6, -1e30, 20.0, -20.0, -5.7, 5.7, 12.0, -12.0, 0.0, -9.0,
        9.0,
    ]);
    let n = bias.len();
    let mut want = bias[qkv..].to_vec();
    reference::gelu(&mut want);
    let w = repack(&stream, n, 64, &[(&Quantised::new(&mut Random::new(41), n, 64, G64), 0, 0)]);
    let bias = DevBuf::from_host(&stream, "bias", &bias).unwrap();
    let x = DevBuf::from_host(&stream, "x", &vec![0u16; m * 64]).unwrap();
    for kernel in [MatmulKernel::Gemv, MatmulKernel::Batch, MatmulKernel::Gemm] {
        let (mut out, mut wide) = (nan16(&stream, m * qkv), nan16(&stream, m * (n - qkv)));
        let output = MatmulOutput::Split {
            out: &mut out,
            gelu_out: &mut wide,
            gelu_stride: n - qkv,
            split_row: qkv,
            planes: false,
            bias: Some(&bias),
            announced: None,
            next: None,
        };
        let a = Activations { x: &x, stride: 64, tokens: m, planes: false, attention: None };
        ops::gptq_matmul(&stream, kernel, &w, 0..n, a, 1, output).unwrap();
        assert_eq!(to_f32(&out.download(&stream, 0, m * qkv).unwrap()), vec![0.25; m * qkv]);
        let got = to_f32(&wide.download(&stream, 0, m * (n - qkv)).unwrap());
        for row in got.chunks(n - qkv) {
            for (got, want) in row.iter().zip(&want) {
                let off = (got - want).abs() / spacing(*want);
                assert!(off <= MOST_SPACINGS, "{kernel:?}: {got} for {want}, off by {off} spacings");
            }
        }
    }
}
