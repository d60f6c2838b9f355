//! gptq_gemv, gptq_batch, gptq_gemm.

use peregrine::gpu::ops::{self, Activations, GEMV_TOKENS, MatmulKernel, MatmulOutput};
use peregrine::gpu::{DevBuf, Stream};
use peregrine::reference;
use peregrine::repack::InputOrder;

use crate::kit::*;

/// f32 sums by gptq_gemv, which rounds a token's inputs of a warp (384 at most) to steps of the largest / 32639: sqrt(1/12) of a step
/// each, 2.7e-5 of inputs whose largest is three times the usual one, as here. Rounding them to f16 has cost ten times that.
/// Measured at the 7B's shapes: 1.3e-5.
const GEMV_TOLERANCE: f64 = 5e-5;
/// The same by gptq_batch on Hopper, where a slice of a row (4544 inputs here, at most 4672) is one chain of the tensor core, whose f32 adds
/// truncate: some 292 * 2/3 * 2^-24 = 1.2e-5 of the result at most, see GEMM_TOLERANCE. Measured: 4.8e-6. Elsewhere: 1.6e-7.
const BATCH_TOLERANCE: f64 = 1.2e-5;
/// The same by gptq_gemm, whose weights are AutoGPTQ's f16(scale * (code - zero)) (exact here) and whose sums are one chain of the tensor
/// core: each of a row's 22720 / 16 = 1420 adds truncates the sum so far, by 2^-24 of it on average; sums grow like a random walk, so
/// some 1420 * 2/3 * 2^-24 = 5.6e-5 of the result at most, a fifth of what rounding it to f16 costs. Measured: 2.6e-5.
const GEMM_TOLERANCE: f64 = 5.6e-5;
/// The same rounded to f16: 2^-11 / sqrt(3) = 2.8e-4 at most. Measured: 2.2e-4.
const F16_TOLERANCE: f64 = 3e-4;

/// x as the matrix wants it: gathered when there is act-order.
fn gathered(x: &[u16], k: usize, q: &Quantised) -> Vec<u16> {
    match InputOrder::of(&q.tensor()).unwrap().source {
        None => x.to_vec(),
        Some(source) => {
            x.chunks(k).flat_map(|row| source.iter().map(|&i| row[i as usize]).collect::<Vec<_>>()).collect()
        }
    }
}

/// Sums of slices in order, as layernorm adds them.
fn sum_slices(partials: &[f32], slices: usize) -> Vec<f32> {
    let n = partials.len() / slices;
    (0..n).map(|i| (0..slices).map(|s| partials[s * n + i]).sum()).collect()
}

fn run_partials(
    stream: &Stream,
    kernel: MatmulKernel,
    w: &ops::Int4Matrix,
    x: &DevBuf<u16>,
    m: usize,
    slices: usize,
) -> Vec<f32> {
    let mut out = nan32(stream, slices * m * w.n);
    let a = Activations { x, stride: w.k, tokens: m, planes: false, attention: None };
    ops::gptq_matmul(stream, kernel, w, 0..w.n, a, slices, MatmulOutput::Partials(&mut out)).unwrap();
    out.download(stream, 0, slices * m * w.n).unwrap()
}

fn check_partials(stream: &Stream, kernel: MatmulKernel, q: &Quantised, seed: u64, tokens: &[usize]) {
    check_sliced(stream, kernel, q, seed, tokens, ops::slices(q.k), 0);
}

fn check_sliced(
    stream: &Stream,
    kernel: MatmulKernel,
    q: &Quantised,
    seed: u64,
    tokens: &[usize],
    slices: usize,
    attn_input: usize,
) {
    let matrix = || repack(stream, q.n, q.k, &[(q, 0, 0)]).with_attn_input(attn_input);
    let w = matrix();
    let by_copy = (kernel == MatmulKernel::Batch).then(|| {
        let copied = matrix();
        copied.lay_near(stream, slices).unwrap();
        // There is one where L2 has sides and the kernel is Hopper's, if each slice has a stage: else the bits below are compared with their own.
        let last_units = q.k / 64 - (slices - 1) * (q.k / 64).div_ceil(slices);
        let wanted = stream.sides().is_some() && cfg!(peregrine_sm90) && last_units >= 6;
        assert_eq!(copied.bytes() > copied.plain_bytes(), wanted, "[{}, {}]: a copy", q.n, q.k);
        copied
    });
    for &m in tokens {
        let x = Random::new(seed + m as u64).halves(m * q.k, 1.0);
        let want = reference::gptq_matmul(&to_f32(&x), &q.tensor());
        let x = DevBuf::from_host(stream, "x", &gathered(&x, q.k, q)).unwrap();
        let got = run_partials(stream, kernel, &w, &x, m, slices);
        assert_close(
            &format!("{kernel:?} [{}, {}] m {m}", q.n, q.k),
            &sum_slices(&got, slices),
            &want,
            f32_tolerance(kernel),
        );
        let again = run_partials(stream, kernel, &w, &x, m, slices);
        assert!(same_bits(&got, &again), "{kernel:?} m {m}: second run differs");
        if let Some(copy) = &by_copy {
            let got_by_copy = run_partials(stream, kernel, copy, &x, m, slices);
            assert!(same_bits(&got, &got_by_copy), "{kernel:?} [{}, {}] m {m}: by the copy", q.n, q.k);
        }
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn f32_tolerance(kernel: MatmulKernel) -> f64 {
    match kernel {
        MatmulKernel::Gemv => GEMV_TOLERANCE,
        MatmulKernel::Batch => BATCH_TOLERANCE,
        MatmulKernel::Gemm => GEMM_TOLERANCE,
    }
}

#[test]
fn gptq_gemv_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let mut random = Random::new(2);
    for format in FORMATS {
        let q = Quantised::new(&mut random, 448, 320, format);
        check_partials(&stream, MatmulKernel::Gemv, &q, 20, &[1, 2, 3, 5, 8]);
    }
    for (n, k) in [(16, 64), (32, 4544), (48, 4608), (64, 4672), (4544, 22720), (22848, 4544)] {
        let q = Quantised::new(&mut random, n, k, G64);
        check_partials(&stream, MatmulKernel::Gemv, &q, 21, &[1, 7]);
    }
}

#[test]
fn gptq_batch_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let mut random = Random::new(12);
    let tokens = [1, 5, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 40, 41, 48, 49, 63, 64, 65, 71, 72];
    for format in FORMATS {
        let q = Quantised::new(&mut random, 448, 320, format);
        check_partials(&stream, MatmulKernel::Batch, &q, 22, &tokens);
        // More stages of weights than any ring has.
        let q = Quantised::new(&mut random, 64, 1984, format);
        check_partials(&stream, MatmulKernel::Batch, &q, 25, &[8, 16, 24, 32, 40, 48, 64, 72]);
    }
    for (n, k) in [(16, 64), (48, 320), (304, 4672)] {
        let q = Quantised::new(&mut random, n, k, G64);
        check_partials(&stream, MatmulKernel::Batch, &q, 23, &tokens);
    }
    for (n, k) in [(4544, 22720), (22848, 4544)] {
        let q = Quantised::new(&mut random, n, k, G64);
        check_partials(&stream, MatmulKernel::Batch, &q, 24, &[8, 9, 17, 32, 33, 48, 49, 72]);
    }
}

/// Slices that end with inputs of attention: the 7B's, and where those begin within a unit's stage, or one slice has all.
#[test]
fn gptq_batch_takes_inputs_of_attention_last() {
    let Some((_, stream)) = gpu() else { return };
    let mut random = Random::new(14);
    for (n, k, slices, attn_input) in [
        (4544, 22720, 5, 18176),
        (320, 1600, 5, 1280),
        (64, 1536, 4, 1216),
        (64, 640, 2, 64),
        (48, 512, 1, 320),
    ] {
        let q = Quantised::new(&mut random, n, k, G64);
        check_sliced(&stream, MatmulKernel::Batch, &q, 26, &[9, 16, 32, 64, 72], slices, attn_input);
    }
}

/// Each output has digits of its own, however small its scales are beside the others'.
#[test]
fn products_take_scales_of_any_size() {
    let Some((_, stream)) = gpu() else { return };
    let mut random = Random::new(13);
    for format in FORMATS {
        let mut q = Quantised::new(&mut random, 448, 320, format);
        q.scale_outputs(|n| (n as f32 % 21.0 - 10.0).exp2()); // scales of 2^-17 to 2^4
        let w = repack(&stream, q.n, q.k, &[(&q, 0, 0)]);
        let kernels = [8, 9, 32, 63, 71].map(|m| (MatmulKernel::Batch, m));
        for (kernel, m) in kernels.into_iter().chain([(MatmulKernel::Gemm, 130)]) {
            let x = Random::new(25 + m as u64).halves(m * q.k, 1.0);
            let want = reference::gptq_matmul(&to_f32(&x), &q.tensor());
            let x = DevBuf::from_host(&stream, "x", &gathered(&x, q.k, &q)).unwrap();
            let got = run_partials(&stream, kernel, &w, &x, m, 1);
            let row = |y: &[f32], n: usize| -> Vec<f32> { y.iter().skip(n).step_by(q.n).copied().collect() };
            for n in 0..q.n {
                let what = format!("{kernel:?} {format:?} m {m} output {n}");
                assert_close(&what, &row(&got, n), &row(&want, n), BATCH_TOLERANCE);
            }
        }
    }
}

#[test]
fn gptq_gemm_matches_reference() {
    let Some((_, stream)) = gpu() else { return };
    let mut random = Random::new(3);
    for format in FORMATS {
        let q = Quantised::new(&mut random, 448, 320, format);
        check_partials(
            &stream,
            MatmulKernel::Gemm,
            &q,
            30,
            &[
                1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 72, 73, 80, 81, 96, 97, 127, 128, 129, 145, 160, 161,
                192, 193, 255, 256, 257, 300,
            ],
        );
    }
    // With one slice a row's inputs are one chain, or the tile is shared by several blocks.
    let q = Quantised::new(&mut random, 1616, 22720, G64);
    check_sliced(&stream, MatmulKernel::Gemm, &q, 32, &[65, 129, 200], 1, 0);
    let q = Quantised::new(&mut random, 816, 7360, G64);
    check_sliced(&stream, MatmulKernel::Gemm, &q, 33, &[80, 96, 97, 150, 180, 200, 512], 1, 0);
    for (n, k) in [(16, 64), (4544, 22720), (22848, 4544)] {
        let q = Quantised::new(&mut random, n, k, G64);
        check_partials(&stream, MatmulKernel::Gemm, &q, 31, &[9, 65]);
    }
}

/// A token gives the same bits alone and among others, in any place.
#[test]
fn gptq_gemv_does_not_depend_on_the_batch() {
    let Some((_, stream)) = gpu() else { return };
    let q = Quantised::new(&mut Random::new(4), 4544, 22720, G64);
    let w = repack(&stream, q.n, q.k, &[(&q, 0, 0)]);
    let slices = ops::slices(q.k);
    let x = Random::new(5).halves(GEMV_TOKENS * q.k, 1.0);
    let all = DevBuf::from_host(&stream, "x", &x).unwrap();
    for m in [2, 5, 8] {
        let batch = run_partials(&stream, MatmulKernel::Gemv, &w, &all, m, slices);
        for token in 0..m {
            let one = DevBuf::from_host(&stream, "x", &x[token * q.k..(token + 1) * q.k]).unwrap();
            let alone = run_partials(&stream, MatmulKernel::Gemv, &w, &one, 1, slices);
            for s in 0..slices {
                let row = &batch[(s * m + token) * q.n..(s * m + token + 1) * q.n];
                assert!(
                    row.iter().zip(&alone[s * q.n..]).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "m {m} token {token} slice {s}"
                );
            }
        }
    }
}

/// [qkv ; up] from two tensors: bias, GELU and the two destinations; and the two row ranges apart, as act-order needs them.
#[test]
fn gptq_matmul_splits_rows() {
    let Some((_, stream)) = gpu() else { return };
    for (hidden, ffn) in [(320, 1280), (4544, 18176)] {
        let (qkv, stride) = (hidden + 128, ffn + hidden);
        let mut random = Random::new(6);
        let (a, b) =
            (Quantised::new(&mut random, qkv, hidden, G64), Quantised::new(&mut random, ffn, hidden, G64));
        let w = repack(&stream, qkv + ffn, hidden, &[(&a, 0, 0), (&b, qkv, 0)]);
        let bias = random.values(qkv + ffn, 0.5);
        let bias_gpu = DevBuf::from_host(&stream, "bias", &bias).unwrap();
        for (kernel, m) in [
            (MatmulKernel::Gemv, 1),
            (MatmulKernel::Gemv, 8),
            (MatmulKernel::Batch, 7),
            (MatmulKernel::Batch, 9),
            (MatmulKernel::Batch, 32),
            (MatmulKernel::Batch, 63),
            (MatmulKernel::Batch, 71),
            (MatmulKernel::Gemm, 130),
            (MatmulKernel::Gemm, 257),
        ] {
            let x = random.halves(m * hidden, 1.0);
            let x_gpu = DevBuf::from_host(&stream, "x", &x).unwrap();
            let with_bias = |mut y: Vec<f32>, bias: &[f32]| {
                y.chunks_mut(bias.len()).for_each(|row| reference::add(row, bias));
                y
            };
            let want_qkv = with_bias(reference::gptq_matmul(&to_f32(&x), &a.tensor()), &bias[..qkv]);
            let mut want_up = with_bias(reference::gptq_matmul(&to_f32(&x), &b.tensor()), &bias[qkv..]);
            reference::gelu(&mut want_up);
            let mut previous = None;
            for ranges in [vec![0..qkv + ffn], vec![0..qkv, qkv..qkv + ffn]] {
                let (mut out, mut gelu_out) = (nan16(&stream, m * qkv), nan16(&stream, m * stride));
                for rows in ranges {
                    let output = MatmulOutput::Split {
                        out: &mut out,
                        gelu_out: &mut gelu_out,
                        gelu_stride: stride,
                        split_row: qkv,
                        planes: false,
                        bias: Some(&bias_gpu),
                        announced: None,
                        next: None,
                    };
                    let a =
                        Activations { x: &x_gpu, stride: hidden, tokens: m, planes: false, attention: None };
                    ops::gptq_matmul(&stream, kernel, &w, rows, a, 1, output).unwrap();
                }
                let out = out.download(&stream, 0, m * qkv).unwrap();
                let wide = gelu_out.download(&stream, 0, m * stride).unwrap();
                assert_close(&format!("qkv {kernel:?} m {m}"), &to_f32(&out), &want_qkv, F16_TOLERANCE);
                let up: Vec<u16> = wide.chunks(stride).flat_map(|row| row[..ffn].to_vec()).collect();
                assert_close(&format!("gelu {kernel:?} m {m}"), &to_f32(&up), &want_up, F16_TOLERANCE);
                assert!(
                    wide.chunks(stride).all(|row| row[ffn..].iter().all(|&h| h == NAN16)),
                    "wrote beyond the MLP's part"
                );
                let bits = (out, wide);
                // gptq_gemm shares tiles between blocks by how many rows there are, so its sums are in another order.
                assert!(
                    kernel == MatmulKernel::Gemm || previous.as_ref().is_none_or(|p| *p == bits),
                    "row ranges apart differ from one launch"
                );
                previous = Some(bits);
            }
        }
    }
}

/// [down | dense] from two tensors, added to the residual with its bias.
#[test]
fn gptq_matmul_adds_to_the_residual() {
    let Some((_, stream)) = gpu() else { return };
    let (hidden, ffn) = (320, 1280);
    let mut random = Random::new(7);
    let (down, dense) =
        (Quantised::new(&mut random, hidden, ffn, G64), Quantised::new(&mut random, hidden, hidden, G64));
    let w = repack(&stream, hidden, ffn + hidden, &[(&down, 0, 0), (&dense, 0, ffn)]);
    let bias = random.values(hidden, 0.5);
    let bias_gpu = DevBuf::from_host(&stream, "bias", &bias).unwrap();
    for (kernel, m) in [
        (MatmulKernel::Batch, 9),
        (MatmulKernel::Batch, 64),
        (MatmulKernel::Batch, 70),
        (MatmulKernel::Gemm, 200),
    ] {
        let x = random.halves(m * (ffn + hidden), 1.0);
        let residual = random.values(m * hidden, 1.0);
        let part = |range: std::ops::Range<usize>| -> Vec<f32> {
            x.chunks(ffn + hidden).flat_map(|row| to_f32(&row[range.clone()])).collect()
        };
        let mut want = residual.clone();
        reference::add(&mut want, &reference::gptq_matmul(&part(0..ffn), &down.tensor()));
        reference::add(&mut want, &reference::gptq_matmul(&part(ffn..ffn + hidden), &dense.tensor()));
        want.chunks_mut(hidden).for_each(|row| reference::add(row, &bias));
        let mut got = DevBuf::from_host(&stream, "residual", &residual).unwrap();
        let x_gpu = DevBuf::from_host(&stream, "x", &x).unwrap();
        let a = Activations { x: &x_gpu, stride: ffn + hidden, tokens: m, planes: false, attention: None };
        let output = MatmulOutput::Residual { x: &mut got, bias: Some(&bias_gpu) };
        ops::gptq_matmul(&stream, kernel, &w, 0..hidden, a, 1, output).unwrap();
        let got = got.download(&stream, 0, m * hidden).unwrap();
        assert_close(&format!("residual m {m}"), &got, &want, f32_tolerance(kernel));
    }
}
