//! The numbers behind the codes: dequantised apart from the library's own way, and quantised anew.

use peregrine::layout::{f16_to_f32, f32_to_f16};
use serde_json::json;

use super::{Model, RawTensor, halves, words};

/// [`Model::dequantise`]'s answer.
pub struct Dequantised {
    pub k_n: [usize; 2],
    /// [k, n]
    pub weights: Vec<f32>,
}

impl Model {
    /// Quantised once more, by rounding the dequantised weights: `group` inputs per group (`None`: -1), with
    /// act-order a seeded shuffle of the inputs. Other weights, but near: the model still writes English.
    pub fn requantise(mut self, group: Option<usize>, act_order: bool, sym: bool) -> Model {
        for name in self.modules() {
            let old = self.dequantise(&name);
            let [k, n] = old.k_n;
            let size = group.unwrap_or(k).min(k);
            let mut order: Vec<usize> = (0..k).collect();
            if act_order {
                shuffle(&mut order, k as u64);
            }
            let mut g_idx = vec![0usize; k];
            for (place, &input) in order.iter().enumerate() {
                g_idx[input] = place / size;
            }
            let groups = k.div_ceil(size);
            let (mut scales, mut zeros) = (vec![0f32; groups * n], vec![8u32; groups * n]);
            for column in 0..n {
                for g in 0..groups {
                    let of_group = (0..k).filter(|&i| g_idx[i] == g).map(|i| old.weights[i * n + column]);
                    let (low, high) = of_group.fold((0f32, 0f32), |(l, h), w| (l.min(w), h.max(w)));
                    let scale = if sym { 2.0 * high.max(-low) / 15.0 } else { (high - low) / 15.0 };
                    let scale = f16_to_f32(f32_to_f16(scale.max(1e-5)));
                    scales[g * n + column] = scale;
                    if !sym {
                        // From 1, as version 1 cannot store a zero point of 0.
                        zeros[g * n + column] = ((-low / scale).round() as u32).clamp(1, 15);
                    }
                }
            }
            let code = |i: usize, column: usize| {
                let at = g_idx[i] * n + column;
                ((old.weights[i * n + column] / scales[at]).round() + zeros[at] as f32).clamp(0.0, 15.0)
                    as u32
            };
            let qweight = pack(k / 8, n, |row, column, i| code(8 * row + i, column));
            let qzeros = pack(groups, n / 8, |g, column, i| zeros[g * n + 8 * column + i] - 1);
            let scales = scales.into_iter().flat_map(|s| f32_to_f16(s).to_le_bytes()).collect();
            let g_idx = g_idx.into_iter().flat_map(|g| (g as i32).to_le_bytes()).collect();
            for (part, dtype, shape, bytes) in [
                ("qweight", "I32", vec![k / 8, n], qweight),
                ("qzeros", "I32", vec![groups, n / 8], qzeros),
                ("scales", "F16", vec![groups, n], scales),
                ("g_idx", "I32", vec![k], g_idx),
            ] {
                self.tensors.insert(format!("{name}.{part}"), RawTensor { dtype, shape, bytes });
            }
        }
        self.set_quant("group_size", group.map_or(json!(-1), |g| json!(g)));
        self.set_quant("desc_act", json!(act_order));
        self.set_quant("sym", json!(sym));
        self
    }

    /// The weights of module `name` by the formula of version 1, [k, n] f32: written apart from the library's own.
    pub fn dequantise(&self, name: &str) -> Dequantised {
        let part = |part: &str| &self.tensors[&format!("{name}.{part}")];
        let (qweight, qzeros) = (words(&part("qweight").bytes), words(&part("qzeros").bytes));
        let (scales, g_idx) = (halves(&part("scales").bytes), words(&part("g_idx").bytes));
        let (k, n) = (part("qweight").shape[0] * 8, part("qweight").shape[1]);
        let mut weights = vec![0f32; k * n];
        for i in 0..k {
            let g = g_idx[i] as usize;
            for column in 0..n {
                let code = (qweight[i / 8 * n + column] >> (4 * (i % 8))) & 15;
                let zero = (((qzeros[g * (n / 8) + column / 8] >> (4 * (column % 8))) & 15) + 1) & 15;
                let scale = f16_to_f32(scales[g * n + column]);
                let weight = scale * (code as f32 - zero as f32);
                weights[i * n + column] = f16_to_f32(f32_to_f16(weight));
            }
        }
        Dequantised { k_n: [k, n], weights }
    }
}

/// [rows, cols] words of eight nibbles each.
fn pack(rows: usize, cols: usize, nibble: impl Fn(usize, usize, usize) -> u32) -> Vec<u8> {
    let word = |row, col| (0..8).fold(0u32, |w, i| w | nibble(row, col, i) << (4 * i));
    (0..rows)
        .flat_map(|row| (0..cols).map(move |col| (row, col)))
        .flat_map(|(r, c)| word(r, c).to_le_bytes())
        .collect()
}

/// Fisher-Yates with splitmix64.
fn shuffle(items: &mut [usize], mut state: u64) {
    for last in (1..items.len()).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        items.swap(last, ((z ^ (z >> 31)) % (last as u64 + 1)) as usize);
    }
}
