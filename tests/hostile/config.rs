//! What a checkpoint says of itself: not JSON, not supported, or not true.

use serde_json::{Value, json};

use crate::kit::{FILE, GOOD, refused, spoilt, spoilt_file};
use crate::variants::RawTensor;

#[test]
fn config_that_is_not_json() {
    spoilt_file("config.json", b"", &["config.json", "is not JSON"]);
    spoilt_file("config.json", b"{\"hidden_size\": 320,", &["config.json", "is not JSON"]);
    spoilt_file("config.json", b"\xff\xfe{}", &["config.json", "is not JSON"]);
    spoilt_file("config.json", b"[1, 2]", &["config.json", "not an object"]);
    spoilt_file("config.json", b"{\"rope_theta\": 1e999}", &["config.json", "is not JSON", "out of range"]);
    spoilt_file("config.json", "[".repeat(100_000).as_bytes(), &["config.json", "is not JSON", "recursion"]);
    spoilt_file("config.json", " ".repeat(2 << 20).as_bytes(), &["config.json", "2097152 bytes", "at most"]);
    spoilt_file("quantize_config.json", b"{", &["quantize_config.json", "is not JSON"]);
    spoilt_file("generation_config.json", b"nope", &["generation_config.json", "is not JSON"]);
}

#[test]
fn architectures_that_are_not_supported() {
    for (key, value, parts) in [
        ("model_type", json!("llama"), ["model_type is \"llama\"", "wanted \"falcon\""]),
        ("model_type", json!(7), ["model_type is 7", "wanted a string"]),
        ("alibi", json!(true), ["alibi", "ALiBi"]),
        ("new_decoder_architecture", json!(true), ["new_decoder_architecture", "grouped"]),
        ("multi_query", json!(false), ["multi_query is false", "not supported"]),
        ("parallel_attn", json!(false), ["parallel_attn is false", "not supported"]),
        ("num_ln_in_parallel_attn", json!(2), ["num_ln_in_parallel_attn is 2", "not supported"]),
        ("activation", json!("relu"), ["activation is \"relu\"", "not supported"]),
        ("rope_scaling", json!({ "type": "linear", "factor": 2.0 }), ["rope_scaling", "scaling of rotary"]),
        ("rope_parameters", json!({ "rope_type": "yarn" }), ["rope_parameters", "scaling of rotary"]),
        ("rope_scaling", json!("linear"), ["rope_scaling is \"linear\"", "null or an object"]),
    ] {
        spoilt(|model| model.set(key, value), &["config.json", parts[0], parts[1]]);
    }
    // Falcon-40B's first dialect says it by its name or its key/value heads, where the later flag is absent.
    for (key, value) in [("model_type", json!("RefinedWeb")), ("n_head_kv", json!(8))] {
        spoilt(
            |model| {
                model.set("new_decoder_architecture", Value::Null);
                model.set(key, value);
            },
            &["config.json", key, "Falcon-40B's grouped key/value heads"],
        );
    }
}

#[test]
fn sizes_that_make_no_sense() {
    for (key, value, parts) in [
        ("hidden_size", json!(384), ["hidden_size is 384 with 5 heads", "64 per head"]),
        ("hidden_size", json!(-320), ["hidden_size is -320", "whole number"]),
        ("hidden_size", json!(0), ["hidden_size is 0", "whole number"]),
        ("hidden_size", json!(320.5), ["hidden_size is 320.5", "whole number"]),
        ("hidden_size", json!("320"), ["hidden_size is \"320\"", "whole number"]),
        ("hidden_size", json!(u64::MAX), ["hidden_size is 18446744073709551615", "1048576"]),
        ("hidden_size", Value::Null, ["hidden_size", "is missing"]),
        ("num_attention_heads", json!(4), ["with 4 heads", "64 per head"]),
        ("num_hidden_layers", json!(2000), ["num_hidden_layers is 2000", "at most 1024"]),
        ("num_hidden_layers", json!(2), ["transformer.h.1.input_layernorm.weight", "is missing"]),
        ("ffn_hidden_size", json!(1000), ["ffn_hidden_size is 1000", "multiple of 64"]),
        ("vocab_size", json!(250), ["vocab_size is 250", "multiple of 16"]),
        ("vocab_size", json!(512), ["transformer.word_embeddings.weight", "wanted [512, 320]"]),
        ("layer_norm_epsilon", json!(0), ["layer_norm_epsilon is 0", "positive"]),
        ("layer_norm_epsilon", json!(2), ["layer_norm_epsilon is 2", "less than 1"]),
        ("rope_theta", json!(1e300), ["rope_theta is 1e+300", "positive"]),
        ("max_position_embeddings", json!(1u64 << 40), ["max_position_embeddings", "1048576"]),
        ("eos_token_id", json!(256), ["eos_token_id is 256", "below the vocabulary's 256"]),
        ("eos_token_id", json!([11, "x"]), ["eos_token_id is \"x\"", "below the vocabulary's"]),
        ("bias", json!("no"), ["bias is \"no\"", "true or false"]),
    ] {
        spoilt(|model| model.set(key, value), &[parts[0], parts[1]]);
    }
}

#[test]
fn quantisation_that_is_not_supported() {
    for (key, value, parts) in [
        ("bits", json!(3), ["bits is 3", "only 4 bits"]),
        ("bits", json!(8), ["bits is 8", "only 4 bits"]),
        ("bits", json!("4"), ["bits is \"4\"", "only 4 bits"]),
        ("group_size", json!(16), ["group_size is 16", "only 32"]),
        ("group_size", json!(0), ["group_size is 0", "only 32"]),
        ("group_size", json!(-2), ["group_size is -2", "only 32"]),
        ("group_size", json!(1e30), ["group_size is 1e+30", "only 32"]),
        ("quant_method", json!("awq"), ["quant_method is \"awq\"", "other than GPTQ"]),
        ("is_marlin_format", json!(true), ["is_marlin_format", "Marlin"]),
        ("awq_gemm_checkpoint", json!(true), ["awq_gemm_checkpoint", "AWQ"]),
        ("checkpoint_format", json!("marlin"), ["checkpoint_format is \"marlin\"", "other than gptq"]),
        ("lm_head", json!(true), ["lm_head is true", "quantised lm_head"]),
        ("dynamic", json!({ "+:.*": { "bits": 8 } }), ["dynamic", "some modules"]),
        ("pack_dtype", json!("int64"), ["pack_dtype is \"int64\"", "int32"]),
        ("sym", json!(1), ["sym is 1", "true or false"]),
        ("model_file_base_name", json!("../../etc/model"), ["model_file_base_name", "plain file name"]),
    ] {
        spoilt(|model| model.set_quant(key, value), &["quantize_config.json", parts[0], parts[1]]);
    }
}

#[test]
fn group_sizes_that_do_not_match_the_tensors() {
    for (size, part) in [(json!(128), "wanted 3"), (json!(32), "wanted 10"), (json!(-1), "wanted 1:")] {
        let parts = [FILE, "query_key_value.scales", "has 5 groups for 320 inputs", part, "64 would"];
        spoilt(|model| model.set_quant("group_size", size), &parts);
    }
}

#[test]
fn scalars_that_are_none() {
    let with = |name: &str, dtype: &'static str, bytes: Vec<u8>| {
        let mut model = GOOD.clone();
        model.quantize = Value::Null;
        model.config["quantization_config"] = Value::Null;
        model.tensors.insert(name.to_owned(), RawTensor { dtype, shape: vec![bytes.len() / 4], bytes });
        model.write()
    };
    let dir = with("gptq_bits", "I32", 8i32.to_le_bytes().to_vec());
    refused(dir.str(), &[FILE, "gptq_bits is 8", "only 4 bits"]);
    let dir = with("gptq_groupsize", "I32", 7i32.to_le_bytes().to_vec());
    refused(dir.str(), &[FILE, "gptq_groupsize is 7", "only 32"]);
    let dir = with("gptq_groupsize", "I32", vec![0; 8]);
    refused(dir.str(), &[FILE, "tensor gptq_groupsize", "wanted one whole number"]);
    let dir = with("gptq_bits", "F32", vec![0; 4]);
    refused(dir.str(), &[FILE, "tensor gptq_bits", "wanted one whole number"]);
    let mut model = GOOD.clone();
    model.quantize = Value::Null;
    model.config["quantization_config"] = json!("gptq");
    refused(model.write().str(), &["config.json", "quantization_config is \"gptq\""]);
}
