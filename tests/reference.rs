//! The reference against hand-computed cases and against loops plainer still.

use peregrine::checkpoint::{FloatTensor, FloatType, GptqTensor};
use peregrine::layout::{UNIT_CODE_BYTES, UNIT_INPUTS, UNIT_ROWS, f16_to_f32, f32_to_f16};
use peregrine::reference;
use peregrine::repack::row_factors;

/// Numbers without a pattern, the same every run (xorshift).
struct Random(u64);

impl Random {
    fn word(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    /// In -0.9..1.1: off zero, so that a lost term changes a sum.
    fn float(&mut self) -> f32 {
        self.word() as f32 / u32::MAX as f32 * 2.0 - 0.9
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// `values` as a file stores them.
fn stored(values: &[f32], dtype: FloatType) -> Vec<u8> {
    match dtype {
        FloatType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        FloatType::F16 => values.iter().flat_map(|v| f32_to_f16(*v).to_le_bytes()).collect(),
        FloatType::BF16 => values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect(),
    }
}

/// The bytes of a quantised matrix.
struct Matrix {
    k: usize,
    n: usize,
    group_size: usize,
    qweight: Vec<u8>,
    qzeros: Vec<u8>,
    zero_offset: u8,
    scales: (FloatType, Vec<u8>),
    g_idx: Option<Vec<u8>>,
    bias: Option<Vec<u8>>,
}

impl Matrix {
    fn random(random: &mut Random, k: usize, n: usize, group_size: usize) -> Matrix {
        let groups = k.div_ceil(group_size);
        let words = |random: &mut Random, n| (0..n).flat_map(|_| random.word().to_le_bytes()).collect();
        let scales: Vec<f32> = random.floats(groups * n).iter().map(|v| v * 0.01).collect();
        Matrix {
            k,
            n,
            group_size,
            qweight: words(random, k / 8 * n),
            qzeros: words(random, groups * n / 8),
            zero_offset: 1,
            scales: (FloatType::F16, stored(&scales, FloatType::F16)),
            g_idx: None,
            bias: None,
        }
    }

    fn groups(&self) -> usize {
        self.k.div_ceil(self.group_size)
    }

    fn tensor(&self) -> GptqTensor<'_> {
        GptqTensor {
            name: "test".to_string(),
            k: self.k,
            n: self.n,
            group_size: self.group_size,
            qweight: &self.qweight,
            qzeros: &self.qzeros,
            zero_offset: self.zero_offset,
            constant_zero: None,
            scales: FloatTensor {
                dtype: self.scales.0,
                shape: [self.groups(), self.n],
                bytes: &self.scales.1,
            },
            g_idx: self.g_idx.as_deref(),
            bias: self.bias.as_deref().map(|bytes| FloatTensor {
                dtype: FloatType::F16,
                shape: [1, self.n],
                bytes,
            }),
        }
    }
}

/// Relative error of `erf`. Measured: 8e-16 at 5, where the rounding of x^2 weighs most; f64 itself has 1e-16.
const ERF_TOLERANCE: f64 = 3e-15;

#[test]
fn erf_matches_known_values() {
    // C's erf.
    for (x, want) in [
        (0.0, 0.0),
        (1e-10, 1.128_379_167_095_512_6e-10),
        (0.1, 0.112_462_916_018_284_9),
        (0.5, 0.520_499_877_813_046_5),
        (1.0, 0.842_700_792_949_714_9),
        (1.5, 0.966_105_146_475_310_8),
        (2.0, 0.995_322_265_018_952_7),
        (3.0, 0.999_977_909_503_001_4),
        (4.0, 0.999_999_984_582_742_1),
        (5.0, 0.999_999_999_998_462_5),
        (5.9, 1.0),
        (6.5, 1.0),
        (f64::INFINITY, 1.0),
    ] {
        for (x, want) in [(x, want), (-x, -want)] {
            let got = reference::erf(x);
            assert!((got - want).abs() <= ERF_TOLERANCE * want.abs(), "erf({x}) = {got}, wanted {want}");
        }
    }
    assert!(reference::erf(f64::NAN).is_nan());
}

/// Half a unit in the last place of f32, relative: what storing a correct f64 result costs.
const F32_ROUNDING: f64 = 6e-8;

#[test]
fn gelu_is_the_exact_form() {
    // 0.5 x erfc(-x / sqrt 2) with C's erfc. The tanh approximation is off by 1e-4 at 1, by 5e-4 at 2.75.
    let mut x = [-5.0, -3.0, -1.0, 0.0, 0.5, 1.0, 2.75, 4.0];
    let want: [f64; 8] = [
        -1.433_257_858_9e-6,
        -0.004_049_694_094_9,
        -0.158_655_253_93,
        0.0,
        0.345_731_230_637,
        0.841_344_746_069,
        2.741_805_651_104,
        3.999_873_315_033,
    ];
    reference::gelu(&mut x);
    for (got, want) in x.into_iter().map(f64::from).zip(want) {
        assert!((got - want).abs() <= F32_ROUNDING * want.abs(), "{got}, wanted {want}");
    }
}

#[test]
fn layernorm_by_hand() {
    // Mean 2.5, biased variance 1.25; epsilon 0.3125 makes the divisor exactly 1.25.
    let x = [1.0, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0];
    let y = reference::layernorm(&x, &[1.0, 1.0, 1.0, 2.0], &[0.0, 0.0, 0.5, 0.0], 0.3125);
    assert_eq!(y, [-1.2, -0.4, 0.9, 2.4, 1.2, 0.4, 0.1, -2.4]);
}

#[test]
fn dequantize_by_hand() {
    // k = 8, n = 8, one group. Column n holds the codes n, n + 1, .. (mod 16); its stored zero point is 15 - n.
    let qweight: Vec<u8> = (0..8u32)
        .flat_map(|n| (0..8).map(|k| ((n + k) & 15) << (4 * k)).sum::<u32>().to_le_bytes())
        .collect();
    let qzeros = 0x89ab_cdefu32.to_le_bytes();
    // 1/3 is 0.333251953125 in f16; times 15 it is still exact in f32, and in no need of a second rounding.
    let scales = stored(&[1.0 / 3.0; 8], FloatType::F16);
    // v1: 15 + 1 does not fit into 4 bits and means 0, as in AutoGPTQ's kernels.
    for (zero_offset, zeros) in [(1, [0, 15, 14, 13, 12, 11, 10, 9]), (0, [15, 14, 13, 12, 11, 10, 9, 8])] {
        let w = GptqTensor {
            name: "by hand".to_string(),
            k: 8,
            n: 8,
            group_size: 8,
            qweight: &qweight,
            qzeros: &qzeros,
            zero_offset,
            constant_zero: None,
            scales: FloatTensor { dtype: FloatType::F16, shape: [1, 8], bytes: &scales },
            g_idx: None,
            bias: None,
        };
        let weights = reference::dequantize(&w);
        for (n, zero) in zeros.into_iter().enumerate() {
            for k in 0..8 {
                let exact = 0.333_251_953_125 * (((n + k) & 15) as f64 - f64::from(zero));
                assert_eq!(f64::from(weights[n * 8 + k]), exact, "n {n} k {k}");
            }
        }
    }
}

/// x W^T + bias by the plainest loop.
fn product(x: &[f32], weights: &[f32], bias: Option<&[f32]>, k: usize) -> Vec<f32> {
    let mut y = Vec::new();
    for x in x.chunks_exact(k) {
        for (n, row) in weights.chunks_exact(k).enumerate() {
            let sum: f64 = x.iter().zip(row).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            y.push((sum + f64::from(bias.map_or(0.0, |b| b[n]))) as f32);
        }
    }
    y
}

/// Both sum in f64 in the same order, so they must agree to the bit, with any number of threads.
fn assert_matmul_is_the_product(matrix: &Matrix, x: &[f32], bias: Option<&[f32]>) {
    let w = matrix.tensor();
    let got = reference::gptq_matmul(x, &w);
    assert_eq!(got, product(x, &reference::dequantize(&w), bias, w.k), "k {} n {}", w.k, w.n);
}

#[test]
fn gptq_matmul_is_the_product_with_the_dequantised_matrix() {
    let mut random = Random(0x5eed);
    for (m, k, n, group_size) in [
        (1, 64, 16, 64),
        (3, 72, 72, 8),      // tiles that are not full in either direction
        (2, 320, 448, 64),   // the demonstration model's query_key_value
        (2, 320, 128, 128),  // the last group is half full
        (2, 192, 136, 192),  // one group over all inputs
        (17, 128, 1280, 32), // several threads
        (2, 24, 8, 12),      // a word of codes that belongs to two groups
    ] {
        let matrix = Matrix::random(&mut random, k, n, group_size);
        assert_matmul_is_the_product(&matrix, &random.floats(m * k), None);
    }
    assert!(reference::gptq_matmul(&[], &Matrix::random(&mut random, 64, 64, 64).tensor()).is_empty());
}

#[test]
fn gptq_matmul_follows_g_idx() {
    let mut random = Random(0xac70);
    let mut matrix = Matrix::random(&mut random, 320, 64, 64);
    let x = random.floats(2 * 320);
    let plain = reference::gptq_matmul(&x, &matrix.tensor());
    let in_order: Vec<i32> = (0..320).map(|k| k / 64).collect();
    matrix.g_idx = Some(in_order.iter().flat_map(|g| g.to_le_bytes()).collect());
    assert_eq!(reference::gptq_matmul(&x, &matrix.tensor()), plain);
    matrix.g_idx = Some((0..320).flat_map(|k: i32| (k * 7 % 5).to_le_bytes()).collect());
    assert_matmul_is_the_product(&matrix, &x, None);
    assert_ne!(reference::gptq_matmul(&x, &matrix.tensor()), plain);
}

#[test]
fn gptq_matmul_takes_bias_zero_offsets_and_scales_of_every_dtype() {
    let mut random = Random(0xb1a5);
    let mut matrix = Matrix::random(&mut random, 64, 136, 64);
    let x = random.floats(3 * 64);
    let bias = random.floats(136);
    matrix.bias = Some(stored(&bias, FloatType::F16));
    let bias: Vec<f32> = bias.iter().map(|&b| f16_to_f32(f32_to_f16(b))).collect();
    for zero_offset in [0, 1] {
        for dtype in [FloatType::F32, FloatType::F16, FloatType::BF16] {
            matrix.zero_offset = zero_offset;
            matrix.scales = (dtype, stored(&random.floats(136), dtype));
            assert_matmul_is_the_product(&matrix, &x, Some(&bias));
        }
    }
}

#[test]
fn embed_and_head_read_every_dtype() {
    let mut random = Random(0xe4b);
    let (vocab, hidden) = (700, 96);
    let values = random.floats(vocab * hidden);
    let x = random.floats(3 * hidden);
    for dtype in [FloatType::F32, FloatType::F16, FloatType::BF16] {
        let bytes = stored(&values, dtype);
        let embedding = FloatTensor { dtype, shape: [vocab, hidden], bytes: &bytes };
        let ids: Vec<u32> = (0..vocab as u32).collect();
        let rows = reference::embed(&embedding, &ids);
        for (got, want) in rows.iter().zip(&values) {
            assert!((got - want).abs() <= want.abs() / 128.0 + 1e-7, "{dtype:?}: {got}, wanted {want}");
        }
        assert_eq!(
            reference::embed(&embedding, &[699, 0]),
            [&rows[699 * hidden..], &rows[..hidden]].concat()
        );
        assert_eq!(reference::head(&x, &embedding), product(&x, &rows, None, hidden), "{dtype:?}");
        if dtype == FloatType::F32 {
            assert_eq!(rows, values);
        }
    }
}

#[test]
fn rope_turns_pairs_half_a_head_apart() {
    let mut random = Random(0x40fe);
    let x = random.floats(3 * 2 * 64);
    let mut y = x.clone();
    reference::rope(&mut y, 2, 0, 10000.0);
    assert_eq!(y[..128], x[..128], "position 0 is not turned");
    // Position 1: the first pair turns by 1 radian, the last (10000^(-62/64)) by 1.3335214e-4.
    let (sin, cos) = 1f32.sin_cos();
    assert_eq!(y[128], x[128] * cos - x[128 + 32] * sin);
    assert_eq!(y[128 + 32], x[128 + 32] * cos + x[128] * sin);
    let (sin, cos) = 1.333_521_4e-4_f32.sin_cos();
    assert_eq!(y[128 + 31], x[128 + 31] * cos - x[128 + 63] * sin);
    // `start` continues where another call ended, and every head of a token turns alike.
    let mut last = x[256..].to_vec();
    reference::rope(&mut last, 2, 2, 10000.0);
    assert_eq!(last, y[256..]);
    let mut alone = x[256 + 64..].to_vec();
    reference::rope(&mut alone, 1, 2, 10000.0);
    assert_eq!(alone, y[256 + 64..]);
}

#[test]
fn attention_by_hand() {
    // Keys differ in one value, so the scores of q = 8 there are 0 and ln 3: weights 1/4 and 3/4.
    let mut keys = vec![0.0; 2 * 64];
    keys[64] = 3f32.ln();
    let mut values = vec![0.0; 2 * 64];
    (values[0], values[64], values[65]) = (1.0, 5.0, 4.0);
    let mut q = vec![0.0; 2 * 2 * 64]; // two tokens, two heads
    q[0] = 8.0; // token 0 sees one key only
    q[128] = 8.0; // token 1, head 0
    let out = reference::attention(&q, &keys, &values, 2, 0);
    assert_eq!(out[0], 1.0, "the first token attends to itself alone");
    assert_eq!(out[64], 1.0);
    assert!((out[128] - 4.0).abs() < 1e-6 && (out[129] - 3.0).abs() < 1e-6, "{} {}", out[128], out[129]);
    assert_eq!(out[192..194], [3.0, 2.0], "a zero query weighs all alike");
    // The second token alone, with the first in the cache; what lies behind it is not read.
    let unused = vec![f32::NAN; 64];
    let (keys, values) = ([keys, unused.clone()].concat(), [values, unused].concat());
    assert_eq!(reference::attention(&q[128..], &keys, &values, 2, 1), out[128..]);
}

#[test]
fn attention_with_threads_equals_attention_row_by_row() {
    let mut random = Random(0xa77e);
    let (rows, heads, start) = (40, 5, 30);
    let q = random.floats(rows * heads * 64);
    let (keys, values) = (random.floats((start + rows) * 64), random.floats((start + rows) * 64));
    let all = reference::attention(&q, &keys, &values, heads, start);
    for row in 0..rows {
        let span = row * heads * 64..(row + 1) * heads * 64;
        let one = reference::attention(&q[span.clone()], &keys, &values, heads, start + row);
        assert_eq!(one, all[span], "row {row}");
    }
}

#[test]
fn attention_survives_large_scores() {
    // e^800 does not fit into f64: the largest score must be taken off first.
    let keys = [vec![10.0; 64], vec![11.0; 64]].concat();
    let values = [vec![1.0; 64], vec![2.0; 64]].concat();
    let out = reference::attention(&[10.0; 64], &keys, &values, 1, 1);
    assert_eq!(out, vec![2.0; 64]);
}

#[test]
fn add_and_argmax() {
    let mut x = [1.0, 2.0];
    reference::add(&mut x, &[0.5, -2.0]);
    assert_eq!(x, [1.5, 0.0]);
    assert_eq!(reference::argmax(&[1.0, 3.0, 3.0, -1.0]), Some(1), "the first of equals");
    assert_eq!(reference::argmax(&[f32::NAN, -5.0, f32::NEG_INFINITY]), Some(1));
    assert_eq!(reference::argmax(&[f32::NEG_INFINITY]), Some(0));
    assert_eq!(reference::argmax(&[f32::NAN]), None);
    assert_eq!(reference::argmax(&[]), None);
}

/// Of a row's largest scale: 1, 2 (whose product with 2^7 twice would be 2^15), the largest and the least f16, a negative one, none.
#[test]
fn row_factors_by_hand() {
    let (k, unit_bytes) = (2 * UNIT_INPUTS, UNIT_CODE_BYTES + UNIT_ROWS * 2);
    let mut units = vec![0u8; 2 * unit_bytes];
    let mut set = |unit: usize, row: usize, scale: f32| {
        // Rows g and g + 8 are a pair.
        let at = unit * unit_bytes + UNIT_CODE_BYTES + (row % 8 * 2 + row / 8) * 2;
        units[at..at + 2].copy_from_slice(&f32_to_f16(scale).to_le_bytes());
    };
    set(0, 0, 0.25);
    set(1, 0, 1.0);
    set(0, 8, 2.0);
    set(1, 1, 65504.0);
    set(0, 9, 2f32.powi(-24));
    set(0, 15, -0.0078125); // -2^-7: 2^-7 x 2^20 = 2^13, and 2^21 twice would be 2^15
    let factors = row_factors(&units, k, 1, false);
    let want = |row: usize| match row {
        0 => 128.0,
        8 => 64.0,
        1 => 0.5,
        9 => 32768.0,
        15 => 1024.0,
        _ => 1.0,
    };
    let got: Vec<f32> = factors.iter().map(|&f| f16_to_f32(f)).collect();
    let want: Vec<f32> = (0..8).flat_map(|g| [g, g + 8]).map(want).collect();
    assert_eq!(got, want);
}
