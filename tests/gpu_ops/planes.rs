//! Activations as planes of bytes (src/planes.rs): layernorm and attn_decode write them, gptq_batch reads and writes them.

use peregrine::gpu::ops::{self, Activations, MatmulKernel, MatmulOutput, Norm, PendingSum};
use peregrine::gpu::{DevBuf, Stream};
use peregrine::{planes, reference};

use crate::kit::*;

/// Sums of bytes are exact, those of units are added in f32: 71 of them, 2^-24 / sqrt(12) each of a sum that grows. Measured: 1.4e-7.
const SUMS_TOLERANCE: f64 = 2e-7;
/// A value is rounded to steps of the largest of 64 / 32639: sqrt(1/12) of a step, 2.7e-5 of values whose largest is three times the usual
/// one; and what f32 loses in front of that. f16 would cost 2e-4. Measured: 3.2e-5.
const ROUNDED_TOLERANCE: f64 = 5e-5;
/// The same of GELU, where the largest may be six times the usual one. Measured: 5.7e-5.
const GELU_TOLERANCE: f64 = 7e-5;
/// Rounding to f16: 2.8e-4 at most. Measured: 2.2e-4.
const F16_TOLERANCE: f64 = 3e-4;

/// Where nothing was written: no step is one.
const UNTOUCHED: u16 = 0xffff;

fn untouched(stream: &Stream, stride: usize) -> DevBuf<u16> {
    DevBuf::from_host(stream, "planes", &vec![UNTOUCHED; planes::len(stride)]).unwrap()
}

/// The rows of `m` tokens, after a look at those that are not there.
fn rows_of(buffer: &[u16], inputs: usize, m: usize) -> Vec<f32> {
    let mut rows = planes::decode(buffer, inputs, planes::PLANE_TOKENS);
    assert!(rows.split_off(m * inputs).iter().all(|v| v.is_nan()), "wrote rows of tokens that are not there");
    rows
}

/// Whether this GPU has planes at all. Where L2 is known to have sides it is a Hopper, which has.
fn planes_here(stream: &Stream) -> bool {
    let q = Quantised::new(&mut Random::new(1), 64, 64, G64);
    let here = ops::gptq_batch_planes(stream, &repack(stream, 64, 64, &[(&q, 0, 0)])).unwrap();
    assert!(here || stream.sides().is_none() || cfg!(not(peregrine_sm90)), "a Hopper without planes");
    if !here {
        eprintln!("SKIPPED: no planes on this GPU, or by code for another");
    }
    here
}

#[test]
fn layernorm_as_planes_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    if !planes_here(&stream) {
        return;
    }
    let mut random = Random::new(5);
    for hidden in [64, 320, 4544, 8192] {
        let (weight, bias) = (random.values(hidden, 1.0), random.values(hidden, 0.5));
        let norm = Norm {
            weight: DevBuf::from_host(&stream, "weight", &weight).unwrap(),
            bias: DevBuf::from_host(&stream, "bias", &bias).unwrap(),
            epsilon: 1e-5,
        };
        for (m, slices) in [(1, 0), (9, 5), (15, 3), (16, 0), (16, 5)] {
            let mut x = random.values(m * hidden, 3.0);
            let partials = random.values(slices * m * hidden, 1.0);
            let partials_gpu = DevBuf::from_host(&stream, "partials", &partials).unwrap();
            let run = |x: &[f32]| {
                let mut x = DevBuf::from_host(&stream, "x", x).unwrap();
                let mut out = untouched(&stream, hidden);
                let pending =
                    (slices > 0).then_some(PendingSum { partials: &partials_gpu, slices, bias: None });
                ops::layernorm(&stream, &norm, &mut x, pending, m, &mut out, true).unwrap();
                (x.download(&stream, 0, m * hidden).unwrap(), out.download(&stream, 0, out.len()).unwrap())
            };
            let (new_x, out) = run(&x);
            assert!(run(&x) == (new_x.clone(), out.clone()), "second run differs");
            partials.chunks(m * hidden).for_each(|part| reference::add(&mut x, part));
            assert_eq!(new_x, x, "the residual is added in slice order");
            let want = reference::layernorm(&x, &weight, &bias, 1e-5);
            let what = format!("layernorm as planes {hidden} m {m} slices {slices}");
            assert_close(&what, &rows_of(&out, hidden, m), &want, ROUNDED_TOLERANCE);
        }
    }
}

/// What is no number stays none, and a row of zeros is one.
#[test]
fn layernorm_as_planes_hides_no_nan() {
    let Some((_, stream)) = gpu() else { return };
    if !planes_here(&stream) {
        return;
    }
    let mut random = Random::new(6);
    let (hidden, m) = (320, 9);
    let mut weight = vec![0.0; hidden];
    weight[70] = f32::NAN;
    weight[130] = f32::INFINITY;
    let norm = Norm {
        weight: DevBuf::from_host(&stream, "weight", &weight).unwrap(),
        bias: DevBuf::from_host(&stream, "bias", &vec![0.0; hidden]).unwrap(),
        epsilon: 1e-5,
    };
    let mut x = DevBuf::from_host(&stream, "x", &random.values(m * hidden, 1.0)).unwrap();
    let mut out = untouched(&stream, hidden);
    ops::layernorm(&stream, &norm, &mut x, None, m, &mut out, true).unwrap();
    let out = rows_of(&out.download(&stream, 0, out.len()).unwrap(), hidden, m);
    for row in out.chunks(hidden) {
        assert!(row[..64].iter().chain(&row[192..]).all(|&v| v == 0.0));
        assert!(row[64..192].iter().all(|v| !v.is_finite()), "of a unit with what is not finite all are not");
    }
}

#[test]
fn gptq_batch_of_planes_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    if !planes_here(&stream) {
        return;
    }
    let mut random = Random::new(31);
    for (n, k, slices) in [
        (16, 64, 1),
        (48, 320, 1),
        (64, 1984, 1),
        (304, 4672, 1),
        (448, 1600, 2),
        (22848, 4544, 1),
        (4544, 22720, 5),
    ] {
        let q = Quantised::new(&mut random, n, k, G64);
        let (w, copy) = (repack(&stream, n, k, &[(&q, 0, 0)]), repack(&stream, n, k, &[(&q, 0, 0)]));
        copy.lay_near(&stream, slices).unwrap();
        // Else the bits below are compared with their own: as in check_sliced.
        let last_units = k / 64 - (slices - 1) * (k / 64).div_ceil(slices);
        let wanted = stream.sides().is_some() && last_units >= 6;
        assert_eq!(copy.bytes() > copy.plain_bytes(), wanted, "[{n}, {k}]: a copy");
        for m in [9, 10, 15, 16] {
            let x = planes::encode(&random.values(m * k, 1.0), k);
            let want = reference::gptq_matmul(&planes::decode(&x, k, m), &q.tensor());
            let x_gpu = DevBuf::from_host(&stream, "x", &x).unwrap();
            let run = |w: &ops::Int4Matrix| {
                let mut out = nan32(&stream, slices * m * n);
                let a = Activations { x: &x_gpu, stride: k, tokens: m, planes: true, attention: None };
                let output = MatmulOutput::Partials(&mut out);
                ops::gptq_matmul(&stream, MatmulKernel::Batch, w, 0..n, a, slices, output).unwrap();
                out.download(&stream, 0, slices * m * n).unwrap()
            };
            let got = run(&w);
            let sums: Vec<f32> = (0..m * n).map(|i| (0..slices).map(|s| got[s * m * n + i]).sum()).collect();
            assert_close(&format!("planes [{n}, {k}] m {m}"), &sums, &want, SUMS_TOLERANCE);
            let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert!(bits(&got) == bits(&run(&w)), "[{n}, {k}] m {m}: second run differs");
            assert!(bits(&got) == bits(&run(&copy)), "[{n}, {k}] m {m}: by the copy");
        }
    }
}

#[test]
fn gptq_batch_to_planes_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    if !planes_here(&stream) {
        return;
    }
    let mut random = Random::new(32);
    // The last inputs of a row are attention's: nobody touches them here.
    for (qkv, ffn, hidden) in [(64, 192, 64), (448, 1280, 320), (4672, 18176, 4544)] {
        let (a, b) =
            (Quantised::new(&mut random, qkv, hidden, G64), Quantised::new(&mut random, ffn, hidden, G64));
        let w = repack(&stream, qkv + ffn, hidden, &[(&a, 0, 0), (&b, qkv, 0)]);
        let bias = random.values(qkv + ffn, 0.5);
        let bias_gpu = DevBuf::from_host(&stream, "bias", &bias).unwrap();
        let stride = ffn + hidden;
        for m in [9, 16] {
            let x = planes::encode(&random.values(m * hidden, 1.0), hidden);
            let values = planes::decode(&x, hidden, m);
            let x_gpu = DevBuf::from_host(&stream, "x", &x).unwrap();
            let with_bias = |mut y: Vec<f32>, bias: &[f32]| {
                y.chunks_mut(bias.len()).for_each(|row| reference::add(row, bias));
                y
            };
            let want_qkv = with_bias(reference::gptq_matmul(&values, &a.tensor()), &bias[..qkv]);
            let mut want_up = with_bias(reference::gptq_matmul(&values, &b.tensor()), &bias[qkv..]);
            reference::gelu(&mut want_up);
            let run = || {
                let (mut out, mut gelu_out) = (nan16(&stream, m * qkv), untouched(&stream, stride));
                let output = MatmulOutput::Split {
                    out: &mut out,
                    gelu_out: &mut gelu_out,
                    gelu_stride: stride,
                    split_row: qkv,
                    planes: true,
                    bias: Some(&bias_gpu),
                    announced: None,
                    next: None,
                };
                let a = Activations { x: &x_gpu, stride: hidden, tokens: m, planes: true, attention: None };
                ops::gptq_matmul(&stream, MatmulKernel::Batch, &w, 0..qkv + ffn, a, 1, output).unwrap();
                (
                    out.download(&stream, 0, m * qkv).unwrap(),
                    gelu_out.download(&stream, 0, gelu_out.len()).unwrap(),
                )
            };
            let (out, wide) = run();
            assert!((out.clone(), wide.clone()) == run(), "m {m}: second run differs");
            assert_close(&format!("qkv of planes m {m}"), &to_f32(&out), &want_qkv, F16_TOLERANCE);
            let wide = planes::decode(&wide, stride, m);
            let up: Vec<f32> = wide.chunks(stride).flat_map(|row| row[..ffn].to_vec()).collect();
            assert_close(&format!("gelu as planes [{ffn}] m {m}"), &up, &want_up, GELU_TOLERANCE);
            let rest = wide.chunks(stride).flat_map(|row| &row[ffn..]);
            assert!(rest.into_iter().all(|v| v.is_nan()), "wrote beyond the MLP's part");
        }
    }
}
