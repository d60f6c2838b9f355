//! The bytes of synthetic tensors: seeded, in chunks that do not depend on each other, 1.2 GB/s a core.

use std::f64::consts::TAU;

use crate::layout::{f16_to_f32, f32_to_f16};

/// Standard deviation of `code - 8`: see [`random_codes`].
pub(super) const CODE_SPREAD: f64 = 3.28;
/// Values a float tensor is drawn from; a power of two.
pub(super) const TABLE_LEN: usize = 4096;

/// How a tensor's bytes are made.
#[derive(Debug)]
pub(super) enum Fill {
    /// Random codes around 8.
    Codes,
    /// One word over and over.
    Word(u32),
    /// Zero points 6 to 10, stored minus one.
    ZeroPoints,
    /// `g_idx`: k / group, or with act-order a shuffle of that.
    GroupIndex { group_size: usize, shuffled: bool },
    /// Random values of a table of encoded ones.
    Halves(Vec<u16>),
    /// The same in single precision.
    Singles(Vec<f32>),
}

/// Makes the bytes of one chunk of a tensor (of a whole `g_idx`) from `random`.
pub(super) fn fill(fill: &Fill, random: &mut Random, buffer: &mut [u8]) {
    match fill {
        Fill::Codes => fill_words(buffer, || random_codes(random)),
        Fill::Word(word) => fill_words(buffer, || u64::from(*word) << 32 | u64::from(*word)),
        Fill::ZeroPoints => fill_words(buffer, || {
            let (a, b) = (random.next(), random.next());
            (a & 0x3333_3333_3333_3333) + (b & 0x1111_1111_1111_1111) + 0x5555_5555_5555_5555
        }),
        Fill::GroupIndex { group_size, shuffled } => {
            let mut inputs: Vec<usize> = (0..buffer.len() / 4).collect();
            if *shuffled {
                random.shuffle(&mut inputs);
            }
            for (place, input) in inputs.into_iter().enumerate() {
                let group = (place / group_size) as i32;
                buffer[4 * input..4 * input + 4].copy_from_slice(&group.to_le_bytes());
            }
        }
        Fill::Halves(table) => {
            for values in buffer.chunks_mut(8) {
                let draw = random.next();
                for (i, value) in values.chunks_exact_mut(2).enumerate() {
                    value.copy_from_slice(&table[(draw >> (16 * i)) as usize % TABLE_LEN].to_le_bytes());
                }
            }
        }
        Fill::Singles(table) => {
            for values in buffer.chunks_mut(16) {
                let draw = random.next();
                for (i, value) in values.chunks_exact_mut(4).enumerate() {
                    value.copy_from_slice(&table[(draw >> (16 * i)) as usize % TABLE_LEN].to_le_bytes());
                }
            }
        }
    }
}

/// Fills with 8-byte words; a shorter rest gets the head of one.
fn fill_words(buffer: &mut [u8], mut word: impl FnMut() -> u64) {
    for bytes in buffer.chunks_mut(8) {
        bytes.copy_from_slice(&word().to_le_bytes()[..bytes.len()]);
    }
}

/// Sixteen codes: 1 to 15 in a triangle around 8 (two numbers of 3 bits, plus 1), and one in 256 is 0, so that every
/// code occurs. Standard deviation 3.28. Uniform codes would have a mean of 7.5, which adds up over GELU's positive
/// outputs.
fn random_codes(random: &mut Random) -> u64 {
    let (a, b) = (random.next(), random.next());
    let codes = (a & 0x7777_7777_7777_7777) + (b & 0x7777_7777_7777_7777) + 0x1111_1111_1111_1111;
    // The fourth bit of every nibble is still unused; eight of them say whether a code becomes 0.
    let rare = [a, b].into_iter().fold(0x8888_8888_8888_8888, |rare, r| {
        rare & r & r.rotate_left(4) & r.rotate_left(8) & r.rotate_left(12)
    });
    codes & !((rare >> 3) * 15)
}

/// Half-precision values of a normal distribution, in pairs around the mean, so that it is exact.
pub(super) fn normal_table(mean: f64, spread: f64) -> Vec<u16> {
    let mut random = Random::new(0, "normal", 0);
    let mut uniform = || (random.next() >> 11) as f64 * (0.5f64).powi(53);
    let pairs = (0..TABLE_LEN / 2).map(|_| (-2.0 * (1.0 - uniform()).ln()).sqrt() * (TAU * uniform()).cos());
    pairs.flat_map(|z| [z, -z]).map(|z| f32_to_f16((mean + spread * z) as f32)).collect()
}

/// The nearest value of bf16, which Falcon was trained in: as f16 it has eight significant bits.
pub(super) fn to_bf16(half: u16) -> u16 {
    let bits = f16_to_f32(half).to_bits();
    f32_to_f16(f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000))
}

/// splitmix64, started from seed, tensor name and chunk: a chunk needs nothing of the one before it.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64, name: &str, chunk: usize) -> Random {
        // FNV-1a of the name, so that a tensor's numbers do not depend on how many others there are.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let mut random = Random(seed);
        random.0 = random.next() ^ hash;
        random.0 = random.next() ^ chunk as u64;
        random.next();
        random
    }

    #[inline]
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Fisher and Yates. The remainder's bias is below 2^-49 for the 18176 inputs of a matrix.
    fn shuffle(&mut self, items: &mut [usize]) {
        for last in (1..items.len()).rev() {
            items.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
    }
}
