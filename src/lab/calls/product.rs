//! Calls of the quantised products: each kind of output the forward pass asks for, and each kind of matrix.

use super::super::kit::{self, Format, G64, Quantised, Random, to_f32};
use super::super::{FFN, HIDDEN};
use super::{Call, F16_TOLERANCE, Output, all, guarded, only, trespass};
use crate::error::Result;
use crate::gpu::ops::{self, Activations, BATCH_TOKENS, GEMV_TOKENS, Int4Matrix, MatmulKernel, MatmulOutput};
use crate::gpu::{DevBuf, Stream};
use crate::measure::work::Work;
use crate::{planes, reference};

/// Where nothing was written: no number in f16, and no step of planes, which are two of them.
const UNSET: u16 = u16::MAX;

/// What becomes of the sums.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Those of each K slice apart, f32.
    Partials,
    /// Added to the residual with the bias, f32.
    Residual,
    /// f16: rows below the split as they are, the others through GELU, both with the bias.
    Split,
}

/// A call's matrix, tokens and output.
#[derive(Clone, Copy)]
struct Shape {
    n: usize,
    k: usize,
    m: usize,
    form: Form,
    format: Format,
    /// First row that goes through GELU.
    split_row: usize,
    /// Values between two tokens of GELU's output.
    gelu_stride: usize,
    /// Activations, and GELU's output, are planes of bytes.
    planes: bool,
}

impl Shape {
    /// `[qkv ; up]` of Falcon-7B, as its forward pass calls it.
    fn up(m: usize) -> Shape {
        let split_row = HIDDEN + 128;
        let (n, gelu_stride) = (split_row + FFN, FFN + HIDDEN);
        Shape { n, k: HIDDEN, m, form: Form::Split, format: G64, split_row, gelu_stride, planes: false }
    }

    /// `[down | dense]`.
    fn down(m: usize, form: Form) -> Shape {
        Shape {
            n: HIDDEN,
            k: FFN + HIDDEN,
            m,
            form,
            format: G64,
            split_row: 0,
            gelu_stride: 0,
            planes: false,
        }
    }

    /// A small one.
    fn small(n: usize, k: usize, m: usize, form: Form, format: Format) -> Shape {
        let split_row = n / 32 * 16;
        Shape { n, k, m, form, format, split_row, gelu_stride: n - split_row + 64, planes: false }
    }
}

const ASYMMETRIC: Format = Format { asymmetric: true, ..G64 };
const GROUP_32: Format = Format { group_size: 32, ..G64 };

/// The calls of a product.
pub(super) fn calls(op: &str, stream: &Stream, timing: bool, calls: &mut Vec<Box<dyn Call>>) -> Result<()> {
    let (op, kernel) = match op {
        "gptq_gemv" => ("gptq_gemv", MatmulKernel::Gemv),
        "gptq_batch" => ("gptq_batch", MatmulKernel::Batch),
        _ => ("gptq_gemm", MatmulKernel::Gemm),
    };
    for shape in shapes(kernel, timing) {
        calls.push(Box::new(ProductCall::new(stream, op, kernel, shape)?));
    }
    Ok(())
}

/// Those of `gptq_batch` whose activations are planes, where the GPU takes them.
pub(super) fn planes_calls(stream: &Stream, timing: bool, calls: &mut Vec<Box<dyn Call>>) -> Result<()> {
    let pair = |m: usize| [Shape::up(m), Shape::down(m, Form::Partials)];
    let mut shapes: Vec<Shape> = if timing { pair(16).into() } else { pair(9).into() };
    if !timing {
        let split =
            Shape { split_row: 192, gelu_stride: 320, ..Shape::small(448, 320, 16, Form::Split, G64) };
        shapes.extend([split, Shape::small(448, 320, 16, Form::Partials, G64)]);
    }
    for shape in shapes {
        let shape = Shape { planes: true, ..shape };
        let call = ProductCall::new(stream, "gptq_batch", MatmulKernel::Batch, shape)?;
        if !ops::gptq_batch_planes(stream, &call.w)? {
            break;
        }
        calls.push(Box::new(call));
    }
    Ok(())
}

fn shapes(kernel: MatmulKernel, timing: bool) -> Vec<Shape> {
    let few = match kernel {
        MatmulKernel::Gemv => GEMV_TOKENS,
        MatmulKernel::Batch => BATCH_TOKENS,
        MatmulKernel::Gemm => 0,
    };
    // As the forward pass has it: a few tokens leave their slices to the norm.
    let down = |m: usize| Shape::down(m, if m <= few { Form::Partials } else { Form::Residual });
    let pair = |m: usize| [Shape::up(m), down(m)];
    if timing {
        let tokens: &[usize] = match kernel {
            MatmulKernel::Gemv => &[1, 8],
            MatmulKernel::Batch => &[8, 16, 32, 64, 72],
            MatmulKernel::Gemm => &[128, 512, 2048],
        };
        return tokens.iter().flat_map(|&m| pair(m)).collect();
    }
    let (edges, real): (&[usize], &[usize]) = match kernel {
        MatmulKernel::Gemv => (&[1, 2, 7, 8], &[1, 8]),
        MatmulKernel::Batch => (&[1, 8, 9, 17, 33, 49, 63, 64, 65, 72], &[9]),
        MatmulKernel::Gemm => (&[1, 63, 64, 65, 129], &[65]),
    };
    let mut shapes = Vec::new();
    for &m in edges {
        shapes.extend([
            Shape::small(16, 64, m, Form::Partials, G64),
            Shape::small(448, 320, m, Form::Partials, G64),
            Shape::small(448, 320, m, Form::Split, G64),
        ]);
        shapes.extend((m > few).then_some(Shape::small(448, 320, m, Form::Residual, G64)));
    }
    let last = edges.last().copied().unwrap_or(1);
    shapes.extend([ASYMMETRIC, GROUP_32].map(|f| Shape::small(448, 320, last, Form::Partials, f)));
    shapes.extend(real.iter().flat_map(|&m| pair(m)));
    shapes
}

/// The same by gptq_gemv, which rounds a token's inputs of a warp (384 at most) to steps of the largest / 32639: sqrt(1/12) of a step
/// each, 2.7e-5 of inputs whose largest is three times the usual one, as here. Rounding them to f16 has cost ten times that.
/// Measured at the 7B's shapes: 1.3e-5.
const GEMV_TOLERANCE: f64 = 5e-5;
/// The same by gptq_batch on Hopper, where a slice of a row (4544 inputs) is one chain of the tensor core, whose f32 adds truncate: some
/// 284 * 2/3 * 2^-24 = 1.2e-5 of the result at most. Measured: 4.8e-6.
const BATCH_TOLERANCE: f64 = 1.2e-5;
/// The same by gptq_gemm, whose weights are AutoGPTQ's f16(scale * (code - zero)) (exact here) and whose sums are one chain of the tensor
/// core: each of a row's 22720 / 16 = 1420 adds truncates the sum so far, by 2^-24 of it on average; sums grow like a random walk, so
/// some 1420 * 2/3 * 2^-24 = 5.6e-5 of the result at most. Measured: 2.6e-5.
const GEMM_TOLERANCE: f64 = 5.6e-5;
/// The same by gptq_batch of planes, whose sums of 64 inputs are exact. Measured: 1.4e-7.
const PLANES_TOLERANCE: f64 = 2e-7;
/// GELU's output as planes, rounded to steps of the largest of 64 / 32639. Measured: 5.7e-5.
const GELU_PLANES_TOLERANCE: f64 = 7e-5;

struct ProductCall {
    op: &'static str,
    kernel: MatmulKernel,
    shape: Shape,
    slices: usize,
    quantised: Quantised,
    host_x: Vec<f32>,
    host_residual: Vec<f32>,
    host_bias: Vec<f32>,
    w: Int4Matrix,
    x: DevBuf<u16>,
    bias: DevBuf<f32>,
    /// Partial sums, or the residual.
    sums: DevBuf<f32>,
    out: DevBuf<u16>,
    gelu_out: DevBuf<u16>,
}

impl ProductCall {
    fn new(stream: &Stream, op: &'static str, kernel: MatmulKernel, shape: Shape) -> Result<ProductCall> {
        let Shape { n, k, m, form, split_row, gelu_stride, .. } = shape;
        let mut random = Random::new((n * 3 + k + m) as u64);
        let quantised = Quantised::new(&mut random, n, k, shape.format);
        let mut w = kit::repack(stream, n, k, &[(&quantised, 0, 0)])?;
        // The same between guards.
        w.units = guarded(stream, "units", &w.units.download(stream, 0, w.units.len())?)?;
        w.row_factors = guarded(stream, "row factors", &w.row_factors.download(stream, 0, n)?)?;
        let slices = if form == Form::Partials { ops::slices(k) } else { 1 };
        let (sums, halves) = match form {
            Form::Partials => (slices * m * n, [0, 0]),
            Form::Residual => (m * n, [0, 0]),
            Form::Split if shape.planes => (0, [m * split_row, planes::len(gelu_stride)]),
            Form::Split => (0, [m * split_row, m * gelu_stride]),
        };
        let (x, host_x) = if shape.planes {
            let x = planes::encode(&random.values(m * k, 1.0), k);
            let values = planes::decode(&x, k, m);
            (x, values)
        } else {
            let x = random.halves(m * k, 1.0);
            let values = to_f32(&x);
            (x, values)
        };
        let (host_residual, host_bias) = (random.values(m * n, 1.0), random.values(n, 0.5));
        // What a form does not use is one value long.
        let unset = |len: usize| vec![UNSET; len.max(1)];
        Ok(ProductCall {
            op,
            kernel,
            shape,
            slices,
            w,
            x: guarded(stream, "x", &x)?,
            bias: guarded(stream, "bias", &host_bias)?,
            sums: guarded(stream, "sums", &vec![f32::NAN; sums.max(1)])?,
            out: guarded(stream, "out", &unset(halves[0]))?,
            gelu_out: guarded(stream, "gelu_out", &unset(halves[1]))?,
            quantised,
            host_x,
            host_residual,
            host_bias,
        })
    }

    /// What the reference gives: the product, with the bias where there is one.
    fn product(&self) -> Vec<f32> {
        let mut y = reference::gptq_matmul(&self.host_x, &self.quantised.tensor());
        if self.shape.form != Form::Partials {
            y.chunks_mut(self.shape.n).for_each(|row| reference::add(row, &self.host_bias));
        }
        y
    }

    fn f32_tolerance(&self) -> f64 {
        match self.kernel {
            MatmulKernel::Gemv => GEMV_TOLERANCE,
            MatmulKernel::Batch if self.shape.planes => PLANES_TOLERANCE,
            MatmulKernel::Batch => BATCH_TOLERANCE,
            MatmulKernel::Gemm => GEMM_TOLERANCE,
        }
    }

    fn partials(&self, stream: &Stream, wanted: bool) -> Result<Output> {
        let partials = all(stream, &self.sums)?;
        let n = partials.len() / self.slices;
        let got = (0..n).map(|i| (0..self.slices).map(|s| partials[s * n + i]).sum()).collect();
        let want = only(wanted, || self.product());
        Ok(Output { name: "sum of partials", row: self.shape.n, got, want, tolerance: self.f32_tolerance() })
    }

    fn residual(&self, stream: &Stream, wanted: bool) -> Result<Output> {
        let want = only(wanted, || {
            let mut sum = self.host_residual.clone();
            reference::add(&mut sum, &self.product());
            sum
        });
        let got = all(stream, &self.sums)?;
        Ok(Output { name: "residual", row: self.shape.n, got, want, tolerance: self.f32_tolerance() })
    }

    /// The rows as they are, those through GELU, and whether what lies between GELU's rows was left alone (1).
    fn split(&self, stream: &Stream, wanted: bool) -> Result<[Output; 3]> {
        let Shape { n, m, split_row, gelu_stride, planes, .. } = self.shape;
        let (out, wide) = (all(stream, &self.out)?, all(stream, &self.gelu_out)?);
        // Planes have room for 16 tokens: what is in rows of tokens that are not there is nobody's business.
        let values = if planes { planes::decode(&wide, gelu_stride, m) } else { to_f32(&wide) };
        let untouched = |i: usize| if planes { values[i].is_nan() } else { wide[i] == UNSET };
        let product = only(wanted, || self.product());
        let rows = |from: usize, to: usize| -> Vec<f32> {
            product.chunks(n).flat_map(|row| row[from..to].to_vec()).collect()
        };
        let mut gelu = rows(split_row, n);
        reference::gelu(&mut gelu);
        let width = n - split_row;
        let got: Vec<f32> = values.chunks(gelu_stride).flat_map(|row| row[..width].to_vec()).collect();
        let between = (0..values.len()).filter(|i| i % gelu_stride >= width);
        let between: Vec<f32> = between.map(|i| f32::from(u8::from(untouched(i)))).collect();
        let tolerance = if planes { GELU_PLANES_TOLERANCE } else { F16_TOLERANCE };
        Ok([
            Output {
                name: "out",
                row: split_row,
                got: to_f32(&out),
                want: rows(0, split_row),
                tolerance: F16_TOLERANCE,
            },
            Output { name: "gelu_out", row: width, got, want: gelu, tolerance },
            Output {
                name: "untouched between the rows of gelu_out",
                row: gelu_stride - width,
                want: only(wanted, || vec![1.0; between.len()]),
                got: between,
                tolerance: 0.0,
            },
        ])
    }
}

impl Call for ProductCall {
    fn label(&self) -> String {
        let Shape { n, k, m, form, format, planes, .. } = self.shape;
        let planes = if planes { ", planes" } else { "" };
        let form = match form {
            Form::Partials => format!("{} slices", self.slices),
            Form::Residual => "residual".to_owned(),
            Form::Split => "gelu".to_owned(),
        };
        let format = match format {
            Format { asymmetric: true, .. } => ", zero points",
            Format { group_size: 32, .. } => ", groups of 32",
            _ => "",
        };
        format!("{} [{n}, {k}] m {m}, {form}{format}{planes}", self.op)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        match self.shape.form {
            Form::Partials => self.sums.upload(stream, 0, &vec![f32::NAN; self.sums.len()]),
            Form::Residual => self.sums.upload(stream, 0, &self.host_residual),
            Form::Split => {
                self.out.upload(stream, 0, &vec![UNSET; self.out.len()])?;
                self.gelu_out.upload(stream, 0, &vec![UNSET; self.gelu_out.len()])
            }
        }
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        let Shape { n, k, m, form, split_row, gelu_stride, planes, .. } = self.shape;
        let bias = Some(&self.bias);
        let output = match form {
            Form::Partials => MatmulOutput::Partials(&mut self.sums),
            Form::Residual => MatmulOutput::Residual { x: &mut self.sums, bias },
            Form::Split => {
                let (out, gelu_out) = (&mut self.out, &mut self.gelu_out);
                MatmulOutput::Split {
                    out,
                    gelu_out,
                    gelu_stride,
                    split_row,
                    planes,
                    bias,
                    announced: None,
                    next: None,
                }
            }
        };
        let a = Activations { x: &self.x, stride: k, tokens: m, planes, attention: None };
        ops::gptq_matmul(stream, self.kernel, &self.w, 0..n, a, self.slices, output)
    }

    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>> {
        Ok(match self.shape.form {
            Form::Partials => vec![self.partials(stream, wanted)?],
            Form::Residual => vec![self.residual(stream, wanted)?],
            Form::Split => self.split(stream, wanted)?.into(),
        })
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "sums": self.sums, "out": self.out, "gelu_out": self.gelu_out, "x": self.x, "bias": self.bias,
            "units": self.w.units, "row_factors": self.w.row_factors)
    }

    fn work(&self) -> Work {
        let Shape { n, k, m, form, .. } = self.shape;
        let out = match form {
            Form::Partials => self.slices * m * n * 4,
            Form::Residual => m * n * 8,
            Form::Split => m * n * 2,
        };
        let moved = self.w.units.len() + self.x.len() * 2 + out;
        Work { bytes: moved as f64, flop: 2.0 * (m * n) as f64 * k as f64 }
    }
}
