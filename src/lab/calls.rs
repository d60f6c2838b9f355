//! One call of an op: guarded buffers with seeded data, the launch, and what the reference says must come out.

use super::kit::{self, G64, NAN16, Quantised, Random, to_f32};
use super::{CONTEXT, FFN, HEADS, HIDDEN, THETA, VOCAB};
use crate::checkpoint::{FloatTensor, FloatType};
use crate::error::{Error, Result};
use crate::gpu::ops::{
    self, Activations, AttnOutput, AttnScratch, Int4Matrix, LayerCache, MatmulKernel, MatmulOutput, Norm,
    PendingSum, StepTokens, Table,
};
use crate::gpu::{DevBuf, Guard, Stream};
use crate::layout::{HEAD_DIM, f32_to_f16};
use crate::measure::work::Work;
use crate::reference;

/// f16 rounding of an output: 2.8e-4 at most. Measured: 2.4e-4.
const F16_TOLERANCE: f64 = 3e-4;
/// f32 sums of exact products. Measured: 1.6e-7.
const F32_TOLERANCE: f64 = 4e-7;
/// The same by gptq_gemv, which subtracts the zero points after the sum. Measured: 9.2e-7.
const GEMV_TOLERANCE: f64 = 2e-6;
/// Queries, keys and weights are f16, the output is rounded to f16. Measured: 2.4e-4.
const ATTENTION_TOLERANCE: f64 = 4e-4;

/// The ops that have calls, and what they do.
pub const OPS: &[(&str, &str)] = &[
    ("embed", "rows of the table, as f32"),
    ("layernorm", "adds the slices of the product in front, then normalises"),
    ("gptq_gemv", "4-bit product, at most 8 tokens"),
    ("gptq_batch", "4-bit product, at most 64 tokens"),
    ("gptq_gemm", "4-bit product, any number of tokens"),
    ("rope", "rotates queries and keys, appends to the cache (prompts)"),
    ("attn_decode", "rotates, appends and attends, few tokens"),
    ("attn_prefill", "attention of a prompt"),
    ("head", "logits"),
    ("permute", "gathers activations (act-order)"),
];

/// What came out of a call, and what should have.
pub struct Output {
    /// What it is: `out [tokens, hidden]`.
    pub name: &'static str,
    /// Elements of a row, for naming one.
    pub row: usize,
    /// What the kernel wrote.
    pub got: Vec<f32>,
    /// What the reference gives.
    pub want: Vec<f32>,
    /// Largest relative difference; 0: the same bits.
    pub tolerance: f64,
}

/// A call that is ready to be launched.
pub trait Call {
    /// For messages: the shape.
    fn label(&self) -> String;
    /// Outputs are not a number, what is updated in place is as at first.
    ///
    /// # Errors
    /// A driver failure.
    fn reset(&mut self, stream: &Stream) -> Result<()>;
    /// Queues the kernel.
    ///
    /// # Errors
    /// What the op's wrapper returns.
    fn launch(&mut self, stream: &Stream) -> Result<()>;
    /// What came out; and what was wanted, if `wanted`, which may take the CPU a second.
    ///
    /// # Errors
    /// A driver failure.
    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>>;
    /// A buffer that was written outside, by name and place.
    ///
    /// # Errors
    /// A driver failure.
    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>>;
    /// What it must move and do.
    fn work(&self) -> Work;
}

/// The calls of an op: real shapes and edges, or the one or two that matter for time.
///
/// # Errors
/// [`Error::Usage`] if there is no such op; a driver failure.
pub fn calls(op: &str, stream: &Stream, timing: bool) -> Result<Vec<Box<dyn Call>>> {
    let mut calls: Vec<Box<dyn Call>> = Vec::new();
    match op {
        "layernorm" => {
            let checks: &[_] = &[
                (64, 1, 0),
                (64, 65, 2),
                (320, 3, 5),
                (HIDDEN, 1, 0),
                (HIDDEN, 1, 5),
                (HIDDEN, 8, 5),
                (HIDDEN, 63, 0),
                (HIDDEN, 65, 3),
                (8192, 5, 1),
            ];
            let times: &[_] = &[(HIDDEN, 1, 5), (HIDDEN, 8, 5), (HIDDEN, 512, 5), (HIDDEN, 2048, 0)];
            for &(hidden, m, slices) in if timing { times } else { checks } {
                calls.push(Box::new(LayernormCall::new(stream, hidden, m, slices)?));
            }
        }
        "permute" => {
            let checks: &[_] = &[(64, 1), (320, 3), (FFN + HIDDEN, 9)];
            for &(n, m) in if timing { &[(FFN + HIDDEN, 1)] } else { checks } {
                calls.push(Box::new(PermuteCall::new(stream, n, m)?));
            }
        }
        "embed" => {
            for m in if timing { vec![1, 512] } else { vec![1, 63, 65] } {
                calls.push(Box::new(EmbedCall::new(stream, if timing { VOCAB } else { 1024 }, m)?));
            }
        }
        "head" => {
            let checks: &[_] =
                &[(16, 64, 1), (512, 320, 9), (4096, HIDDEN, 1), (4096, HIDDEN, 63), (4096, HIDDEN, 64)];
            let times: &[_] = &[(VOCAB, HIDDEN, 1), (VOCAB, HIDDEN, 8)];
            for &(vocab, hidden, m) in if timing { times } else { checks } {
                calls.push(Box::new(HeadCall::new(stream, vocab, hidden, m)?));
            }
        }
        "gptq_gemv" | "gptq_batch" | "gptq_gemm" => {
            for (n, k, m) in product_shapes(op, timing) {
                calls.push(Box::new(ProductCall::new(stream, op, n, k, m)?));
            }
        }
        "rope" => {
            let checks: &[_] = &[(5, 1, 0), (HEADS, 1, CONTEXT - 1), (HEADS, 65, 1000), (5, 300, 7)];
            for &(heads, m, at) in if timing { &[(HEADS, 512, 0)] } else { checks } {
                calls.push(Box::new(RopeCall::new(stream, heads, m, at)?));
            }
        }
        "attn_decode" => {
            let checks: &[_] = &[
                (5, 1, 0),
                (5, 1, 63),
                (5, 1, 64),
                (HEADS, 1, 65),
                (HEADS, 1, 127),
                (HEADS, 1, 128),
                (HEADS, 8, 1000),
                (HEADS, 1, CONTEXT - 1),
            ];
            let times: &[_] = &[(HEADS, 1, 128), (HEADS, 1, 1024), (HEADS, 1, CONTEXT - 1), (HEADS, 8, 1024)];
            for &(heads, m, at) in if timing { times } else { checks } {
                calls.push(Box::new(AttentionCall::new(stream, true, heads, m, at)?));
            }
        }
        "attn_prefill" => {
            let checks: &[_] = &[
                (5, 1, 0),
                (HEADS, 63, 0),
                (HEADS, 64, 0),
                (HEADS, 65, 0),
                (5, 65, 100),
                (5, 17, CONTEXT - 17),
            ];
            let times: &[_] = &[(HEADS, 128, 0), (HEADS, 512, 0), (HEADS, 2048, 0)];
            for &(heads, m, at) in if timing { times } else { checks } {
                calls.push(Box::new(AttentionCall::new(stream, false, heads, m, at)?));
            }
        }
        other => {
            let known: Vec<&str> = OPS.iter().map(|op| op.0).collect();
            return Err(Error::Usage(format!("the lab has no op '{other}': it has {}", known.join(", "))));
        }
    }
    Ok(calls)
}

fn product_shapes(op: &str, timing: bool) -> Vec<(usize, usize, usize)> {
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

/// The first buffer that was written outside.
macro_rules! trespass {
    ($stream:expr, $($name:literal: $buffer:expr),+) => {{
        $(if let Some(place) = $buffer.trespass($stream)? {
            return Ok(Some(($name, place)));
        })+
        Ok(None)
    }};
}

/// What the reference gives, if it is asked for.
fn only(wanted: bool, reference: impl FnOnce() -> Vec<f32>) -> Vec<f32> {
    if wanted { reference() } else { Vec::new() }
}

fn guarded<T: Guard>(stream: &Stream, name: &'static str, host: &[T]) -> Result<DevBuf<T>> {
    DevBuf::guarded(stream, name, host)
}

fn all<T: Guard>(stream: &Stream, buffer: &DevBuf<T>) -> Result<Vec<T>> {
    buffer.download(stream, 0, buffer.len())
}

struct LayernormCall {
    hidden: usize,
    m: usize,
    slices: usize,
    norm: Norm,
    host: [Vec<f32>; 5],
    x: DevBuf<f32>,
    partials: DevBuf<f32>,
    sum_bias: DevBuf<f32>,
    out: DevBuf<u16>,
}

impl LayernormCall {
    fn new(stream: &Stream, hidden: usize, m: usize, slices: usize) -> Result<LayernormCall> {
        let mut random = Random::new((hidden * 31 + m * 7 + slices) as u64);
        let (weight, bias) = (random.values(hidden, 1.0), random.values(hidden, 0.5));
        let (x, partials) = (random.values(m * hidden, 3.0), random.values(slices * m * hidden, 1.0));
        let sum_bias = random.values(hidden, 1.0);
        Ok(LayernormCall {
            hidden,
            m,
            slices,
            norm: Norm {
                weight: guarded(stream, "weight", &weight)?,
                bias: guarded(stream, "bias", &bias)?,
                epsilon: 1e-5,
            },
            x: guarded(stream, "x", &x)?,
            partials: guarded(stream, "partials", &partials)?,
            sum_bias: guarded(stream, "partials_bias", &sum_bias)?,
            out: guarded(stream, "out", &vec![NAN16; m * hidden])?,
            host: [weight, bias, x, partials, sum_bias],
        })
    }
}

impl Call for LayernormCall {
    fn label(&self) -> String {
        format!("layernorm [{}, {}], {} slices", self.m, self.hidden, self.slices)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.x.upload(stream, 0, &self.host[2])?;
        self.out.upload(stream, 0, &vec![NAN16; self.m * self.hidden])
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        let sum = PendingSum { partials: &self.partials, slices: self.slices, bias: Some(&self.sum_bias) };
        let pending = (self.slices > 0).then_some(sum);
        ops::layernorm(stream, &self.norm, &mut self.x, pending, self.m, &mut self.out)
    }

    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>> {
        let [weight, bias, x, partials, sum_bias] = &self.host;
        let mut x = x.clone();
        for part in partials.chunks(self.m * self.hidden) {
            reference::add(&mut x, part);
        }
        if self.slices > 0 {
            x.chunks_mut(self.hidden).for_each(|row| reference::add(row, sum_bias));
        }
        let want = only(wanted, || reference::layernorm(&x, weight, bias, 1e-5));
        let (new_x, out) = (all(stream, &self.x)?, to_f32(&all(stream, &self.out)?));
        Ok(vec![
            Output { name: "x", row: self.hidden, got: new_x, want: x, tolerance: 0.0 },
            Output { name: "out", row: self.hidden, got: out, want, tolerance: F16_TOLERANCE },
        ])
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "out": self.out, "x": self.x, "partials": self.partials, "weight": self.norm.weight,
            "bias": self.norm.bias, "partials_bias": self.sum_bias)
    }

    fn work(&self) -> Work {
        let value = 4 + 2 + if self.slices > 0 { 4 + 4 * self.slices } else { 0 };
        Work { bytes: (self.m * self.hidden * value) as f64, flop: (8 * self.m * self.hidden) as f64 }
    }
}

struct PermuteCall {
    n: usize,
    m: usize,
    want: Vec<u16>,
    x: DevBuf<u16>,
    source: DevBuf<u32>,
    out: DevBuf<u16>,
}

impl PermuteCall {
    fn new(stream: &Stream, n: usize, m: usize) -> Result<PermuteCall> {
        let mut random = Random::new(n as u64);
        let x = random.halves(m * n, 1.0);
        let source: Vec<u32> = (0..n).map(|_| (random.bits() % n as u64) as u32).collect();
        let want = x.chunks(n).flat_map(|row| source.iter().map(|&i| row[i as usize]).collect::<Vec<_>>());
        Ok(PermuteCall {
            n,
            m,
            want: want.collect(),
            x: guarded(stream, "x", &x)?,
            source: guarded(stream, "source", &source)?,
            out: guarded(stream, "out", &vec![NAN16; m * n])?,
        })
    }
}

impl Call for PermuteCall {
    fn label(&self) -> String {
        format!("permute [{}, {}]", self.m, self.n)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.out.upload(stream, 0, &vec![NAN16; self.m * self.n])
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        ops::permute(stream, &self.x, &self.source, self.m, &mut self.out)
    }

    fn outputs(&self, stream: &Stream, _wanted: bool) -> Result<Vec<Output>> {
        let got = to_f32(&all(stream, &self.out)?);
        Ok(vec![Output { name: "out", row: self.n, got, want: to_f32(&self.want), tolerance: 0.0 }])
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "out": self.out, "x": self.x, "source": self.source)
    }

    fn work(&self) -> Work {
        Work { bytes: (self.n * (4 * self.m + 4)) as f64, flop: 0.0 }
    }
}

/// A random table, on the host and in units on the GPU.
fn table(stream: &Stream, vocab: usize, hidden: usize) -> Result<(Vec<u8>, Table)> {
    // Drawn from some thousand values: a table of 300 million would take seconds.
    let mut random = Random::new(9);
    let values = random.halves(4096, (hidden as f32).sqrt().recip());
    let draws = (0..(vocab * hidden).div_ceil(5)).flat_map(|_| {
        let bits = random.bits();
        (0..5).map(move |i| (bits >> (12 * i)) as usize % 4096)
    });
    let rows: Vec<u16> = draws.take(vocab * hidden).map(|i| values[i]).collect();
    let bytes: Vec<u8> = rows.iter().flat_map(|h| h.to_le_bytes()).collect();
    let raw = DevBuf::from_host(stream, "raw", &bytes)?;
    let mut units = guarded(stream, "units", &vec![NAN16; rows.len()])?;
    ops::table_repack(stream, &raw, vocab, hidden, &mut units, 0)?;
    Ok((bytes, Table { units, vocab, hidden }))
}

struct EmbedCall {
    m: usize,
    ids: Vec<u32>,
    bytes: Vec<u8>,
    table: Table,
    words: DevBuf<u32>,
    x: DevBuf<f32>,
}

impl EmbedCall {
    fn new(stream: &Stream, vocab: usize, m: usize) -> Result<EmbedCall> {
        let (bytes, table) = table(stream, vocab, HIDDEN)?;
        let mut random = Random::new(m as u64);
        let mut ids: Vec<u32> = (0..m).map(|_| (random.bits() % vocab as u64) as u32).collect();
        ids[m - 1] = vocab as u32 - 1;
        let words = guarded(stream, "token", &ops::step_token_words(&ids, 0, 0)?)?;
        Ok(EmbedCall { m, ids, bytes, table, words, x: guarded(stream, "x", &vec![f32::NAN; m * HIDDEN])? })
    }
}

impl Call for EmbedCall {
    fn label(&self) -> String {
        format!("embed [{}, {HIDDEN}] of {}", self.m, self.table.vocab)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.x.upload(stream, 0, &vec![f32::NAN; self.m * HIDDEN])
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        ops::embed(stream, &self.table, StepTokens::list(&self.words, self.m), &mut self.x)
    }

    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>> {
        let tensor =
            FloatTensor { dtype: FloatType::F16, shape: [self.table.vocab, HIDDEN], bytes: &self.bytes };
        let want = only(wanted, || reference::embed(&tensor, &self.ids));
        Ok(vec![Output { name: "x", row: HIDDEN, got: all(stream, &self.x)?, want, tolerance: 0.0 }])
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "x": self.x, "token": self.words, "units": self.table.units)
    }

    fn work(&self) -> Work {
        Work { bytes: (self.m * HIDDEN * 6) as f64, flop: 0.0 }
    }
}

struct HeadCall {
    m: usize,
    bytes: Vec<u8>,
    host_x: Vec<u16>,
    table: Table,
    x: DevBuf<u16>,
    logits: DevBuf<f32>,
}

impl HeadCall {
    fn new(stream: &Stream, vocab: usize, hidden: usize, m: usize) -> Result<HeadCall> {
        let (bytes, table) = table(stream, vocab, hidden)?;
        let host_x = Random::new(10 + m as u64).halves(m * hidden, 1.0);
        let x = guarded(stream, "x", &host_x)?;
        Ok(HeadCall {
            m,
            bytes,
            host_x,
            table,
            x,
            logits: guarded(stream, "logits", &vec![f32::NAN; m * vocab])?,
        })
    }
}

impl Call for HeadCall {
    fn label(&self) -> String {
        format!("head [{}, {}] of {}", self.m, self.table.hidden, self.table.vocab)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.logits.upload(stream, 0, &vec![f32::NAN; self.m * self.table.vocab])
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        ops::head(stream, &self.table, &self.x, 0, self.m, &mut self.logits, 0)
    }

    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>> {
        let Table { vocab, hidden, .. } = self.table;
        let tensor = FloatTensor { dtype: FloatType::F16, shape: [vocab, hidden], bytes: &self.bytes };
        let want = only(wanted, || reference::head(&to_f32(&self.host_x), &tensor));
        let got = all(stream, &self.logits)?;
        Ok(vec![Output { name: "logits", row: vocab, got, want, tolerance: F32_TOLERANCE }])
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "logits": self.logits, "x": self.x, "units": self.table.units)
    }

    fn work(&self) -> Work {
        let weights = (self.table.vocab * self.table.hidden) as f64;
        let moved = self.m * (self.table.hidden * 2 + self.table.vocab * 4);
        Work { bytes: weights * 2.0 + moved as f64, flop: 2.0 * weights * self.m as f64 }
    }
}

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
        let tolerance = if self.kernel == MatmulKernel::Gemv { GEMV_TOLERANCE } else { F32_TOLERANCE };
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

/// Cos and sin of every position and pair, as the model's table has them.
fn rope_table(stream: &Stream) -> Result<DevBuf<f32>> {
    let frequencies = reference::rope_frequencies(THETA);
    let table: Vec<f32> = (0..CONTEXT)
        .flat_map(|p| frequencies.map(|f| p as f32 * f).into_iter().flat_map(|a| [a.cos(), a.sin()]))
        .collect();
    guarded(stream, "table", &table)
}

/// The words of tokens of slot 0 from `at` on.
fn token_words(stream: &Stream, m: usize, at: usize) -> Result<DevBuf<u32>> {
    guarded(stream, "token", &ops::step_token_words(&vec![0; m], at, 0)?)
}

/// Heads `first ..` of each row of `x [.., heads + 2, 64]`.
fn part(x: &[f32], heads: usize, first: usize, count: usize) -> Vec<f32> {
    x.chunks((heads + 2) * HEAD_DIM)
        .flat_map(|row| row[first * HEAD_DIM..(first + count) * HEAD_DIM].to_vec())
        .collect()
}

fn rounded(x: &[f32]) -> Vec<u16> {
    x.iter().map(|&v| f32_to_f16(v)).collect()
}

/// A cache of one sequence that begins with these rows; the rest is not a number.
fn cache(stream: &Stream, keys: &[u16], values: &[u16]) -> Result<LayerCache> {
    let full = |rows: &[u16]| {
        let mut full = rows.to_vec();
        full.resize(CONTEXT * HEAD_DIM, NAN16);
        full
    };
    Ok(LayerCache {
        k: guarded(stream, "k_cache", &full(keys))?,
        v: guarded(stream, "v_cache", &full(values))?,
        slots: 1,
        max_context: CONTEXT,
    })
}

struct RopeCall {
    heads: usize,
    m: usize,
    at: usize,
    host: Vec<u16>,
    qkv: DevBuf<u16>,
    cache: LayerCache,
    table: DevBuf<f32>,
    words: DevBuf<u32>,
}

impl RopeCall {
    fn new(stream: &Stream, heads: usize, m: usize, at: usize) -> Result<RopeCall> {
        let host = Random::new((at + m) as u64).halves(m * (heads + 2) * HEAD_DIM, 1.0);
        Ok(RopeCall {
            heads,
            m,
            at,
            qkv: guarded(stream, "qkv", &host)?,
            host,
            cache: cache(stream, &[], &[])?,
            table: rope_table(stream)?,
            words: token_words(stream, m, at)?,
        })
    }
}

impl Call for RopeCall {
    fn label(&self) -> String {
        format!("rope {} heads, {} tokens at {}", self.heads, self.m, self.at)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.qkv.upload(stream, 0, &self.host)?;
        let unset = vec![NAN16; CONTEXT * HEAD_DIM];
        self.cache.k.upload(stream, 0, &unset)?;
        self.cache.v.upload(stream, 0, &unset)
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        let tokens = StepTokens::list(&self.words, self.m);
        ops::rope(stream, &mut self.qkv, self.heads, &mut self.cache, &self.table, tokens)
    }

    fn outputs(&self, stream: &Stream, _wanted: bool) -> Result<Vec<Output>> {
        let (heads, at) = (self.heads, self.at * HEAD_DIM);
        let mut want = to_f32(&self.host);
        let values = part(&want, heads, heads + 1, 1);
        reference::rope(&mut want, heads + 2, self.at, THETA);
        let got = to_f32(&all(stream, &self.qkv)?);
        let row =
            |buffer: &DevBuf<u16>| Ok::<_, Error>(to_f32(&buffer.download(stream, at, self.m * HEAD_DIM)?));
        let (key, value) = (row(&self.cache.k)?, row(&self.cache.v)?);
        Ok(vec![
            Output {
                name: "queries",
                row: heads * HEAD_DIM,
                got: part(&got, heads, 0, heads),
                want: part(&want, heads, 0, heads),
                tolerance: F16_TOLERANCE,
            },
            Output {
                name: "k_cache",
                row: HEAD_DIM,
                got: key,
                want: part(&want, heads, heads, 1),
                tolerance: F16_TOLERANCE,
            },
            Output { name: "v_cache", row: HEAD_DIM, got: value, want: values, tolerance: 0.0 },
        ])
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "qkv": self.qkv, "k_cache": self.cache.k, "v_cache": self.cache.v, "table": self.table)
    }

    fn work(&self) -> Work {
        let values = self.m * (self.heads + 2) * HEAD_DIM;
        Work { bytes: (4 * values) as f64, flop: (6 * values) as f64 }
    }
}

struct AttentionCall {
    decode: bool,
    heads: usize,
    m: usize,
    at: usize,
    /// Not rotated, `[at + m, heads + 2, 64]`; for a prompt its own queries, and keys that are taken as they are.
    host: Vec<u16>,
    keys: Vec<u16>,
    values: Vec<u16>,
    qkv: DevBuf<u16>,
    cache: LayerCache,
    table: DevBuf<f32>,
    words: DevBuf<u32>,
    scratch: AttnScratch,
    out: DevBuf<u16>,
}

/// Values between two tokens of attention's output that are not its own.
const GAP: usize = 96;
/// Index of its first value.
const FIRST: usize = 32;

impl AttentionCall {
    fn new(stream: &Stream, decode: bool, heads: usize, m: usize, at: usize) -> Result<AttentionCall> {
        let (length, n) = (at + m, (heads + 2) * HEAD_DIM);
        let mut random = Random::new((heads * 10_000 + at * 7 + m) as u64);
        let host = random.halves(m * n, 1.3);
        let (mut keys, mut values) =
            (random.halves(length * HEAD_DIM, 1.3), random.halves(length * HEAD_DIM, 1.0));
        if decode {
            // The last of them are what the call appends.
            let mut rotated = to_f32(&host);
            let own = rounded(&part(&rotated, heads, heads + 1, 1));
            reference::rope(&mut rotated, heads + 2, at, THETA);
            keys[at * HEAD_DIM..].copy_from_slice(&rounded(&part(&rotated, heads, heads, 1)));
            values[at * HEAD_DIM..].copy_from_slice(&own);
        }
        let held = if decode { at * HEAD_DIM } else { length * HEAD_DIM };
        let stride = heads * HEAD_DIM + GAP;
        Ok(AttentionCall {
            decode,
            heads,
            m,
            at,
            qkv: guarded(stream, "qkv", &host)?,
            host,
            cache: cache(stream, &keys[..held], &values[..held])?,
            keys,
            values,
            table: rope_table(stream)?,
            words: token_words(stream, m, at)?,
            scratch: AttnScratch::new(stream, heads, CONTEXT, m.min(ops::STEP_TOKENS))?,
            out: guarded(stream, "out", &vec![NAN16; FIRST + m * stride])?,
        })
    }
}

impl Call for AttentionCall {
    fn label(&self) -> String {
        let op = if self.decode { "attn_decode" } else { "attn_prefill" };
        format!("{op} {} heads, {} tokens at {}", self.heads, self.m, self.at)
    }

    fn reset(&mut self, stream: &Stream) -> Result<()> {
        self.out.upload(stream, 0, &vec![NAN16; self.out.len()])
    }

    fn launch(&mut self, stream: &Stream) -> Result<()> {
        let stride = self.heads * HEAD_DIM + GAP;
        let output = AttnOutput { out: &mut self.out, first: FIRST, stride };
        let tokens = StepTokens::list(&self.words, self.m);
        if self.decode {
            let (cache, scratch) = (&mut self.cache, &mut self.scratch);
            return ops::attn_decode(stream, &self.qkv, cache, &self.table, tokens, scratch, output);
        }
        ops::attn_prefill(stream, &self.qkv, self.heads, &self.cache, tokens, output)
    }

    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>> {
        let (heads, width) = (self.heads, self.heads * HEAD_DIM);
        let mut queries = to_f32(&self.host);
        if self.decode {
            reference::rope(&mut queries, heads + 2, self.at, THETA);
        }
        let queries = to_f32(&rounded(&part(&queries, heads, 0, heads)));
        let (keys, values) = (to_f32(&self.keys), to_f32(&self.values));
        let want = only(wanted, || reference::attention(&queries, &keys, &values, heads, self.at));
        let written = all(stream, &self.out)?;
        // Between the tokens' values nothing may be written: taken as an output that must stay as it was.
        let (mut got, mut gaps) = (Vec::new(), written[..FIRST].to_vec());
        for token in written[FIRST..].chunks(width + GAP) {
            got.extend(to_f32(&token[..width]));
            gaps.extend(&token[width..]);
        }
        let touched = gaps.iter().map(|&h| f32::from(u8::from(h != NAN16))).collect::<Vec<_>>();
        let zeros = vec![0.0; touched.len()];
        let mut outputs = vec![
            Output { name: "out", row: width, got, want, tolerance: ATTENTION_TOLERANCE },
            Output { name: "between the tokens of out", row: GAP, got: touched, want: zeros, tolerance: 0.0 },
        ];
        if self.decode {
            let rows = |buffer: &DevBuf<u16>| {
                Ok::<_, Error>(to_f32(&buffer.download(stream, self.at * HEAD_DIM, self.m * HEAD_DIM)?))
            };
            for (name, buffer, rows_wanted, tolerance) in [
                ("k_cache", &self.cache.k, &self.keys, F16_TOLERANCE),
                ("v_cache", &self.cache.v, &self.values, 0.0),
            ] {
                let want = to_f32(&rows_wanted[self.at * HEAD_DIM..]);
                outputs.push(Output { name, row: HEAD_DIM, got: rows(buffer)?, want, tolerance });
            }
        }
        Ok(outputs)
    }

    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>> {
        trespass!(stream, "out": self.out, "qkv": self.qkv, "k_cache": self.cache.k, "v_cache": self.cache.v,
            "table": self.table)
    }

    fn work(&self) -> Work {
        let seen: f64 = (0..self.m).map(|t| (self.at + t + 1) as f64).sum();
        let moved = self.m * (2 * self.heads + 2) * HEAD_DIM * 2;
        Work {
            bytes: ((self.at + self.m) * 4 * HEAD_DIM + moved) as f64,
            flop: seen * (4 * self.heads * HEAD_DIM) as f64,
        }
    }
}
