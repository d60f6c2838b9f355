//! Which models `decode_step` is written for. Others are decoded by one kernel an op, and give the same answers slower.

use crate::config::ModelConfig;
use crate::gpu::ops::{DecodeShape, GEMV_TOKENS, STEP_LAYERS};
use crate::layout::{HEAD_DIM, UNIT_INPUTS, UNIT_ROWS};
use crate::weights::{Layer, Weights};

/// Most units of a row: 12 warps of 6.
const MOST_UNITS: usize = 72;
/// Most contributions to a value of the residual stream: their count is 8 bits.
const MOST_CONTRIBUTIONS: usize = 255;

/// What the choice rests on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) ffn: usize,
    pub(super) heads: usize,
    pub(super) vocab: usize,
    /// A layer gathers its activations.
    pub(super) act_order: bool,
    /// A quantised matrix has a bias.
    pub(super) biases: bool,
    /// The most of any matrix.
    pub(super) scales_per_row: usize,
    /// Some matrices store zero points and some do not.
    pub(super) mixed_zeros: bool,
    /// The tensor cores give sums that f32 can hold exactly, as `unpack_check` says.
    pub(super) exact_sums: bool,
    /// What `decode_step_blocks` said.
    pub(super) blocks: usize,
}

impl Facts {
    pub(super) fn of(config: &ModelConfig, weights: &Weights, exact_sums: bool, blocks: usize) -> Facts {
        let any = |what: fn(&Layer) -> bool| weights.layers.iter().any(what);
        let zeros = |has: bool| weights.matrices().any(|w| w.has_zeros == has);
        Facts {
            layers: config.num_layers,
            hidden: config.hidden_size,
            ffn: config.ffn_size,
            heads: config.num_heads,
            vocab: config.vocab_size,
            act_order: weights.act_order(),
            biases: any(|l| l.qkv_up_bias.is_some() || l.down_dense_bias.is_some()),
            scales_per_row: weights.matrices().map(|w| w.scales_per_row).max().unwrap_or(1),
            mixed_zeros: zeros(true) && zeros(false),
            exact_sums,
            blocks,
        }
    }
}

/// Whether `decode_step` takes a model on a GPU; else the reason why not.
pub(super) fn persistent_fits(facts: &Facts) -> Result<(), &'static str> {
    let &Facts { layers, hidden, ffn, heads, vocab, blocks, .. } = facts;
    let slices = ffn.checked_div(hidden).map_or(0, |parts| parts + 1);
    let tiles = vocab / UNIT_ROWS;
    let reasons = [
        (blocks == 0, "this GPU or this build has no decode_step"),
        (!facts.exact_sums, "this GPU's tensor cores do not give exact sums"),
        (facts.act_order, "the checkpoint is in act-order"),
        (facts.biases, "quantised matrices have biases"),
        (facts.scales_per_row != 1, "groups are smaller than 64 inputs"),
        (facts.mixed_zeros, "some matrices store zero points and some do not"),
        (hidden == 0 || hidden > MOST_UNITS * UNIT_INPUTS, "hidden_size is beyond 4608"),
        (ffn == 0 || !ffn.is_multiple_of(hidden), "the MLP's width is no multiple of hidden_size"),
        (heads * HEAD_DIM != hidden, "heads of 64 values do not make up hidden_size"),
        (layers == 0 || layers > STEP_LAYERS, "there are more than 48 layers"),
        (1 + layers * slices > MOST_CONTRIBUTIONS, "there are too many layers for so wide an MLP"),
        (blocks > tiles, "the vocabulary is smaller than the GPU"),
        (blocks.min(hidden / UNIT_ROWS) < GEMV_TOKENS, "there are fewer blocks than tokens"),
    ];
    reasons.into_iter().find(|(holds, _)| *holds).map_or(Ok(()), |(_, reason)| Err(reason))
}

/// The shape of what `decode_step` works in.
pub(super) fn shape(
    config: &ModelConfig,
    weights: &Weights,
    blocks: usize,
    slots: usize,
    max_context: usize,
) -> DecodeShape {
    DecodeShape {
        hidden: config.hidden_size,
        ffn: config.ffn_size,
        heads: config.num_heads,
        vocab: config.vocab_size,
        slots,
        max_context,
        has_zeros: weights.has_zeros(),
        blocks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Falcon-7B on an H200.
    const FALCON: Facts = Facts {
        layers: 32,
        hidden: 4544,
        ffn: 18176,
        heads: 71,
        vocab: 65024,
        act_order: false,
        biases: false,
        scales_per_row: 1,
        mixed_zeros: false,
        exact_sums: true,
        blocks: 132,
    };

    #[test]
    fn falcon_fits_and_each_reason_is_given() {
        assert_eq!(persistent_fits(&FALCON), Ok(()));
        let small = Facts { layers: 8, hidden: 320, ffn: 1280, heads: 5, vocab: 4096, ..FALCON };
        assert_eq!(persistent_fits(&small), Ok(()));
        let cases = [
            (Facts { blocks: 0, ..FALCON }, "no decode_step"),
            (Facts { exact_sums: false, ..FALCON }, "exact sums"),
            (Facts { act_order: true, ..FALCON }, "act-order"),
            (Facts { biases: true, ..FALCON }, "biases"),
            (Facts { scales_per_row: 2, ..FALCON }, "smaller than 64"),
            (Facts { mixed_zeros: true, ..FALCON }, "zero points"),
            (Facts { hidden: 4672, ffn: 18688, heads: 73, ..FALCON }, "4608"),
            (Facts { ffn: 18175, ..FALCON }, "multiple"),
            (Facts { heads: 70, ..FALCON }, "64 values"),
            (Facts { layers: 49, ffn: 4544, ..FALCON }, "48 layers"),
            (Facts { layers: 0, ..FALCON }, "48 layers"),
            (Facts { layers: 48, ffn: 5 * 4544, ..FALCON }, "wide an MLP"),
            (Facts { vocab: 2096, ..FALCON }, "vocabulary"),
            (Facts { hidden: 64, ffn: 256, heads: 1, ..FALCON }, "fewer blocks"),
            (Facts { blocks: 7, ..FALCON }, "fewer blocks"),
            (Facts { hidden: 0, ffn: 0, heads: 0, ..FALCON }, "4608"),
        ];
        for (facts, wanted) in cases {
            let reason = persistent_fits(&facts).unwrap_err();
            assert!(reason.contains(wanted), "{reason}, wanted {wanted}");
        }
    }

    #[test]
    fn contributions_are_counted_in_eight_bits() {
        // 1 + layers * 5, and 1 + layers * 6 for an MLP of five times the width.
        assert_eq!(persistent_fits(&Facts { layers: 48, ..FALCON }), Ok(()));
        assert_eq!(persistent_fits(&Facts { layers: 42, ffn: 5 * 4544, ..FALCON }), Ok(()));
        assert!(persistent_fits(&Facts { layers: 43, ffn: 5 * 4544, ..FALCON }).is_err());
    }
}
