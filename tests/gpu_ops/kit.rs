//! What the GPU tests share: the GPU or a loud skip, seeded data, comparison.

use peregrine::checkpoint::{FloatTensor, FloatType, GptqTensor};
use peregrine::error::Error;
use peregrine::gpu::ops::{self, Int4Matrix, RawGptq};
use peregrine::gpu::{DevBuf, Gpu, Stream};
use peregrine::layout::{f16_to_f32, f32_to_f16};
use peregrine::repack::InputOrder;

/// The first GPU and a stream on it; `None`, after saying so, where there is none. With PEREGRINE_REQUIRE_GPU=1 it fails instead.
pub fn gpu() -> Option<(Gpu, Stream)> {
    match Gpu::open(0) {
        Ok(gpu) => {
            let stream = gpu.stream().unwrap();
            Some((gpu, stream))
        }
        Err(Error::NoGpu(why)) => {
            assert!(
                std::env::var_os("PEREGRINE_REQUIRE_GPU").is_none_or(|v| v == "0"),
                "PEREGRINE_REQUIRE_GPU is set: {why}"
            );
            let test = std::thread::current().name().unwrap_or("?").to_owned();
            eprintln!("SKIPPED {test}: {why}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// splitmix64: seeded, and the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Roughly normal with deviation 1, shifted off zero: a mean of 0.25 makes dropped terms show.
    pub fn value(&mut self) -> f32 {
        (0..4).map(|_| self.unit() - 0.5).sum::<f32>() * 1.73 + 0.25
    }

    pub fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.value() * scale).collect()
    }

    /// Values that are exact in f16.
    pub fn halves(&mut self, n: usize, scale: f32) -> Vec<u16> {
        (0..n).map(|_| f32_to_f16(self.value() * scale)).collect()
    }
}

pub fn to_f32(halves: &[u16]) -> Vec<f32> {
    halves.iter().map(|&h| f16_to_f32(h)).collect()
}

/// NaN, to show what a kernel did not write.
pub const NAN16: u16 = 0x7e00;

pub fn nan16(stream: &Stream, n: usize) -> DevBuf<u16> {
    DevBuf::from_host(stream, "output", &vec![NAN16; n]).unwrap()
}

pub fn nan32(stream: &Stream, n: usize) -> DevBuf<f32> {
    DevBuf::from_host(stream, "output", &vec![f32::NAN; n]).unwrap()
}

/// Fails unless `got` has no NaN and ||got - want|| <= tolerance ||want||; names the worst element. Prints what it measured.
pub fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let mut worst = (0usize, -1.0f64);
    let (mut error, mut norm) = (0.0f64, 0.0f64);
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!(g.is_finite(), "{what}: element {i} is {g}, wanted {w}");
        let d = f64::from(g) - f64::from(w);
        error += d * d;
        norm += f64::from(w) * f64::from(w);
        if d.abs() > worst.1 {
            worst = (i, d.abs());
        }
    }
    let relative = (error / norm.max(f64::MIN_POSITIVE)).sqrt();
    let i = worst.0;
    eprintln!(
        "MEASURED {what}: relative L2 {relative:.2e} (tolerance {tolerance:.1e}), worst [{i}] {} for {}",
        got[i], want[i]
    );
    assert!(
        relative <= tolerance,
        "{what}: relative L2 {relative:.3e} > {tolerance:.1e}; worst [{i}] got {} wanted {}",
        got[i],
        want[i]
    );
}

/// What a quantised test matrix looks like.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    pub group_size: usize,
    pub asymmetric: bool,
    pub act_order: bool,
}

pub const G64: Format = Format { group_size: 64, asymmetric: false, act_order: false };
pub const FORMATS: [Format; 6] = [
    G64,
    Format { asymmetric: true, ..G64 },
    Format { group_size: 32, ..G64 },
    Format { group_size: 32, asymmetric: true, act_order: false },
    Format { group_size: 128, act_order: true, ..G64 },
    Format { group_size: usize::MAX, ..G64 },
];

/// Owner of a random GPTQ matrix. Its scales have six significant bits, so that scale * (code - zero) is exact in f16 and the
/// reference's rounding of weights does not blur the comparison.
pub struct Quantised {
    pub n: usize,
    pub k: usize,
    pub group_size: usize,
    qweight: Vec<u8>,
    qzeros: Vec<u8>,
    scales: Vec<u8>,
    g_idx: Option<Vec<u8>>,
    asymmetric: bool,
}

impl Quantised {
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
pub fn repack(stream: &Stream, n: usize, k: usize, parts: &[(&Quantised, usize, usize)]) -> Int4Matrix {
    let tensors: Vec<_> = parts.iter().map(|(q, row, input)| (q.tensor(), *row, *input)).collect();
    let orders: Vec<_> = tensors.iter().map(|(t, _, _)| InputOrder::of(t).unwrap()).collect();
    let scales_per_row = orders.iter().map(|o| o.scales_per_row).max().unwrap();
    let has_zeros = tensors.iter().any(|(t, _, _)| t.constant_zero.is_none());
    let mut matrix = Int4Matrix::new(stream, n, k, scales_per_row, has_zeros).unwrap();
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
        let bytes = DevBuf::from_host(stream, "raw", &bytes).unwrap();
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
        ops::gptq_repack(stream, &raw, &mut matrix, *row, *input).unwrap();
    }
    matrix
}
