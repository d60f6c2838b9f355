//! Activations as two planes of bytes with a step for each 64 of a token's, which `gptq_batch` multiplies as integers
//! where tokens are 9 to 16: `cuda/planes.cuh` draws them. Here in plain loops.
//!
//! `x[m, k] = step[k / 64][m] * (256 * high + low)`, both bytes signed; the largest of the 64 is [`LARGEST`] steps, so
//! that a value is off by at most half a step, 2^-16 of that.

use crate::layout::UNIT_INPUTS;

/// Most tokens; the rows in front of the steps.
pub const PLANE_TOKENS: usize = 16;
/// Steps of the largest of 64 values.
pub const LARGEST: f32 = 32639.0;
/// Of 64 values that are less, all are zero.
const LEAST: f32 = 1e-30;

/// `u16`s of a buffer of `inputs` a token, a multiple of 64.
#[must_use]
pub fn len(inputs: usize) -> usize {
    PLANE_TOKENS * inputs + inputs / UNIT_INPUTS * PLANE_TOKENS * 2
}

/// Bytes of a unit's plane.
const PLANE: usize = PLANE_TOKENS * UNIT_INPUTS;

/// Where input `k` of token `m` has its high byte; the low one is [`PLANE`] further on.
fn place(m: usize, k: usize) -> usize {
    let (chunk, at) = (k % UNIT_INPUTS / 16, k % 16);
    // Byte 4 q + j of a chunk is input [2q, 2q + 8, 2q + 1, 2q + 9][j].
    let byte = at % 8 / 2 * 4 + at % 2 * 2 + at / 8;
    k / UNIT_INPUTS * 2 * PLANE + m * UNIT_INPUTS + (chunk ^ (m / 2 % 4)) * 16 + byte
}

/// Where the step of a token's unit is.
fn step_at(inputs: usize, m: usize, k: usize) -> usize {
    PLANE_TOKENS * inputs * 2 + (k / UNIT_INPUTS * PLANE_TOKENS + m) * 4
}

/// Rows of `inputs` values, at most [`PLANE_TOKENS`], as planes. What is missing is zero.
#[must_use]
pub fn encode(x: &[f32], inputs: usize) -> Vec<u16> {
    let mut bytes = vec![0u8; len(inputs) * 2];
    for (m, row) in x.chunks(inputs).enumerate() {
        for (unit, values) in row.chunks(UNIT_INPUTS).enumerate() {
            let most = values.iter().fold(0f32, |most, v| most.max(v.abs()));
            let (step, inverse) = (most / LARGEST, if most > LEAST { LARGEST / most } else { 0.0 });
            let first = unit * UNIT_INPUTS;
            for (i, v) in values.iter().enumerate() {
                let steps = (v * inverse).round_ties_even() as i32;
                let at = place(m, first + i);
                bytes[at] = ((steps + 128) >> 8) as u8;
                bytes[at + PLANE] = steps as u8;
            }
            let at = step_at(inputs, m, first);
            bytes[at..at + 4].copy_from_slice(&step.to_le_bytes());
        }
    }
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
}

/// The first `tokens` rows.
#[must_use]
pub fn decode(planes: &[u16], inputs: usize, tokens: usize) -> Vec<f32> {
    let bytes: Vec<u8> = planes.iter().flat_map(|v| v.to_le_bytes()).collect();
    let value = |m: usize, k: usize| {
        let at = place(m, k);
        let steps = 256 * i32::from(bytes[at] as i8) + i32::from(bytes[at + PLANE] as i8);
        let at = step_at(inputs, m, k);
        f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) * steps as f32
    };
    (0..tokens * inputs).map(|i| value(i / inputs, i % inputs)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_to_half_a_step() {
        let inputs = 192;
        let x: Vec<f32> = (0..3 * inputs).map(|i| ((i * 37 % 101) as f32 - 45.0) * 0.13).collect();
        let back = decode(&encode(&x, inputs), inputs, 3);
        for (row, got) in x.chunks(64).zip(back.chunks(64)) {
            let most = row.iter().fold(0f32, |most, v| most.max(v.abs()));
            for (x, y) in row.iter().zip(got) {
                assert!(
                    (x - y).abs() <= most / LARGEST * 0.501,
                    "{x} came back as {y}, the largest is {most}"
                );
            }
            assert_ne!(row, got, "not all are whole steps");
        }
    }

    #[test]
    fn each_value_has_its_own_byte() {
        let first: Vec<usize> = (0..17).map(|k| place(0, k)).collect();
        assert_eq!(first, [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 16]);
        assert_eq!([place(2, 0), place(2, 16), place(15, 63)], [144, 128, 15 * 64 + 15]);
        let mut all: Vec<usize> = (0..PLANE).map(|i| place(i / 64, i % 64)).collect();
        all.sort_unstable();
        assert_eq!(all, (0..PLANE).collect::<Vec<_>>());
    }

    #[test]
    fn zeros_have_no_step() {
        assert!(encode(&[0.0; 128], 128).iter().all(|&v| v == 0));
    }
}
