//! Tensors that are missing, of the wrong kind, or hold impossible numbers.

use serde_json::json;

use crate::kit::{DOWN, FILE, GOOD, QKV, refused, spoilt};
use crate::variants::{Model, RawTensor};

#[test]
fn tensors_that_are_missing() {
    for name in GOOD.tensors.keys().filter(|name| !name.ends_with(".g_idx")) {
        let of_linear = name.ends_with(".bias") && !name.contains("norm") && !name.contains("ln_f");
        if of_linear || name == "lm_head.weight" {
            continue;
        }
        let parts = [FILE, &format!("tensor {name}"), "is missing"];
        spoilt(|model| drop(model.tensors.remove(name)), &parts);
    }
    let parts = |name: &'static str| [FILE, name, "is missing"];
    spoilt(
        |model| {
            model.set("bias", json!(true));
            model.tensors.remove(&format!("{DOWN}.bias"));
        },
        &parts("dense_4h_to_h.bias"),
    );
    spoilt(
        |model| {
            model.set("tie_word_embeddings", json!(false));
            model.tensors.remove("lm_head.weight");
        },
        &parts("lm_head.weight"),
    );
    spoilt(
        |model| {
            model.set_quant("desc_act", json!(true));
            model.tensors.remove(&format!("{DOWN}.g_idx"));
        },
        &parts("dense_4h_to_h.g_idx"),
    );
    spoilt(
        |model| {
            let weight = model.tensors.remove(&format!("{QKV}.qweight")).unwrap();
            model.tensors.insert(format!("{QKV}.weight"), weight);
        },
        &[FILE, "query_key_value.qweight", "not a GPTQ checkpoint"],
    );
}

#[test]
fn tensors_of_the_wrong_kind() {
    for (name, dtype, wanted) in [
        (format!("{QKV}.qweight"), "F32", "wanted I32"),
        (format!("{QKV}.qzeros"), "U32", "wanted I32"),
        (format!("{DOWN}.g_idx"), "F32", "wanted I32"),
        (format!("{DOWN}.scales"), "I16", "wanted F16, BF16 or F32"),
        ("transformer.ln_f.weight".to_owned(), "U16", "wanted F16, BF16 or F32"),
        ("transformer.word_embeddings.weight".to_owned(), "I16", "wanted F16, BF16 or F32"),
        ("lm_head.weight".to_owned(), "I16", "wanted F16, BF16 or F32"),
    ] {
        spoilt(|model| model.tensor(&name).dtype = dtype, &[FILE, &name, dtype, wanted]);
    }
    for (name, shape, wanted) in [
        (format!("{QKV}.qweight"), vec![448, 40], "wanted [40, 448]"),
        (format!("{QKV}.qzeros"), vec![56, 5], "wanted [5, 56]"),
        (format!("{QKV}.scales"), vec![5 * 448], "wanted [5, 448]"),
        (format!("{DOWN}.g_idx"), vec![2, 640], "wanted [1280]"),
        (format!("{DOWN}.bias"), vec![320, 1], "wanted [320]"),
        ("transformer.ln_f.bias".to_owned(), vec![10, 32], "wanted [320]"),
        ("transformer.word_embeddings.weight".to_owned(), vec![320, 256], "wanted [256, 320]"),
        ("lm_head.weight".to_owned(), vec![1, 256, 320], "wanted [256, 320]"),
    ] {
        spoilt(|model| model.tensor(&name).shape = shape.clone(), &[FILE, &name, "shape is", wanted]);
    }
    // 8-bit codes under a 4-bit label: four inputs a word.
    spoilt(
        |model| {
            let t = model.tensor(&format!("{QKV}.qweight"));
            t.bytes = [&t.bytes[..], &t.bytes[..]].concat();
            t.shape[0] *= 2;
        },
        &[FILE, "qweight", "shape is [80, 448]", "wanted [40, 448]"],
    );
    spoilt(
        |model| {
            let empty = RawTensor { dtype: "F16", shape: vec![0, 448], bytes: Vec::new() };
            model.tensors.insert(format!("{QKV}.scales"), empty);
        },
        &[FILE, "scales", "shape is [0, 448]"],
    );
}

#[test]
fn numbers_that_are_none() {
    for (name, at, bits, parts) in [
        (format!("{DOWN}.scales"), 321, 0x7e00u16, ["value [1, 1] is NaN", "finite"]),
        (format!("{DOWN}.scales"), 0, 0xfc00, ["value [0, 0] is -inf", "finite"]),
        (format!("{DOWN}.bias"), 7, 0x7c00, ["value [7] is inf", "finite"]),
        ("transformer.h.0.input_layernorm.weight".to_owned(), 3, 0x7c01, ["value [3] is NaN", "finite"]),
        ("transformer.ln_f.bias".to_owned(), 319, 0x7c00, ["value [319] is inf", "finite"]),
        (
            "transformer.word_embeddings.weight".to_owned(),
            81_919,
            0x7e00,
            ["value [255, 319] is NaN", "finite"],
        ),
        ("lm_head.weight".to_owned(), 320, 0xfe00, ["value [1, 0] is NaN", "finite"]),
    ] {
        spoilt(
            |model| model.tensor(&name).bytes[2 * at..2 * at + 2].copy_from_slice(&bits.to_le_bytes()),
            &[FILE, &name, parts[0], parts[1]],
        );
    }
    // What single precision holds and half does not.
    let mut model = GOOD.clone().tables_f32();
    let table = model.tensor("transformer.word_embeddings.weight");
    table.bytes[4..8].copy_from_slice(&65520f32.to_le_bytes());
    refused(model.write().str(), &[FILE, "word_embeddings", "value [0, 1] is 65520", "65504"]);
}

#[test]
fn group_indices_out_of_range() {
    let set = |model: &mut Model, at: usize, value: i32| {
        model.tensor(&format!("{DOWN}.g_idx")).bytes[4 * at..4 * at + 4]
            .copy_from_slice(&value.to_le_bytes());
    };
    for value in [20, -1, i32::MAX, i32::MIN] {
        let found = format!("value [9] is {value}, wanted 0 to 19");
        spoilt(|model| set(model, 9, value), &[FILE, "dense_4h_to_h.g_idx", &found]);
    }
    spoilt(|model| set(model, 9, 5), &["g_idx", "value [9] is 5, wanted 0", "desc_act is false"]);
    spoilt(
        |model| {
            model.set_quant("desc_act", json!(true));
            set(model, 9, 5);
        },
        &["g_idx", "group 0 has 63 inputs, wanted 64"],
    );
}
