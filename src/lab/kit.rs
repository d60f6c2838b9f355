//! Data to check kernels with: seeded, shifted off zero, quantised as a checkpoint is.

use super::{CONTEXT, THETA};
use crate::checkpoint::{FloatTensor, FloatType, GptqTensor};
use crate::error::{Error, Result};
use crate::gpu::ops::{self, Int4Matrix, RawGptq, Table};
use crate::gpu::{DevBuf, Stream};
use crate::layout::{f16_to_f32, f32_to_f16};
use crate::reference;
use crate::repack::InputOrder;

/// An f16 that is not a number, to show what a kernel did not write.
pub const NAN16: u16 = 0x7e00;

/// splitmix64: seeded, and the same everywhere.
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Roughly normal with deviation 1, shifted off zero: a mean of 0.25 makes dropped terms show.
    pub fn value(&mut self) -> f32 {
        (0..4).map(|_| self.unit() - 0.5).sum::<f32>() * 1.73 + 0.25
    }

    /// `n` values times `scale`.
    pub fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.value() * scale).collect()
    }

    /// Values that are exact in f16.
    pub fn halves(&mut self, n: usize, scale: f32) -> Vec<u16> {
        (0..n).map(|_| f32_to_f16(self.value() * scale)).collect()
    }
}

/// f16 to f32, exactly.
#[must_use]
pub fn to_f32(halves: &[u16]) -> Vec<f32> {
    halves.iter().map(|&h| f16_to_f32(h)).collect()
}

/// How two results differ.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Norm of the difference over the norm of what was wanted; infinite if a value is not finite.
    pub relative: f64,
    /// Index of the worst element: the first that is not finite, or the one that is farthest off.
    pub worst: usize,
}

/// `||got - want|| / ||want||`, and the worst element.
#[must_use]
pub fn difference(got: &[f32], want: &[f32]) -> Difference {
    let mut worst = (0usize, -1.0f64);
    let (mut error, mut norm) = (0.0f64, 0.0f64);
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        if !g.is_finite() {
            return Difference { relative: f64::INFINITY, worst: i };
        }
        let d = f64::from(g) - f64::from(w);
        error += d * d;
        norm += f64::from(w) * f64::from(w);
        if d.abs() > worst.1 {
            worst = (i, d.abs());
        }
    }
    Difference { relative: (error / norm.max(f64::MIN_POSITIVE)).sqrt(), worst: worst.0 }
}

/// What a quantised matrix looks like.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Inputs that share a scale.
    pub group_size: usize,
    /// Random zero points instead of 8.
    pub asymmetric: bool,
    /// Groups are assigned to inputs at random.
    pub act_order: bool,
}

/// Falcon-7B-Instruct's.
pub const G64: Format = Format { group_size: 64, asymmetric: false, act_order: false };

/// Owner of a random GPTQ matrix. Its scales have six significant bits, so that scale * (code - zero) is exact in f16 and the
/// reference's rounding of weights does not blur the comparison.
pub struct Quantised {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Inputs that share a scale.
    pub group_size: usize,
    qweight: Vec<u8>,
    qzeros: Vec<u8>,
    scales: Vec<u8>,
    g_idx: Option<Vec<u8>>,
    asymmetric: bool,
}

impl Quantised {
    /// A random `[n, k]`.
    pub fn new(random: &mut Random, n: usize, k: usize, format: Format) -> Quantised {
        let group_size = format.group_size.min(k);
        let groups = k.div_ceil(group_size);
        let mut bytes = |words: usize| -> Vec<u8> {
            (0..words).flat_map(|_| (random.bits() as u32).to_le_bytes()).collect()
        };
        let qweight = bytes(k / 8 * n);
        let qzeros =
            if format.asymmetric { bytes(groups * (n / 8)) } else { vec![0x77; groups * (n / 8) * 4] };
        let norm = (k as f32).sqrt().recip() / 4.0;
        let scales = (0..groups * n).flat_map(|_| {
            let coarse = (random.bits() % 32 + 32) as f32 / 64.0;
            f32_to_f16(coarse * norm.log2().round().exp2()).to_le_bytes()
        });
        let scales = scales.collect();
        let g_idx = format.act_order.then(|| {
            let mut order: Vec<usize> = (0..k).collect();
            for i in (1..k).rev() {
                order.swap(i, random.bits() as usize % (i + 1));
            }
            let mut groups = vec![0u32; k];
            for (place, &input) in order.iter().enumerate() {
                groups[input] = (place / group_size) as u32;
            }
            groups.iter().flat_map(|g| g.to_le_bytes()).collect()
        });
        Quantised { n, k, group_size, qweight, qzeros, scales, g_idx, asymmetric: format.asymmetric }
    }

    /// Multiplies the scales of each output. With powers of two that leave their six bits within f16, weights stay exact.
    pub fn scale_outputs(&mut self, factor: impl Fn(usize) -> f32) {
        for (i, bytes) in self.scales.chunks_exact_mut(2).enumerate() {
            let scale = f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]]));
            bytes.copy_from_slice(&f32_to_f16(scale * factor(i % self.n)).to_le_bytes());
        }
    }

    /// As a checkpoint would give it.
    #[must_use]
    pub fn tensor(&self) -> GptqTensor<'_> {
        GptqTensor {
            name: "test".into(),
            k: self.k,
            n: self.n,
            group_size: self.group_size,
            qweight: &self.qweight,
            qzeros: &self.qzeros,
            zero_offset: 1,
            constant_zero: (!self.asymmetric).then_some(8),
            scales: FloatTensor {
                dtype: FloatType::F16,
                shape: [self.k.div_ceil(self.group_size), self.n],
                bytes: &self.scales,
            },
            g_idx: self.g_idx.as_deref(),
            bias: None,
        }
    }
}

/// A matrix on the GPU made of parts at (row, input), by `gptq_repack`.
///
/// # Errors
/// A driver failure, or a group size the kernels do not take.
pub fn repack(
    stream: &Stream,
    n: usize,
    k: usize,
    parts: &[(&Quantised, usize, usize)],
) -> Result<Int4Matrix> {
    let tensors: Vec<_> = parts.iter().map(|(q, row, input)| (q.tensor(), *row, *input)).collect();
    let orders = tensors.iter().map(|(t, _, _)| InputOrder::of(t)).collect::<Result<Vec<_>>>()?;
    let scales_per_row = orders.iter().map(|o| o.scales_per_row).max().unwrap_or(1);
    let has_zeros = tensors.iter().any(|(t, _, _)| t.constant_zero.is_none());
    let mut matrix = Int4Matrix::new(stream, n, k, scales_per_row, has_zeros)?;
    for ((t, row, input), order) in tensors.iter().zip(&orders) {
        let mut bytes = Vec::new();
        let mut place = |part: &[u8]| {
            let at = bytes.len();
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(256), 0);
            at
        };
        let words = |v: &[u32]| -> Vec<u8> { v.iter().flat_map(|w| w.to_le_bytes()).collect() };
        let (qweight, qzeros, scales) = (place(t.qweight), place(t.qzeros), place(t.scales.bytes));
        let group = place(&words(&order.group));
        let source_input = order.source.as_ref().map(|s| place(&words(s)));
        let bytes = DevBuf::from_host(stream, "raw", &bytes)?;
        let raw = RawGptq {
            bytes: &bytes,
            qweight,
            qzeros,
            scales,
            group,
            source_input,
            n: t.n,
            k: t.k,
            groups: t.groups(),
            zero_offset: t.zero_offset,
        };
        ops::gptq_repack(stream, &raw, &mut matrix, *row, *input)?;
    }
    ops::row_factors(stream, &mut matrix)?;
    Ok(matrix)
}

/// A random table, on the host and in units on the GPU, packed ones or f16.
///
/// # Errors
/// A driver failure.
pub fn table(stream: &Stream, vocab: usize, hidden: usize, packed: bool) -> Result<(Vec<u8>, Table)> {
    // Drawn from some thousand values: a table of 300 million would take seconds.
    let mut random = Random::new(9);
    let values = random.halves(4096, (hidden as f32).sqrt().recip());
    let values: Vec<u16> = if packed { values.into_iter().map(eight_bits).collect() } else { values };
    let draws = (0..(vocab * hidden).div_ceil(5)).flat_map(|_| {
        let bits = random.bits();
        (0..5).map(move |i| (bits >> (12 * i)) as usize % 4096)
    });
    let rows: Vec<u16> = draws.take(vocab * hidden).map(|i| values[i]).collect();
    let bytes: Vec<u8> = rows.iter().flat_map(|h| h.to_le_bytes()).collect();
    let raw = DevBuf::from_host(stream, "raw", &bytes)?;
    let mut units = DevBuf::guarded(stream, "units", &vec![NAN16; rows.len()])?;
    ops::table_repack(stream, &raw, vocab, hidden, &mut units, 0)?;
    let mut table = Table::new(units, vocab, hidden, false);
    if packed {
        let misfit = || Error::Usage("table: a value is too large to be packed".into());
        table = ops::table_pack(stream, &table)?.ok_or_else(misfit)?;
    }
    Ok((bytes, table))
}

/// The f16 with its last three bits cut off, so that it has no more than eight significant ones.
fn eight_bits(half: u16) -> u16 {
    half & !7
}

/// Cos and sin of every position and pair, as the model's table has them.
///
/// # Errors
/// A driver failure.
pub fn rope_table(stream: &Stream) -> Result<DevBuf<f32>> {
    DevBuf::guarded(stream, "table", &reference::rope_table(THETA, CONTEXT))
}
