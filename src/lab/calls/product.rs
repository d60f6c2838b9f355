//! Calls of the quantised products.

use super::super::kit::{self, G64, Quantised, Random, to_f32};
use super::super::{FFN, HIDDEN};
use super::{Call, F32_TOLERANCE, Output, all, guarded, only, trespass};
use crate::error::Result;
use crate::gpu::ops::{self, Activations, Int4Matrix, MatmulKernel, MatmulOutput};
use crate::gpu::{DevBuf, Stream};
use crate::measure::work::Work;
use crate::reference;

/// The calls of a product.
pub(super) fn calls(op: &str, stream: &Stream, timing: bool, calls: &mut Vec<Box<dyn Call>>) -> Result<()> {
    for (n, k, m) in shapes(op, timing) {
        calls.push(Box::new(ProductCall::new(stream, op, n, k, m)?));
    }
    Ok(())
}

/// `n`, `k` and tokens.
fn shapes(op: &str, timing: bool) -> Vec<(usize, usize, usize)> {
    let (up, down) = ((HIDDEN + 128 + FFN, HIDDEN), (HIDDEN, FFN + HIDDEN));
    let (small, real): (&[usize], &[usize]) = match (op, timing) {
        ("gptq_gemv", false) => (&[1, 2, 7, 8], &[1, 8]),
        ("gptq_batch", false) => (&[1, 9, 17, 33, 63, 64], &[9]),
        (_, false) => (&[1, 63, 64, 65, 129], &[65]),
        ("gptq_gemv", true) => (&[], &[1, 8]),
        ("gptq_batch", true) => (&[], &[16, 64]),
        (_, true) => (&[], &[128, 512]),
    };
    let edges = small.iter().flat_map(|&m| [(16, 64, m), (448, 320, m)]);
    edges.chain(real.iter().flat_map(|&m| [(up.0, up.1, m), (down.0, down.1, m)])).collect()
}

/// The same by gptq_gemv, which subtracts the zero points after the sum. Measured: 9.2e-7.
const GEMV_TOLERANCE: f64 = 2e-6;
/// The same by gptq_gemm, whose weights are AutoGPTQ's f16(scale * (code - zero)) (exact here) and whose sums are one chain of the tensor
/// core: each of a row's 22720 / 16 = 1420 adds truncates the sum so far, by 2^-24 of it on average; sums grow like a random walk, so
/// some 1420 * 2/3 * 2^-24 = 5.6e-5 of the result at most. Measured: 2.6e-5.
const GEMM_TOLERANCE: f64 = 5.6e-5;

struct ProductCall {
    op: &'static str,
    kernel: MatmulKernel,
    m: usize,
    slices: usize,
    quantised: Quantised,
    host_x: Vec<u16>,
    w: Int4Matrix,
    x: DevBuf<u16>,
    out: DevBuf<f32>,
}

impl ProductCall {
    fn new(stream: &Stream, op: &str, n: usize, k: usize, m: usize) -> Result<ProductCall> {
        let (op, kernel) = match op {
            "gptq_gemv" => ("gptq_gemv", MatmulKernel::Gemv),
            "gptq_batch" => ("gptq_batch", MatmulKernel::Batch),
            _ => ("gptq_gemm", MatmulKernel::Gemm),
        };
        let mut random = Random::new((n * 3 + k + m) as u64);
        let quantised = Quantised::new(&mut random, n, k, G64);
        let mut w = kit::repack(stream, n, k, &[(&quantised, 0, 0)])?;
        // The same units between guards.
        w.units = guarded(stream, "units", &w.units.download(stream, 0, w.units.len())?)?;
        let slices = ops::slices(k);
        let host_x = random.halves(m * k, 1.0);
        let x = guarded(stream, "x", &host_x)?;
        let out = guarded(stream, "partials", &vec![f32::NAN; slices * m * n])?;
        Ok(ProductCall { op, kernel, m, slices, quantised, host_x, w, x, out })
    }
}

impl Call for ProductCall {
    fn label(&self) -> String {
        format!("{} [{}, {}] m {}", self.op, self.w.n, self.w.k, self.m)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.out.upload(stream, 0, &vec![f32::NAN; self.slices * self.m * self.w.n])
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        let a = Activations { x: &self.x, stride: self.w.k, tokens: self.m };
        let output = MatmulOutput::Partials(&mut self.out);
        ops::gptq_matmul(stream, self.kernel, &self.w, 0..self.w.n, a, self.slices, output)
    }

    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>> {
        let partials = all(stream, &self.out)?;
        let n = partials.len() / self.slices;
        let got = (0..n).map(|i| (0..self.slices).map(|s| partials[s * n + i]).sum()).collect();
        let want = only(wanted, || reference::gptq_matmul(&to_f32(&self.host_x), &self.quantised.tensor()));
        let tolerance = match self.kernel {
            MatmulKernel::Gemv => GEMV_TOLERANCE,
            MatmulKernel::Batch => F32_TOLERANCE,
            MatmulKernel::Gemm => GEMM_TOLERANCE,
        };
        Ok(vec![Output { name: "sum of partials", row: self.w.n, got, want, tolerance }])
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "partials": self.out, "x": self.x, "units": self.w.units)
    }

    fn work(&self) -> Work {
        let moved = self.m * self.w.k * 2 + self.slices * self.m * self.w.n * 4;
        Work {
            bytes: (self.w.units.len() + moved) as f64,
            flop: 2.0 * (self.m * self.w.n) as f64 * self.w.k as f64,
        }
    }
}
