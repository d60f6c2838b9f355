//! The forms the tensors come in.

use std::fs;
use std::path::Path;

use peregrine::checkpoint::{Checkpoint, FloatType};
use serde_json::json;

use crate::kit::{dequantise, mentions, numbers, open, shared};
use crate::variants::{ASYMMETRIC, Model, RawTensor, TINY, halves};

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
fn the_weights_are_those_of_the_files() {
    let model = Model::tiny();
    let checkpoint = Checkpoint::open(TINY).unwrap();
    let matrix = checkpoint.layer(3).dense_h_to_4h;
    assert_eq!(dequantise(&matrix), model.dequantise(&matrix.name).weights);
    let embedding = &model.tensors["transformer.word_embeddings.weight"];
    assert_eq!(checkpoint.embedding().to_f16_bits(), halves(&embedding.bytes));
    assert_eq!(
        checkpoint.embedding().rows(17, 2).to_f32(),
        checkpoint.embedding().to_f32()[17 * 320..19 * 320]
    );
}

#[test]
fn the_asymmetric_model_opens() {
    let checkpoint = Checkpoint::open(ASYMMETRIC).unwrap();
    assert!(!checkpoint.quant().sym);
    assert_eq!(checkpoint.quant().zero_offset, 1);
    let matrix = checkpoint.layer(0).dense;
    assert_eq!(matrix.constant_zero, None);
    assert_eq!(dequantise(&matrix), Model::read(Path::new(ASYMMETRIC)).dequantise(&matrix.name).weights);
}

/// Changes of form only: the same numbers must come out.
#[test]
fn variants_of_form_hold_the_same_numbers() {
    let original = numbers(&Checkpoint::open(TINY).unwrap());
    let tiny = Model::tiny();
    for (what, dir) in [
        ("legacy dialect, F32 tables", tiny.clone().legacy().tables_f32().write()),
        ("no bias", tiny.clone().no_bias().write()),
        ("no lm_head", tiny.clone().no_lm_head().write()),
        ("version 2", tiny.clone().v2_zeros(true).write()),
        ("version 2, labelled 1", tiny.clone().v2_zeros(false).write()),
        ("group 32", tiny.clone().group_32().write()),
        ("3 shards", tiny.clone().write_shards(3)),
    ] {
        let checkpoint = open(&dir);
        assert!(numbers(&checkpoint) == original, "{what}: other numbers");
        assert!(checkpoint.lm_head().is_none() && checkpoint.quant().sym, "{what}");
        assert!(
            checkpoint.layer(0).dense.bias.is_none() && checkpoint.layer(0).dense.g_idx.is_none(),
            "{what}"
        );
    }
    let legacy = shared("PEREGRINE_FIXTURES", "fixtures").join("a-legacy");
    if legacy.is_dir() {
        let checkpoint = Checkpoint::open(legacy.to_str().unwrap()).unwrap();
        assert!(numbers(&checkpoint) == original, "a-legacy: other numbers");
        assert!(mentions(&checkpoint, "bos 1 and eos 2") && checkpoint.config().eos_ids == [11]);
        assert_eq!(checkpoint.embedding().dtype, FloatType::F32);
    } else {
        println!(
            "SKIPPED: AutoGPTQ 0.2's own file, {} is not there; set PEREGRINE_FIXTURES to the folder above it",
            legacy.display()
        );
    }
}

#[test]
fn bf16_tables_are_read() {
    let checkpoint = open(&Model::tiny().cut(1, 256).tables_bf16().write());
    let original = open(&Model::tiny().cut(1, 256).write());
    assert_eq!(checkpoint.embedding().dtype, FloatType::BF16);
    let pairs = checkpoint.embedding().to_f32().into_iter().zip(original.embedding().to_f32());
    // bfloat16 stores 7 bits after the leading one: half a unit in the last place is 2^-8.
    assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() <= b.abs() / 256.0));
}

#[test]
fn groups_and_act_order_are_read() {
    for (group, act_order, sym) in [
        (Some(128), false, true),
        (None, false, true),
        (Some(64), true, true),
        (Some(32), true, false),
        (Some(128), true, false),
        (None, true, false),
    ] {
        let model = Model::tiny().cut(1, 256).requantise(group, act_order, sym);
        let checkpoint = open(&model.write());
        let what = format!("{group:?} {act_order} {sym}");
        assert_eq!(checkpoint.quant().group_size, group, "{what}");
        // With one group over all inputs there is nothing to order.
        assert_eq!(checkpoint.quant().desc_act, act_order && group.is_some(), "{what}");
        assert_eq!((checkpoint.quant().sym, checkpoint.quant().zero_offset), (sym, 1), "{what}");
        let layer = checkpoint.layer(0);
        for matrix in [&layer.query_key_value, &layer.dense_4h_to_h] {
            assert_eq!(matrix.group_size, group.unwrap_or(matrix.k), "{what}");
            assert_eq!(matrix.g_idx.is_some(), act_order && group.is_some(), "{what}");
            assert!(dequantise(matrix) == model.dequantise(&matrix.name).weights, "{what}");
        }
    }
}

#[test]
fn a_ragged_last_group_is_read() {
    // 320 inputs in groups of 128: the last one has 64.
    let checkpoint = open(&Model::tiny().cut(1, 256).requantise(Some(128), false, true).write());
    assert_eq!(checkpoint.layer(0).dense.groups(), 3);
}

#[test]
fn a_bias_that_says_something_is_kept() {
    let mut model = Model::tiny().cut(1, 256);
    model.tensor("transformer.h.0.mlp.dense_4h_to_h.bias").bytes[6..8]
        .copy_from_slice(&0x3c00u16.to_le_bytes());
    let checkpoint = open(&model.write());
    assert_eq!(checkpoint.layer(0).dense_4h_to_h.bias.unwrap().get(3), 1.0);
    assert!(checkpoint.layer(0).dense.bias.is_none());
}

#[test]
fn a_head_that_differs_is_kept_with_a_warning_unless_stated() {
    let mut model = Model::tiny().cut(1, 256);
    model.tensor("lm_head.weight").bytes[0] ^= 1;
    let checkpoint = open(&model.write());
    assert_eq!(checkpoint.lm_head().unwrap().shape, [256, 320]);
    assert!(mentions(&checkpoint, "lm_head.weight differs"));
    model.set("tie_word_embeddings", json!(false));
    assert_eq!(open(&model.write()).warnings(), [""; 0]);
}

#[test]
fn a_head_of_another_dtype_with_the_same_numbers_is_dropped() {
    let mut model = Model::tiny().cut(1, 256);
    let wide = model.clone().tables_f32().tensor("lm_head.weight").clone();
    *model.tensor("lm_head.weight") = wide;
    assert!(open(&model.write()).lm_head().is_none());
}

#[test]
fn extra_tensors_are_only_worth_a_warning() {
    let mut model = Model::tiny().cut(1, 256);
    let bytes = vec![0; 8];
    let extra = RawTensor { dtype: "F32", shape: vec![2], bytes };
    model.tensors.insert("transformer.h.0.rotary_emb.inv_freq".to_owned(), extra);
    assert!(mentions(
        &open(&model.write()),
        "1 tensors are not used, the first is transformer.h.0.rotary_emb"
    ));
}

#[test]
fn a_model_in_memory_opens() {
    fn leak(file: &str) -> &'static [u8] {
        fs::read(Path::new(TINY).join(file)).unwrap().leak()
    }
    let files =
        ["config.json", "quantize_config.json", "model.safetensors", "tokenizer.json"].map(|f| (f, leak(f)));
    let checkpoint = Checkpoint::from_static("tiny-falcon-tales", &files).unwrap();
    assert!(numbers(&checkpoint) == numbers(&Checkpoint::open(TINY).unwrap()));
    assert!(checkpoint.tokenizer_json().is_ok());
    let message = Checkpoint::from_static("tiny", &files[..2]).unwrap_err().to_string();
    assert!(message.starts_with("tiny: holds no .safetensors file"), "{message}");
}

#[test]
fn a_checkpoint_may_be_shared_by_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Checkpoint>();
}
