//! Float tensors as they lie in a file: F32, F16 or BF16, little-endian, perhaps unaligned, [rows, cols] row-major.
//!
//! Reading is exact in f32; F16 is what the device holds, so a value outside F16's range is a defect of the file,
//! found when the checkpoint is opened.

use crate::layout::{bf16_to_f32, f16_to_f32, f32_to_f16};

/// Type of a stored float tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of a single.
    BF16,
}

impl FloatType {
    /// Bytes of one value.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            FloatType::F32 => 4,
            FloatType::F16 | FloatType::BF16 => 2,
        }
    }

    /// Values of this type to f16, rounded to nearest even. The range was checked at open.
    #[cfg(feature = "cuda")]
    pub(crate) fn fill_f16(self, to: &mut [u8], from: &[u8]) {
        match self {
            FloatType::F16 => to.copy_from_slice(from),
            FloatType::F32 => {
                for (to, b) in to.chunks_exact_mut(2).zip(from.chunks_exact(4)) {
                    to.copy_from_slice(
                        &f32_to_f16(f32::from_le_bytes([b[0], b[1], b[2], b[3]])).to_le_bytes(),
                    );
                }
            }
            FloatType::BF16 => {
                for (to, b) in to.chunks_exact_mut(2).zip(from.chunks_exact(2)) {
                    to.copy_from_slice(&f32_to_f16(f32::from_le_bytes([0, 0, b[0], b[1]])).to_le_bytes());
                }
            }
        }
    }

    /// `F32`, `F16` or `BF16`, as safetensors writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            FloatType::F32 => "F32",
            FloatType::F16 => "F16",
            FloatType::BF16 => "BF16",
        }
    }
}

/// A view of a float tensor in the file. The bytes may be unaligned.
#[derive(Debug, Clone, Copy)]
pub struct FloatTensor<'a> {
    /// How a value is stored.
    pub dtype: FloatType,
    /// [rows, cols]; a vector of n values is [1, n].
    pub shape: [usize; 2],
    /// rows x cols values, row-major, little-endian.
    pub bytes: &'a [u8],
}

impl<'a> FloatTensor<'a> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Whether there are no values.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Value `i` in row-major order. `i` must be below `len()`.
    #[must_use]
    pub fn get(&self, i: usize) -> f32 {
        match self.dtype {
            FloatType::F32 => {
                let b = &self.bytes[4 * i..4 * i + 4];
                f32::from_le_bytes([b[0], b[1], b[2], b[3]])
            }
            FloatType::F16 => f16_to_f32(u16::from_le_bytes([self.bytes[2 * i], self.bytes[2 * i + 1]])),
            FloatType::BF16 => bf16_to_f32(u16::from_le_bytes([self.bytes[2 * i], self.bytes[2 * i + 1]])),
        }
    }

    /// Rows `first..first + count` as a tensor of their own. They must exist.
    #[must_use]
    pub fn rows(&self, first: usize, count: usize) -> FloatTensor<'a> {
        let row = self.shape[1] * self.dtype.size();
        FloatTensor {
            dtype: self.dtype,
            shape: [count, self.shape[1]],
            bytes: &self.bytes[first * row..(first + count) * row],
        }
    }

    /// All values in single precision, exactly.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            FloatType::F32 => words(self.bytes).map(f32::from_bits).collect(),
            FloatType::F16 => halves(self.bytes).map(f16_to_f32).collect(),
            FloatType::BF16 => halves(self.bytes).map(bf16_to_f32).collect(),
        }
    }

    /// All values in half precision, rounded to nearest even.
    #[must_use]
    pub fn to_f16_bits(&self) -> Vec<u16> {
        match self.dtype {
            FloatType::F32 => words(self.bytes).map(|w| f32_to_f16(f32::from_bits(w))).collect(),
            FloatType::F16 => halves(self.bytes).collect(),
            FloatType::BF16 => halves(self.bytes).map(|h| f32_to_f16(bf16_to_f32(h))).collect(),
        }
    }

    /// Index of the first value that is NaN, infinite, or, with `fits_f16`, rounds to infinity in half precision.
    pub(crate) fn first_bad(&self, fits_f16: bool) -> Option<usize> {
        // Magnitude bits order as the magnitudes do, and NaN lies above infinity: one integer maximum finds all.
        let bad = |largest: u32| match self.dtype {
            FloatType::F32 => largest >= if fits_f16 { 0x477f_f000 } else { 0x7f80_0000 },
            FloatType::F16 => largest >= 0x7c00,
            FloatType::BF16 => largest >= if fits_f16 { 0x4780 } else { 0x7f80 },
        };
        let size = self.dtype.size();
        let largest_of = |bytes: &[u8]| match self.dtype {
            FloatType::F32 => words(bytes).fold(0, |m, w| m.max(w & 0x7fff_ffff)),
            // In u16 all the way: twice the lanes.
            _ => u32::from(halves(bytes).fold(0, |m, h| m.max(h & 0x7fff))),
        };
        const BLOCK: usize = 4096;
        for (block, bytes) in self.bytes.chunks(BLOCK * size).enumerate() {
            if bad(largest_of(bytes)) {
                return bytes.chunks(size).position(|one| bad(largest_of(one))).map(|i| block * BLOCK + i);
            }
        }
        None
    }

    /// Whether every value is +0 or -0.
    pub(crate) fn is_zero(&self) -> bool {
        match self.dtype {
            FloatType::F32 => words(self.bytes).all(|w| w & 0x7fff_ffff == 0),
            _ => halves(self.bytes).all(|h| h & 0x7fff == 0),
        }
    }

    /// Whether both hold the same values once in half precision.
    pub(crate) fn same_in_f16(&self, other: &FloatTensor<'_>) -> bool {
        if self.dtype == other.dtype {
            return self.bytes == other.bytes;
        }
        (0..self.len()).all(|i| f32_to_f16(self.get(i)) == f32_to_f16(other.get(i)))
    }
}

/// Little-endian 32-bit words; bytes past the last whole word are ignored.
pub(crate) fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Little-endian 16-bit words.
fn halves(bytes: &[u8]) -> impl Iterator<Item = u16> + '_ {
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: FloatType, bytes: &[u8]) -> FloatTensor<'_> {
        FloatTensor { dtype, shape: [1, bytes.len() / dtype.size()], bytes }
    }

    #[test]
    fn the_three_types_read_the_same_numbers_from_unaligned_bytes() {
        let f32s: Vec<u8> =
            [0u8].into_iter().chain([1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes())).collect();
        for (dtype, bytes) in [
            (FloatType::F32, f32s[1..].to_vec()),
            (FloatType::F16, [0x3e00u16, 0xc000].iter().flat_map(|v| v.to_le_bytes()).collect()),
            (FloatType::BF16, [0x3fc0u16, 0xc000].iter().flat_map(|v| v.to_le_bytes()).collect()),
        ] {
            let t = tensor(dtype, &bytes);
            assert_eq!(t.to_f32(), [1.5, -2.0], "{dtype:?}");
            assert_eq!(t.to_f16_bits(), [0x3e00, 0xc000], "{dtype:?}");
            assert_eq!((t.get(0), t.get(1)), (1.5, -2.0), "{dtype:?}");
        }
    }

    #[test]
    fn the_first_bad_value_is_found_at_the_edge_of_f16() {
        for (value, fits) in [(65519.9f32, true), (65520.0, false), (f32::NAN, false), (-1e30, false)] {
            let mut values = vec![0.5f32; 5000];
            values[4500] = value;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!(tensor(FloatType::F32, &bytes).first_bad(true), (!fits).then_some(4500), "{value}");
            let finite = value.is_finite();
            assert_eq!(tensor(FloatType::F32, &bytes).first_bad(false), (!finite).then_some(4500), "{value}");
        }
        assert_eq!(tensor(FloatType::BF16, &0x477fu16.to_le_bytes()).first_bad(true), None);
        assert_eq!(tensor(FloatType::BF16, &0x4780u16.to_le_bytes()).first_bad(true), Some(0));
        assert_eq!(tensor(FloatType::F16, &0xfc00u16.to_le_bytes()).first_bad(false), Some(0));
    }
}
