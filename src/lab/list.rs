//! Every op of Falcon-7B's forward pass: shapes, bytes, operations, floor. Needs no GPU.

use super::{CONTEXT, FFN, HEADS, HIDDEN, LAYERS, THETA, VOCAB};
use crate::config::ModelConfig;
use crate::measure::breakdown;
use crate::measure::machine::Ceilings;
use crate::measure::work::Work;

/// Falcon-7B's shape.
fn falcon() -> ModelConfig {
    ModelConfig {
        hidden_size: HIDDEN,
        num_layers: LAYERS,
        num_heads: HEADS,
        ffn_size: FFN,
        vocab_size: VOCAB,
        norm_epsilon: 1e-5,
        rope_theta: THETA,
        max_positions: CONTEXT,
        eos_ids: vec![11],
    }
}

/// Tokens in front of a decode step.
const BEFORE: usize = 128;
/// Tokens of a prompt.
const PROMPT: usize = 512;

/// The table, for a machine with these ceilings.
#[must_use]
pub fn table(ceilings: Ceilings) -> String {
    let config = falcon();
    let up = format!("[qkv ; up] {} x {HIDDEN}", HIDDEN + 128 + FFN);
    let down = format!("[down | dense] {HIDDEN} x {}", FFN + HIDDEN);
    // The table as `table_pack` makes it: 12 bits a value.
    let head_bytes = (VOCAB * HIDDEN) as f64 * 1.5;
    let before = |m: usize| if m == 1 { BEFORE } else { 0 };
    let other = |op: &str, m: usize| breakdown::other_work(&config, op, m, before(m), head_bytes);
    // A prompt's products leave no slices to the norm.
    let up_product = |m: usize| breakdown::up_product(&config, m);
    let down_product = |m: usize| breakdown::down_product(&config, m, m == 1);
    let norm = |m: usize| breakdown::layernorm(&config, m, m == 1);
    let (one, many) = (1, PROMPT);
    let rows: Vec<(&str, &str, String, usize, Work)> = vec![
        ("step", "decode_step", format!("all of it, 1 token at {BEFORE}"), 1, other("decode_step", one)),
        ("step", "embed", format!("1 of {VOCAB} x {HIDDEN}"), 1, other("embed", one)),
        ("step", "layernorm", format!("1 x {HIDDEN}, 5 slices"), LAYERS + 1, norm(one)),
        ("step", "gptq_gemv", up.clone(), LAYERS, up_product(one)),
        (
            "step",
            "attn_decode",
            format!("{HEADS} heads, 1 token at {BEFORE}"),
            LAYERS,
            other("attn_decode", one),
        ),
        ("step", "gptq_gemv", down.clone(), LAYERS, down_product(one)),
        ("step", "head", format!("{VOCAB} x {HIDDEN}"), 1, other("head", one)),
        ("step", "sample", format!("1 x {VOCAB}"), 1, other("sample", one)),
        ("prompt", "embed", format!("{PROMPT} of {VOCAB} x {HIDDEN}"), 1, other("embed", many)),
        ("prompt", "layernorm", format!("{PROMPT} x {HIDDEN}"), LAYERS + 1, norm(many)),
        ("prompt", "gptq_gemm", up, LAYERS, up_product(many)),
        ("prompt", "rope", format!("{HEADS} heads, {PROMPT} tokens"), LAYERS, other("rope", many)),
        (
            "prompt",
            "attn_prefill",
            format!("{HEADS} heads, {PROMPT} tokens"),
            LAYERS,
            other("attn_prefill", many),
        ),
        ("prompt", "gptq_gemm", down, LAYERS, down_product(many)),
        ("prompt", "head", format!("{VOCAB} x {HIDDEN}"), 1, other("head", one)),
    ];
    let mut text = format!(
        "{:<7} {:<13} {:<34} {:>6} {:>11} {:>12} {:>10} {:>11}\n",
        "pass", "op", "shape", "times", "MB each", "MFLOP each", "floor us", "floor, all"
    );
    for (pass, op, shape, times, work) in rows {
        let floor = work.floor_seconds(ceilings.bytes_per_second, ceilings.flop_per_second) * 1e6;
        text.push_str(&format!(
            "{pass:<7} {op:<13} {shape:<34} {times:>6} {:>11.3} {:>12.1} {floor:>10.2} {:>11.1}\n",
            work.bytes / 1e6,
            work.flop / 1e6,
            floor * times as f64
        ));
    }
    text
}
