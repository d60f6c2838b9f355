//! What a checkpoint states, and where: quantisation, file names, the ids that end a text.

use std::fs;

use peregrine::checkpoint::Checkpoint;
use serde_json::{Value, json};

use crate::kit::{mentions, open, shared};
use crate::variants::{Model, RawTensor};

#[test]
fn quantisation_is_found_wherever_it_is_stated() {
    let base = Model::tiny().cut(1, 256);
    let mut only_in_config = base.clone();
    only_in_config.quantize = Value::Null;
    let mut quant_config = only_in_config.clone();
    quant_config.config["quantization_config"] = Value::Null;
    quant_config
        .files
        .insert("quant_config.json".to_owned(), br#"{"w_bit": 4, "q_group_size": 64}"#.to_vec());
    let mut nowhere = only_in_config.clone();
    nowhere.config.as_object_mut().unwrap().remove("quantization_config");
    let mut scalars = nowhere.clone();
    for (name, value) in [("gptq_bits", 4i32), ("gptq_groupsize", 64)] {
        let scalar = RawTensor { dtype: "I32", shape: vec![1], bytes: value.to_le_bytes().to_vec() };
        scalars.tensors.insert(name.to_owned(), scalar);
    }
    let mut no_group = base.clone();
    no_group.quantize = json!({ "bits": 4 });
    for (what, model, warned) in [
        ("config.json", only_in_config, false),
        ("quant_config.json", quant_config, false),
        ("nowhere", nowhere, true),
        ("TGI's scalars", scalars, false),
        ("no group size", no_group, false),
    ] {
        let checkpoint = open(&model.write());
        assert_eq!(checkpoint.quant().group_size, Some(64), "{what}");
        assert_eq!(
            mentions(&checkpoint, "read off the tensors"),
            warned,
            "{what}: {:?}",
            checkpoint.warnings()
        );
    }
}

#[test]
fn weights_are_found_by_every_file_name() {
    let mut model = Model::tiny().cut(1, 256);
    for (base, stated) in [
        ("model", None),
        ("gptq_model-4bit-64g", None),
        ("my-falcon", Some("my-falcon")),
        ("only-one-here", None),
        ("only-one-here", Some("gone")),
    ] {
        model.base_name = base.to_owned();
        model.set_quant("model_file_base_name", stated.map_or(Value::Null, |s| json!(s)));
        let dir = model.write();
        open(&dir);
        // The file itself names the model too.
        let file = dir.path().join(format!("{base}.safetensors"));
        Checkpoint::open(file.to_str().unwrap()).unwrap();
        model.set_quant("model_file_base_name", Value::Null);
        open(&model.write_shards(2));
    }
}

#[test]
fn the_stated_name_wins_over_others() {
    let mut model = Model::tiny().cut(1, 256);
    model.base_name = "right".to_owned();
    model.set_quant("model_file_base_name", json!("right"));
    let dir = model.write();
    fs::write(dir.path().join("model.safetensors"), b"not this one").unwrap();
    assert!(mentions(&open(&dir), "right.safetensors is used"));
}

#[test]
fn end_of_text_ids_avoid_the_trap() {
    for (config, generation, ids) in [
        ((1, json!(2)), json!({ "bos_token_id": 1, "eos_token_id": 2 }), vec![11]),
        ((11, json!(11)), json!({ "bos_token_id": 1, "eos_token_id": 2 }), vec![11]),
        ((1, json!(2)), json!({ "eos_token_id": [11, 7] }), vec![11, 7]),
        ((11, json!(2)), json!({}), vec![11, 2]),
        ((1, Value::Null), json!({}), vec![11]),
    ] {
        let mut model = Model::tiny().cut(1, 256);
        model.set("bos_token_id", json!(config.0));
        model.set("eos_token_id", config.1.clone());
        model.files.insert("generation_config.json".to_owned(), generation.to_string().into_bytes());
        let checkpoint = open(&model.write());
        assert_eq!(checkpoint.config().eos_ids, ids, "{config:?} {generation}");
        let trap = (config.0 == 1 && config.1 == 2) || generation["eos_token_id"] == 2;
        assert_eq!(mentions(&checkpoint, "bos 1 and eos 2"), trap, "{config:?} {generation}");
    }
}

#[test]
fn the_published_configs_are_read() {
    let configs = shared("PEREGRINE_DATA", "data").join("falcon-7b-instruct-configs");
    if !configs.is_dir() {
        println!(
            "SKIPPED: {} is not there; set PEREGRINE_DATA to the folder of public files",
            configs.display()
        );
        return;
    }
    // Only configs are at hand, so opening must get as far as the weights of the right shape.
    let weights = Model::tiny().cut(1, 256).write();
    for (file, wanted) in [
        ("config-06337a9.json", "wanted [65024, 4544]"),
        ("config-93b55b6.json", "wanted [65024, 4544]"),
        ("config-9cbb161.json", "wanted [65024, 4544]"),
        ("config-cf4b3c4.json", "wanted [65024, 4544]"),
        ("falcon-40b-config.json", "Falcon-40B's grouped key/value heads"),
    ] {
        fs::copy(configs.join(file), weights.path().join("config.json")).unwrap();
        let message = Checkpoint::open(weights.str()).unwrap_err().to_string();
        assert!(message.contains(wanted), "{file}: {message}");
    }
}

#[test]
fn missing_tokenizer_matters_only_when_asked_for() {
    let dir = Model::tiny().cut(1, 256).write();
    let checkpoint = open(&dir);
    let message = checkpoint.tokenizer_json().unwrap_err().to_string();
    assert!(message.contains("tokenizer.json: is missing"), "{message}");
}
