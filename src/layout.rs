//! Names and numbers that every module shares. The glossary:
//!
//! | word | meaning |
//! | --- | --- |
//! | unit | 16 output rows x 64 inputs of a quantised matrix: the tile of the device layout |
//! | row tile | 16 output rows; `n / 16` of them in a matrix |
//! | group | the inputs that share one scale and one zero point in the checkpoint |
//! | slice | the run of inputs one thread block of the decode kernel sums; `hidden_size` inputs |
//! | position | index of a token in its sequence, from 0 |
//! | context | the number of positions whose keys and values are in the cache |
//! | timeline | one sequence: its KV cache and position |
//!
//! Matrices are named by the checkpoint's words: `query_key_value`, `dense`, `dense_h_to_4h`, `dense_4h_to_h`.
//! `[N, K]` means N rows of K, row-major.

/// Output rows of a unit: the M of `mma.sync.m16n8k16`.
pub const UNIT_ROWS: usize = 16;
/// Inputs of a unit: Falcon-7B's GPTQ group, and the largest power of two that divides 4544.
pub const UNIT_INPUTS: usize = 64;
/// Bytes of the 4-bit codes of a unit.
pub const UNIT_CODE_BYTES: usize = UNIT_ROWS * UNIT_INPUTS / 2;
/// Bytes of memory that are on the same side of L2, see [`crate::repack::to_sides`].
pub const PIECE_BYTES: usize = 4096;
/// The only head width the kernels are written for; every Falcon has it.
pub const HEAD_DIM: usize = 64;

/// IEEE half precision to single precision, exactly.
#[must_use]
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = u32::from(bits >> 10) & 0x1f;
    let mantissa = u32::from(bits & 0x3ff);
    match exponent {
        // Zero and subnormals: mantissa x 2^-24, exact in f32.
        0 => f32::from_bits(sign | (mantissa as f32 * f32::from_bits(0x3380_0000)).to_bits()),
        31 => f32::from_bits(sign | 0x7f80_0000 | (mantissa << 13)),
        _ => f32::from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13)),
    }
}

/// bfloat16 to single precision, exactly.
#[must_use]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Single precision to IEEE half precision, round to nearest even; too large becomes infinity.
#[must_use]
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude >= 0x7f80_0000 {
        // Infinity stays; a NaN stays a NaN (quiet, payload dropped).
        return sign | if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    }
    if magnitude >= 0x477f_f000 {
        return sign | 0x7c00; // 65520 and above round to infinity
    }
    if magnitude < 0x3880_0000 {
        // Below 2^-14: adding 0.5 lines the f32 mantissa's last bit up with 2^-24, so the FPU rounds for us.
        let rounded = (f32::from_bits(magnitude) + 0.5).to_bits() - 0.5f32.to_bits();
        return sign | rounded as u16;
    }
    let odd = (magnitude >> 13) & 1;
    sign | ((magnitude + 0xfff + odd - (112 << 23)) >> 13) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_survives_the_round_trip_through_f32() {
        for bits in 0..=u16::MAX {
            let back = f32_to_f16(f16_to_f32(bits));
            if f16_to_f32(bits).is_nan() {
                assert!(f16_to_f32(back).is_nan(), "{bits:#06x}");
            } else {
                assert_eq!(back, bits, "{bits:#06x}");
            }
        }
    }

    #[test]
    fn f32_rounds_to_nearest_even_f16() {
        // Halfway cases go to the even neighbour; the limits are those of IEEE 754.
        for (value, bits) in [
            (1.0 + 1.0 / 2048.0, 0x3c00),
            (1.0 + 3.0 / 2048.0, 0x3c02),
            (65504.0, 0x7bff),
            (65519.9, 0x7bff),
            (65520.0, 0x7c00),
            (5.960_464_5e-8, 0x0001),
            (2.980_232_2e-8, 0x0000),
            (2.980_233e-8, 0x0001),
            (6.103_515_6e-5, 0x0400),
            (-0.0, 0x8000),
        ] {
            assert_eq!(f32_to_f16(value), bits, "{value}");
        }
    }
}
