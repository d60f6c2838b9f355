//! Opens every kind of checkpoint that this engine promises to read, and looks at what the views hold.

use peregrine::checkpoint::{Checkpoint, FloatType};

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-falcon-tales");
const ASYMMETRIC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/d");

#[test]
fn the_tiny_model_opens() {
    let checkpoint = Checkpoint::open(TINY).unwrap();
    let config = checkpoint.config();
    assert_eq!((config.hidden_size, config.num_layers, config.num_heads), (320, 8, 5));
    assert_eq!((config.ffn_size, config.vocab_size, config.max_positions), (1280, 4096, 2048));
    assert_eq!((config.norm_epsilon, config.rope_theta), (1e-5, 10000.0));
    assert_eq!(config.eos_ids, [11]);
    let quant = checkpoint.quant();
    assert_eq!((quant.bits, quant.group_size, quant.zero_offset), (4, Some(64), 1));
    assert!(quant.sym && !quant.desc_act);
    assert_eq!(checkpoint.warnings(), [""; 0]);
    assert!(checkpoint.lm_head().is_none() && !checkpoint.is_instruct());
    let down = checkpoint.layer(7).dense_4h_to_h;
    assert_eq!((down.k, down.n, down.group_size, down.groups()), (1280, 320, 64, 20));
    assert_eq!((down.constant_zero, down.g_idx, down.bias.is_none()), (Some(8), None, true));
    assert_eq!(down.qweight.len(), 160 * 320 * 4);
    assert_eq!((down.scales.dtype, down.scales.shape), (FloatType::F16, [20, 320]));
    assert!(checkpoint.tokenizer_json().unwrap().starts_with(b"{"));
    assert_eq!(checkpoint.tensors().len(), 180);
}

#[test]
fn the_asymmetric_model_opens() {
    let checkpoint = Checkpoint::open(ASYMMETRIC).unwrap();
    println!("{:?} {:?}", checkpoint.quant(), checkpoint.warnings());
    assert!(!checkpoint.quant().sym);
    assert_eq!(checkpoint.quant().zero_offset, 1);
    assert_eq!(checkpoint.layer(0).dense.constant_zero, None);
}
