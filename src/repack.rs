//! From AutoGPTQ's tensors to units, the one layout of weights on the GPU (drawn in `cuda/units.cuh`): the rules, and the
//! plain loops that the repack kernels are tested against.

use crate::checkpoint::GptqTensor;
use crate::error::{Error, Result};
use crate::layout::{PIECE_BYTES, UNIT_CODE_BYTES, UNIT_INPUTS, UNIT_ROWS, f16_to_f32, f32_to_f16};

/// Inputs that must share a scale: half a unit.
const HALF_INPUTS: usize = UNIT_INPUTS / 2;

/// How the inputs of a matrix are grouped in units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputOrder {
    /// Act-order: which input of the file stands at each place, sorted by group; `None` is the file's own order.
    pub source: Option<Vec<u32>>,
    /// `[k / 32]`: group of inputs `32 i .. 32 i + 31`.
    pub group: Vec<u32>,
    /// 1 if the two halves of every unit share a group, else 2.
    pub scales_per_row: usize,
}

impl InputOrder {
    /// The order of `w`'s inputs: as they are, or, with act-order, stably sorted by group.
    ///
    /// # Errors
    /// [`Error::Usage`] for a group size that cuts through 32 inputs (anything but multiples of 32, or -1).
    pub fn of(w: &GptqTensor<'_>) -> Result<InputOrder> {
        let groups: Vec<u32> = match w.g_idx {
            None => (0..w.k).map(|k| (k / w.group_size) as u32).collect(),
            Some(bytes) => {
                bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
        };
        let source = w.g_idx.map(|_| {
            let mut order: Vec<u32> = (0..w.k as u32).collect();
            order.sort_by_key(|&k| groups[k as usize]);
            order
        });
        let group_at = |i: usize| groups[source.as_ref().map_or(i, |s| s[i] as usize)];
        let group: Vec<u32> = (0..w.k / HALF_INPUTS).map(|half| group_at(half * HALF_INPUTS)).collect();
        if (0..w.k).any(|i| group_at(i) != group[i / HALF_INPUTS]) {
            return Err(Error::Usage(format!(
                "{}: group size {} does not divide into runs of 32 inputs; the GPU kernels take 32, 64, 128 and -1 (use --device cpu)",
                w.name, w.group_size
            )));
        }
        let scales_per_row = if group.chunks(2).all(|pair| pair[0] == pair[pair.len() - 1]) { 1 } else { 2 };
        Ok(InputOrder { source, group, scales_per_row })
    }
}

fn word(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
}

/// Code of output `n` and input `k` (of the file).
fn code(w: &GptqTensor<'_>, n: usize, k: usize) -> u32 {
    word(w.qweight, k / 8 * w.n + n) >> (4 * (k % 8)) & 15
}

/// Zero point of output `n` in group `g`: the plain one, 8 when symmetric.
fn zero(w: &GptqTensor<'_>, n: usize, g: usize) -> u32 {
    ((word(w.qzeros, g * (w.n / 8) + n / 8) >> (4 * (n % 8)) & 15) + u32::from(w.zero_offset)) & 15
}

/// The units of `w`, `[n / 16][k / 64][unit_bytes]`, with `scales_per_row` scales a row (at least the order's) and zero points
/// or not: what `gptq_repack` writes for a matrix that stands alone.
#[must_use]
pub fn gptq_repack(
    w: &GptqTensor<'_>,
    order: &InputOrder,
    scales_per_row: usize,
    has_zeros: bool,
) -> Vec<u8> {
    let mut out = Vec::new();
    for tile in 0..w.n / UNIT_ROWS {
        for unit in 0..w.k / UNIT_INPUTS {
            let mut codes = [0u8; UNIT_CODE_BYTES];
            for row in 0..UNIT_ROWS {
                for input in 0..UNIT_INPUTS {
                    let k = unit * UNIT_INPUTS + input;
                    let k = order.source.as_ref().map_or(k, |s| s[k] as usize);
                    // Step, quad lane and nibble of this element, as cuda/units.cuh draws them.
                    let (step, kk, g) = (input / 16, input % 16, row % 8);
                    let lane = g * 4 + kk % 8 / 2;
                    let nibble = row / 8 + kk / 8 * 2 + kk % 2 * 4;
                    let at = lane * 16 + step * 4 + nibble / 2;
                    codes[at] |= (code(w, tile * UNIT_ROWS + row, k) as u8) << (4 * (nibble % 2));
                }
            }
            out.extend_from_slice(&codes);
            let half_words = |value: &dyn Fn(usize, usize) -> u16| -> Vec<u8> {
                let group = |half: usize| order.group[unit * 2 + half] as usize;
                let rows = (0..8).flat_map(|g| [g, g + 8]);
                let pairs = (0..scales_per_row).flat_map(|half| rows.clone().map(move |row| (half, row)));
                pairs
                    .flat_map(|(half, row)| value(tile * UNIT_ROWS + row, group(half)).to_le_bytes())
                    .collect()
            };
            out.extend(half_words(&|n, g| f32_to_f16(w.scales.get(g * w.n + n))));
            if has_zeros {
                out.extend(half_words(&|n, g| f32_to_f16(zero(w, n, g) as f32)));
            }
        }
    }
    out
}

/// Bytes of memory for a matrix of `tiles` row tiles of `tile_bytes`, in the order of [`to_sides`].
#[must_use]
pub fn sides_bytes(tiles: usize, tile_bytes: usize) -> usize {
    (tiles.div_ceil(2) * tile_bytes).div_ceil(PIECE_BYTES) * 2 * PIECE_BYTES
}

/// Where byte `at` of row tile `tile` lies, as `cuda/sides.cuh` draws it.
fn on_side(tile: usize, tile_bytes: usize, at: usize, sides: u32) -> usize {
    let (stream, offset) = (tile % 2, tile / 2 * tile_bytes + at);
    let pair = offset / PIECE_BYTES * 2 * PIECE_BYTES;
    let second = ((pair as u32 & sides).count_ones() as usize + stream) % 2;
    pair + second * PIECE_BYTES + offset % PIECE_BYTES
}

/// Units, row tile after row tile, in the order in which they lie in GPU memory: even row tiles are one stream of bytes and odd ones another,
/// and of each pair of pieces of 4096 bytes one is each stream's next; which, is the parity of bits `sides` of the pair's offset. The rest of
/// the memory, [`sides_bytes`] of it, is zero.
#[must_use]
pub fn to_sides(units: &[u8], tile_bytes: usize, sides: u32) -> Vec<u8> {
    let mut memory = vec![0; sides_bytes(units.len() / tile_bytes, tile_bytes)];
    for (tile, bytes) in units.chunks_exact(tile_bytes).enumerate() {
        for (at, &byte) in bytes.iter().enumerate() {
            memory[on_side(tile, tile_bytes, at, sides)] = byte;
        }
    }
    memory
}

/// Of each row of a matrix in units the f16 by which `gptq_batch` and `gptq_gemm` multiply its scales twice: a power of two, such that the largest
/// comes to 2^13 at least and stays below 2^15. `[n / 16][8][2]`, rows g and g + 8: what the kernel `row_factors` writes. A row of zeros has
/// 1; tiny rows have 2^15, which is too little for them.
#[must_use]
pub fn row_factors(units: &[u8], k: usize, scales_per_row: usize, has_zeros: bool) -> Vec<u16> {
    let scale_bytes = UNIT_ROWS * 2 * scales_per_row;
    let unit_bytes = UNIT_CODE_BYTES + scale_bytes * (1 + usize::from(has_zeros));
    let mut out = Vec::new();
    for tile in units.chunks(k / UNIT_INPUTS * unit_bytes) {
        let mut largest = [0f32; UNIT_ROWS];
        for unit in tile.chunks(unit_bytes) {
            let scales = &unit[UNIT_CODE_BYTES..UNIT_CODE_BYTES + scale_bytes];
            for (i, bytes) in scales.chunks(2).enumerate() {
                let scale = f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])).abs();
                largest[i % UNIT_ROWS] = largest[i % UNIT_ROWS].max(scale);
            }
        }
        for scale in largest {
            let mut factor = if scale == 0.0 { 1.0 } else { f32::from(1u16 << 15) };
            while scale * factor * factor >= f32::from(1u16 << 15) && factor > 0.5 {
                factor /= 2.0;
            }
            out.push(f32_to_f16(factor));
        }
    }
    out
}

/// The f16 units of a row-major table `[rows, k]`: what `table_repack` writes.
#[must_use]
pub fn table_repack(table: &[u16], k: usize) -> Vec<u16> {
    let rows = table.len() / k;
    let mut out = vec![0; table.len()];
    for row in 0..rows {
        for input in 0..k {
            let unit = row / UNIT_ROWS * (k / UNIT_INPUTS) + input / UNIT_INPUTS;
            let (step, kk, r) = (input % UNIT_INPUTS / 16, input % 16, row % UNIT_ROWS);
            let lane = r % 8 * 4 + kk % 8 / 2;
            let register = kk / 8 * 2 + r / 8;
            out[unit * UNIT_ROWS * UNIT_INPUTS + step * 256 + lane * 8 + register * 2 + kk % 2] =
                table[row * k + input];
        }
    }
    out
}

/// The f16 units of a table with 12 bits a value, `[units][3][32][4]` words of two values: what `table_pack` writes. `None` if a value is
/// not eight significant bits, or is 1/4 or more. Word j of lane l and step s has value j of the lane's four pairs, and a third of the
/// bits of the last one; all are the bits of 8 times the value.
#[must_use]
pub fn table_pack(units: &[u16]) -> Option<Vec<u16>> {
    const MASK: u16 = 0xbff8;
    // Where bits of the fourth pair lie in the others: first bit, bits, first bit there.
    const PLACES: [[(u16, u16, u16); 2]; 3] =
        [[(3, 3, 0), (15, 1, 14)], [(6, 3, 0), (13, 1, 14)], [(9, 3, 0), (12, 1, 14)]];
    let mut out = vec![0; units.len() / 4 * 3];
    let lanes = units.chunks_exact(8).enumerate();
    for (i, registers) in lanes {
        let (unit, step, lane) = (i / 128, i / 32 % 4, i % 32);
        for half in 0..2 {
            let mut values = [0; 4];
            for (register, value) in values.iter_mut().enumerate() {
                *value = f32_to_f16(f16_to_f32(registers[register * 2 + half]) * 8.0);
                if *value & !MASK != 0 {
                    return None;
                }
            }
            for (word, places) in PLACES.iter().enumerate() {
                let rest = places
                    .iter()
                    .fold(0, |bits, (from, count, to)| bits | (values[3] >> from & ((1 << count) - 1)) << to);
                out[unit * 768 + word * 256 + lane * 8 + step * 2 + half] = values[word] | rest;
            }
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three row tiles of 5000 bytes: two streams of 10000 and 5000 bytes, three pairs of pieces.
    #[test]
    fn streams_take_turns_by_pieces() {
        let tile_bytes = 5000;
        let units: Vec<u8> = (0..3 * tile_bytes).map(|i| (i / tile_bytes * 80 + i % 79 + 1) as u8).collect();
        assert_eq!(sides_bytes(3, tile_bytes), 3 * 2 * PIECE_BYTES);
        let piece =
            |tile: usize, from: usize, to: usize| &units[tile * tile_bytes + from..tile * tile_bytes + to];
        // Without bits the even tiles' stream is first in every pair; bit 13 turns round the second pair.
        for (sides, turned) in [(0, false), (1 << 13, true)] {
            let memory = to_sides(&units, tile_bytes, sides);
            assert_eq!(&memory[..4096], piece(0, 0, 4096));
            assert_eq!(&memory[4096..8192], piece(1, 0, 4096));
            let (even, odd) = if turned { (12288, 8192) } else { (8192, 12288) };
            assert_eq!(&memory[even..even + 904], piece(0, 4096, 5000), "{sides:#x}");
            assert_eq!(&memory[even + 904..even + 4096], piece(2, 0, 3192), "{sides:#x}");
            assert_eq!(&memory[odd..odd + 904], piece(1, 4096, 5000), "{sides:#x}");
            assert_eq!(&memory[16384..16384 + 1808], piece(2, 3192, 5000), "{sides:#x}");
            let rest = memory.iter().filter(|&&byte| byte == 0).count();
            assert_eq!(rest, 6 * PIECE_BYTES - units.len(), "nothing is written twice");
        }
    }

    #[test]
    fn no_byte_is_lost_whatever_the_bits() {
        let units: Vec<u8> = (0..9 * 544 * 23).map(|i| (i % 251) as u8 + 1).collect();
        for sides in [0, 0x2a_b000, 0xb_3000, u32::MAX] {
            let mut memory = to_sides(&units, 544 * 23, sides);
            memory.retain(|&byte| byte != 0);
            let (mut got, mut want) = (memory, units.clone());
            got.sort_unstable();
            want.sort_unstable();
            assert!(got == want, "{sides:#x}");
        }
    }
}
