//! The reference: every op of the forward pass as plain loops that can be checked by eye.
//!
//! It is the truth each kernel is compared with (a kernel has the name of the function here that it must agree
//! with), and the `cpu` device is made of it. Inputs and outputs are f32, row-major; `[m, n]` is m rows of n.
//! Sums run in f64, so that what a kernel is measured against carries no rounding of its own to speak of; only
//! the rotary angles are f32, because the model was trained with f32 angles.
//!
//! Cost: `gptq_matmul` dequantises each weight once a call, so that a call with many rows costs little more than
//! its multiply-adds; decoding one token of Falcon-7B takes seconds. The two products and the attention are
//! threaded over their outputs; each output is one sum in a fixed order, so results do not depend on the number
//! of threads.
//!
//! Limits: shapes are the caller's to get right (the checkpoint has been checked when it was opened). A slice
//! shorter than its shape says is a bug in the caller, and panics as slices do.

use std::ops::Range;
use std::sync::OnceLock;

use crate::checkpoint::{FloatTensor, FloatType, GptqTensor};
use crate::layout::{HEAD_DIM, bf16_to_f32, f16_to_f32, f32_to_f16};

/// Output columns that are dequantised together: with 64 inputs a tile of 32 KiB, half of a usual L1 cache or
/// more, and 256 contiguous bytes of each row of codes.
const TILE_COLUMNS: usize = 64;
/// Inputs of such a tile.
const TILE_INPUTS: usize = 64;
/// Multiply-adds below which a thread costs more than it saves (starting one takes some 30 microseconds).
const MIN_WORK_PER_THREAD: usize = 50_000;

/// Rows `ids` of `embedding` [vocab, hidden]: [m, hidden].
#[must_use]
pub fn embed(embedding: &FloatTensor<'_>, ids: &[u32]) -> Vec<f32> {
    let hidden = embedding.shape[1];
    let mut x = vec![0.0; ids.len() * hidden];
    for (row, &id) in x.chunks_exact_mut(hidden).zip(ids) {
        read_floats(embedding, id as usize * hidden, row);
    }
    x
}

/// LayerNorm of each row of x [m, hidden] with `weight` and `bias` `[hidden]`: mean and biased variance over the
/// row, `(x - mean) / sqrt(variance + epsilon) * weight + bias`.
#[must_use]
pub fn layernorm(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32) -> Vec<f32> {
    let hidden = weight.len();
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(hidden) {
        let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / hidden as f64;
        let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / hidden as f64;
        let scale = 1.0 / (variance + f64::from(epsilon)).sqrt();
        for ((&v, &w), &b) in row.iter().zip(weight).zip(bias) {
            y.push(((f64::from(v) - mean) * scale * f64::from(w) + f64::from(b)) as f32);
        }
    }
    y
}

/// The matrix a GPTQ tensor stands for: [n, k], each weight `scale * (code - zero)` exactly, which f32 can hold.
/// Rounded once to f16 it is the weight AutoGPTQ computes with in f16.
#[must_use]
pub fn dequantize(w: &GptqTensor<'_>) -> Vec<f32> {
    let mut out = vec![0.0; w.n * w.k];
    for n in 0..w.n {
        for k in 0..w.k {
            let g = group_of(w, k);
            out[n * w.k + k] = weight(scale_at(w, g, n), zero_at(w, g, n), code_at(w, k, n));
        }
    }
    out
}

/// `y = x W^T + bias`: x [m, k], W [n, k] as [`dequantize`] gives it, y [m, n].
///
/// Works from the mapped tensor: a tile of weights is dequantised, used for all m rows, and forgotten.
#[must_use]
pub fn gptq_matmul(x: &[f32], w: &GptqTensor<'_>) -> Vec<f32> {
    let m = x.len() / w.k;
    let tiles = w.n.div_ceil(TILE_COLUMNS);
    let parts = parallel(tiles, tiles * TILE_COLUMNS * w.k * m, |tiles| {
        let columns = tiles.start * TILE_COLUMNS..w.n.min(tiles.end * TILE_COLUMNS);
        (columns.clone(), matmul_columns(x, w, columns))
    });
    let mut y = vec![0.0; m * w.n];
    for (columns, part) in parts {
        for (row, part_row) in part.chunks_exact(columns.len()).enumerate() {
            y[row * w.n..][columns.clone()].copy_from_slice(part_row);
        }
    }
    y
}

/// `0.5 x (1 + erf(x / sqrt 2))` of each value, in place: the exact form, not the tanh approximation.
pub fn gelu(x: &mut [f32]) {
    for v in x {
        let wide = f64::from(*v);
        *v = (0.5 * wide * (1.0 + erf(wide * std::f64::consts::FRAC_1_SQRT_2))) as f32;
    }
}

/// The error function, to about 1e-15.
///
/// `erf x = 2/sqrt(pi) exp(-x^2) (x + 2x^3/3 + 4x^5/15 + ...)`: unlike in the Taylor series all terms have one
/// sign, so nothing cancels. From 6 on erf differs from 1 by less than f64 can show.
#[must_use]
pub fn erf(x: f64) -> f64 {
    if x.is_nan() || x.abs() >= 6.0 {
        return if x.is_nan() { x } else { x.signum() };
    }
    let (mut term, mut sum, mut divisor) = (x, x, 1.0);
    while term.abs() > sum.abs() * 1e-17 {
        divisor += 2.0;
        term *= 2.0 * x * x / divisor;
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// The angle a position adds to each pair of values, `theta^(-2i/64)` for i = 0..31, rounded as PyTorch rounds it:
/// the power to f32, then its reciprocal to f32. At position 2047 one unit in the last place here is 1e-4 radians,
/// so a kernel must use these very numbers.
#[must_use]
pub fn rope_frequencies(theta: f32) -> [f32; HEAD_DIM / 2] {
    std::array::from_fn(|i| 1.0 / f64::from(theta).powf(2.0 * i as f64 / HEAD_DIM as f64) as f32)
}

/// Cos and sin of each position's angle for each pair, `[positions, 32, 2]`, the angle in f32 as PyTorch computes it.
#[must_use]
pub fn rope_table(theta: f32, positions: usize) -> Vec<f32> {
    let frequencies = rope_frequencies(theta);
    (0..positions)
        .flat_map(|position| frequencies.map(|frequency| position as f32 * frequency))
        .flat_map(|angle| [angle.cos(), angle.sin()])
        .collect()
}

/// Rotates each head of x [m, heads, 64] by its position, in place; row r is position `start + r`. Half split:
/// value i is paired with value i + 32.
pub fn rope(x: &mut [f32], heads: usize, start: usize, theta: f32) {
    const HALF: usize = HEAD_DIM / 2;
    let frequencies = rope_frequencies(theta);
    for (r, row) in x.chunks_exact_mut(heads * HEAD_DIM).enumerate() {
        let position = (start + r) as f32;
        for head in row.chunks_exact_mut(HEAD_DIM) {
            for (i, &frequency) in frequencies.iter().enumerate() {
                let (sin, cos) = (position * frequency).sin_cos();
                let (a, b) = (head[i], head[i + HALF]);
                head[i] = a * cos - b * sin;
                head[i + HALF] = b * cos + a * sin;
            }
        }
    }
}

/// Causal multi-query attention: q [m, heads, 64] at positions `start`.., one head of keys and values
/// [context, 64] shared by all query heads, `context >= start + m`; gives [m, heads, 64]. Row r attends to positions
/// `0..=start + r`; scores are `q . k / 8`.
#[must_use]
pub fn attention(q: &[f32], keys: &[f32], values: &[f32], heads: usize, start: usize) -> Vec<f32> {
    let rows = q.len() / HEAD_DIM; // one for each token and head
    let parts = parallel(rows, rows * (start + rows / heads) * 2 * HEAD_DIM, |rows| {
        let mut out = Vec::with_capacity(rows.len() * HEAD_DIM);
        for row in rows {
            let seen = (start + row / heads + 1) * HEAD_DIM;
            let q = &q[row * HEAD_DIM..][..HEAD_DIM];
            out.extend(attend(q, &keys[..seen], &values[..seen]));
        }
        out
    });
    parts.concat()
}

/// One query `[64]` over keys and values [context, 64]: softmax of the scores, then the weighted sum of values.
fn attend(q: &[f32], keys: &[f32], values: &[f32]) -> [f32; HEAD_DIM] {
    let divisor = (HEAD_DIM as f64).sqrt();
    let mut scores: Vec<f64> = keys.chunks_exact(HEAD_DIM).map(|key| dot(q, key) / divisor).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    for score in &mut scores {
        *score = (*score - largest).exp();
    }
    let total: f64 = scores.iter().sum();
    let mut sums = [0.0; HEAD_DIM];
    for (&score, value) in scores.iter().zip(values.chunks_exact(HEAD_DIM)) {
        for (sum, &v) in sums.iter_mut().zip(value) {
            *sum += score * f64::from(v);
        }
    }
    sums.map(|sum| (sum / total) as f32)
}

/// `logits = x E^T`: x [m, hidden], `embedding` [vocab, hidden] of any dtype, logits [m, vocab].
#[must_use]
pub fn head(x: &[f32], embedding: &FloatTensor<'_>) -> Vec<f32> {
    let [vocab, hidden] = embedding.shape;
    let m = x.len() / hidden;
    let parts = parallel(vocab, vocab * hidden * m, |ids| {
        let mut row = vec![0.0; hidden];
        let mut part = Vec::with_capacity(ids.len() * m); // [ids, m]
        for id in ids.clone() {
            read_floats(embedding, id * hidden, &mut row);
            part.extend(x.chunks_exact(hidden).map(|x| dot(x, &row) as f32));
        }
        (ids, part)
    });
    let mut logits = vec![0.0; m * vocab];
    for (ids, part) in parts {
        for (id, column) in ids.zip(part.chunks_exact(m.max(1))) {
            for (r, &logit) in column.iter().enumerate() {
                logits[r * vocab + id] = logit;
            }
        }
    }
    logits
}

/// `x += y`, value by value.
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, &y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// The index of the largest value; of equal ones the first. NaN is never the largest; `None` when there is nothing
/// else.
#[must_use]
pub fn argmax(values: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (i, &value) in values.iter().enumerate() {
        if !value.is_nan() && best.is_none_or(|(_, largest)| value > largest) {
            best = Some((i as u32, value));
        }
    }
    best.map(|(i, _)| i)
}

/// Sum of the products of two equally long rows, in f64.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Exact: 11 bits of an f16 scale times 5 bits of an integer.
fn weight(scale: f32, zero: u8, code: u8) -> f32 {
    scale * (f32::from(code) - f32::from(zero))
}

fn word_at(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
}

fn group_of(w: &GptqTensor<'_>, k: usize) -> usize {
    match w.g_idx {
        Some(groups) => word_at(groups, k) as usize,
        None => k / w.group_size,
    }
}

fn code_at(w: &GptqTensor<'_>, k: usize, n: usize) -> u8 {
    (word_at(w.qweight, k / 8 * w.n + n) >> (4 * (k % 8)) & 15) as u8
}

/// Masked to 4 bits: AutoGPTQ writes a zero point of 0 as -1, and its kernels read it back so.
fn zero_at(w: &GptqTensor<'_>, g: usize, n: usize) -> u8 {
    let stored = (word_at(w.qzeros, g * (w.n / 8) + n / 8) >> (4 * (n % 8)) & 15) as u8;
    (stored + w.zero_offset) & 15
}

/// In f16, as the device holds it and as AutoGPTQ loads it, whatever the file stores it as.
fn scale_at(w: &GptqTensor<'_>, g: usize, n: usize) -> f32 {
    f16_to_f32(f32_to_f16(w.scales.get(g * w.n + n)))
}

/// The given columns of [`gptq_matmul`]'s result: [m, columns].
fn matmul_columns(x: &[f32], w: &GptqTensor<'_>, columns: Range<usize>) -> Vec<f32> {
    let m = x.len() / w.k;
    let mut y = vec![0.0; m * columns.len()];
    for first in columns.clone().step_by(TILE_COLUMNS) {
        let tile_columns = first..columns.end.min(first + TILE_COLUMNS);
        let width = tile_columns.len();
        let mut sums = vec![0.0f64; m * width];
        let mut tile = Tile::new(w, tile_columns);
        for k in (0..w.k).step_by(TILE_INPUTS) {
            let inputs = k..w.k.min(k + TILE_INPUTS);
            tile.fill(inputs.clone());
            for (x, sums) in x.chunks_exact(w.k).zip(sums.chunks_exact_mut(width)) {
                for (&x, weights) in x[inputs.clone()].iter().zip(tile.weights.chunks_exact(width)) {
                    let x = f64::from(x);
                    for (sum, &weight) in sums.iter_mut().zip(weights) {
                        *sum += x * weight;
                    }
                }
            }
        }
        let mut bias = vec![0.0; width];
        if let Some(stored) = &w.bias {
            read_floats(stored, first, &mut bias);
        }
        for (y, sums) in y.chunks_exact_mut(columns.len()).zip(sums.chunks_exact(width)) {
            for ((y, &sum), &bias) in y[first - columns.start..].iter_mut().zip(sums).zip(&bias) {
                *y = (sum + f64::from(bias)) as f32;
            }
        }
    }
    y
}

/// Dequantised weights of some columns, a few inputs at a time. In f64, because that is what they are multiplied in.
struct Tile<'a, 'w> {
    matrix: &'a GptqTensor<'w>,
    columns: Range<usize>,
    /// [groups, columns]
    scales: Vec<f64>,
    /// [groups, columns]
    zeros: Vec<f64>,
    /// [TILE_INPUTS, columns]
    weights: Vec<f64>,
}

impl<'a, 'w> Tile<'a, 'w> {
    fn new(matrix: &'a GptqTensor<'w>, columns: Range<usize>) -> Self {
        let (mut scales, mut zeros) = (Vec::new(), Vec::new());
        for group in 0..matrix.k.div_ceil(matrix.group_size) {
            scales.extend(columns.clone().map(|n| f64::from(scale_at(matrix, group, n))));
            zeros.extend(columns.clone().map(|n| f64::from(zero_at(matrix, group, n))));
        }
        let weights = vec![0.0; TILE_INPUTS * columns.len()];
        Tile { matrix, columns, scales, zeros, weights }
    }

    /// Dequantises the weights of `inputs`, at most TILE_INPUTS of them.
    fn fill(&mut self, inputs: Range<usize>) {
        let (w, width) = (self.matrix, self.columns.len());
        for (k, weights) in inputs.zip(self.weights.chunks_exact_mut(width)) {
            let group = group_of(w, k) * width;
            let (scales, zeros) = (&self.scales[group..][..width], &self.zeros[group..][..width]);
            let words = w.qweight[4 * (k / 8 * w.n + self.columns.start)..].chunks_exact(4);
            for (((weight, b), scale), zero) in weights.iter_mut().zip(words).zip(scales).zip(zeros) {
                let code = u32::from_le_bytes([b[0], b[1], b[2], b[3]]) >> (4 * (k % 8)) & 15;
                *weight = scale * (f64::from(code as i32) - zero);
            }
        }
    }
}

/// Values `first..first + out.len()` of a stored tensor, counted through its rows.
fn read_floats(tensor: &FloatTensor<'_>, first: usize, out: &mut [f32]) {
    match tensor.dtype {
        FloatType::F32 => {
            for (out, b) in out.iter_mut().zip(tensor.bytes[4 * first..].chunks_exact(4)) {
                *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        FloatType::F16 => {
            for (out, b) in out.iter_mut().zip(tensor.bytes[2 * first..].chunks_exact(2)) {
                *out = f16_to_f32(u16::from_le_bytes([b[0], b[1]]));
            }
        }
        FloatType::BF16 => {
            for (out, b) in out.iter_mut().zip(tensor.bytes[2 * first..].chunks_exact(2)) {
                *out = bf16_to_f32(u16::from_le_bytes([b[0], b[1]]));
            }
        }
    }
}

/// Threads the reference uses: as many as the system says it may.
#[must_use]
pub fn threads() -> usize {
    // Asking reads files of the system each time; the answer does not change.
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// Runs `part` over `items` cut into contiguous ranges, one a thread, and gives the results in order. `work` is the
/// number of multiply-adds of it all.
fn parallel<T: Send>(items: usize, work: usize, part: impl Fn(Range<usize>) -> T + Sync) -> Vec<T> {
    let threads = threads().min(work / MIN_WORK_PER_THREAD).min(items);
    if threads <= 1 {
        return vec![part(0..items)];
    }
    let range = |t: usize| items * t / threads..items * (t + 1) / threads;
    std::thread::scope(|scope| {
        let part = &part;
        let others: Vec<_> = (1..threads).map(|t| scope.spawn(move || part(range(t)))).collect();
        let mut results = vec![part(range(0))];
        for thread in others {
            match thread.join() {
                Ok(result) => results.push(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    })
}
