//! Looking at what a checkpoint holds.

use std::path::{Path, PathBuf};

use peregrine::checkpoint::{Checkpoint, GptqTensor};
use peregrine::layout::{f16_to_f32, f32_to_f16};

use crate::variants::{TempDir, words};

/// The whole matrix by the formula of `GptqTensor`, [k, n] f32.
pub(crate) fn dequantise(t: &GptqTensor<'_>) -> Vec<f32> {
    let (qweight, qzeros) = (words(t.qweight), words(t.qzeros));
    let g_idx = t.g_idx.map(words);
    let mut weights = Vec::with_capacity(t.k * t.n);
    for k in 0..t.k {
        let g = g_idx.as_ref().map_or(k / t.group_size, |g_idx| g_idx[k] as usize);
        for n in 0..t.n {
            let code = (qweight[k / 8 * t.n + n] >> (4 * (k % 8))) & 15;
            let stored = (qzeros[g * (t.n / 8) + n / 8] >> (4 * (n % 8))) & 15;
            let zero = t.constant_zero.map_or((stored + u32::from(t.zero_offset)) & 15, u32::from);
            weights.push(f16_to_f32(f32_to_f16(t.scales.get(g * t.n + n) * (code as f32 - zero as f32))));
        }
    }
    weights
}

/// Every number of a checkpoint: the tables in half precision, norms and dequantised matrices in single.
pub(crate) fn numbers(checkpoint: &Checkpoint) -> (Vec<u16>, Vec<Vec<f32>>) {
    let mut all = Vec::new();
    for i in 0..checkpoint.config().num_layers {
        let layer = checkpoint.layer(i);
        all.extend([layer.input_layernorm.weight.to_f32(), layer.input_layernorm.bias.to_f32()]);
        for matrix in [layer.query_key_value, layer.dense, layer.dense_h_to_4h, layer.dense_4h_to_h] {
            all.push(dequantise(&matrix));
        }
    }
    all.extend([checkpoint.final_norm().weight.to_f32(), checkpoint.final_norm().bias.to_f32()]);
    (checkpoint.embedding().to_f16_bits(), all)
}

pub(crate) fn open(dir: &TempDir) -> Checkpoint {
    Checkpoint::open(dir.str()).unwrap()
}

pub(crate) fn mentions(checkpoint: &Checkpoint, what: &str) -> bool {
    checkpoint.warnings().iter().any(|w| w.contains(what))
}

/// A folder of files that are not in the repository.
pub(crate) fn shared(variable: &str, folder: &str) -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(folder);
    std::env::var_os(variable).map_or(beside, PathBuf::from)
}
