//! Opens every kind of checkpoint that this engine promises to read, and looks at what the views hold.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // in helpers, too

#[path = "common/variants.rs"]
mod variants;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use peregrine::checkpoint::{Checkpoint, FloatType, GptqTensor};
use peregrine::inspect::inspect;
use peregrine::layout::{f16_to_f32, f32_to_f16};
use peregrine::synth::{SynthOptions, SynthShape, synth, synth_bytes};
use serde_json::{Value, json};
use variants::{ASYMMETRIC, Model, TINY, TempDir};

/// The whole matrix by the formula of `GptqTensor`, [k, n] f32.
fn dequantise(t: &GptqTensor<'_>) -> Vec<f32> {
    let (qweight, qzeros) = (variants::words(t.qweight), variants::words(t.qzeros));
    let g_idx = t.g_idx.map(variants::words);
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
fn numbers(checkpoint: &Checkpoint) -> (Vec<u16>, Vec<Vec<f32>>) {
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

fn open(dir: &TempDir) -> Checkpoint {
    Checkpoint::open(dir.str()).unwrap()
}

fn mentions(checkpoint: &Checkpoint, what: &str) -> bool {
    checkpoint.warnings().iter().any(|w| w.contains(what))
}

/// A folder of files that are not in the repository.
fn shared(variable: &str, folder: &str) -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(folder);
    std::env::var_os(variable).map_or(beside, PathBuf::from)
}

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
    assert_eq!(checkpoint.embedding().to_f16_bits(), variants::halves(&embedding.bytes));
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
        let scalar =
            variants::RawTensor { dtype: "I32", shape: vec![1], bytes: value.to_le_bytes().to_vec() };
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

#[test]
fn a_checkpoint_may_be_shared_by_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Checkpoint>();
}

#[test]
fn extra_tensors_are_only_worth_a_warning() {
    let mut model = Model::tiny().cut(1, 256);
    let bytes = vec![0; 8];
    let extra = variants::RawTensor { dtype: "F32", shape: vec![2], bytes };
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

/// A hub cache with the models named, each a copy of the tiny one's first layer.
fn hub_cache(folders: &[&str]) -> TempDir {
    let cache = TempDir::new();
    let revision = "a".repeat(40);
    for folder in folders {
        let repository = cache.path().join("hub").join(folder);
        let snapshot = repository.join("snapshots").join(&revision);
        fs::create_dir_all(repository.join("blobs")).unwrap();
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(repository.join("refs/main"), &revision).unwrap();
        let model = Model::tiny().cut(1, 256).write();
        for (i, entry) in fs::read_dir(model.path()).unwrap().enumerate() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), repository.join(format!("blobs/{i}"))).unwrap();
            std::os::unix::fs::symlink(format!("../../blobs/{i}"), snapshot.join(entry.file_name())).unwrap();
        }
    }
    cache
}

/// Opens `name` in another process, whose environment may be changed without `unsafe`, and gives what it printed.
fn open_elsewhere(name: &str, cache: &TempDir) -> String {
    let test = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "opener", "--nocapture", "--test-threads=1"])
        .env("PEREGRINE_TEST_OPEN", name)
        .env("HF_HOME", cache.path())
        .env_remove("HF_HUB_CACHE")
        .env_remove("HUGGINGFACE_HUB_CACHE")
        .current_dir(cache.path())
        .output()
        .unwrap();
    String::from_utf8(test.stdout).unwrap()
}

/// Not a test of its own: the other process of `open_elsewhere`.
#[test]
fn opener() {
    if let Ok(name) = std::env::var("PEREGRINE_TEST_OPEN") {
        match Checkpoint::open(&name) {
            Ok(c) => println!("opened {}, instruct: {}", c.name(), c.is_instruct()),
            Err(e) => println!("exit {}: {e}", e.exit_code()),
        }
    }
}

#[test]
fn hub_names_are_found_in_the_cache() {
    let folder = "models--TheBloke--falcon-7b-instruct-GPTQ";
    let cache = hub_cache(&[folder]);
    let found = "opened TheBloke/falcon-7b-instruct-GPTQ, instruct: true";
    for name in ["TheBloke/falcon-7b-instruct-GPTQ", "thebloke/falcon-7B-instruct-gptq"] {
        let printed = open_elsewhere(name, &cache);
        assert!(printed.contains(found), "{name}: {printed}");
    }
    let printed = open_elsewhere("TheBloke/falcon-7b-GPTQ", &cache);
    assert!(
        printed.contains("exit 4") && printed.contains("hf download TheBloke/falcon-7b-GPTQ"),
        "{printed}"
    );
    // Without refs/main the only snapshot is taken; a second one makes it a question.
    fs::remove_file(cache.path().join("hub").join(folder).join("refs/main")).unwrap();
    assert!(open_elsewhere("TheBloke/falcon-7b-instruct-GPTQ", &cache).contains(found));
    fs::create_dir(cache.path().join("hub").join(folder).join("snapshots/b")).unwrap();
    let printed = open_elsewhere("TheBloke/falcon-7b-instruct-GPTQ", &cache);
    assert!(printed.contains("holds 2 snapshots"), "{printed}");
}

#[test]
fn two_names_that_differ_in_case_are_a_question() {
    let cache = hub_cache(&["models--a--Falcon", "models--a--falcon"]);
    assert!(open_elsewhere("a/Falcon", &cache).contains("opened a/Falcon"));
    let printed = open_elsewhere("A/FALCON", &cache);
    assert!(
        printed.contains("exit 4") && printed.contains("models--a--Falcon, models--a--falcon"),
        "{printed}"
    );
}

#[test]
fn a_blob_that_is_gone_is_named() {
    let cache = hub_cache(&["models--a--b"]);
    for entry in fs::read_dir(cache.path().join("hub/models--a--b/blobs")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let printed = open_elsewhere("a/b", &cache);
    assert!(printed.contains("config.json: is a link to a file that does not exist"), "{printed}");
}

#[test]
fn synthetic_checkpoints_open() {
    let default = SynthOptions::default;
    for options in [
        default(),
        SynthOptions { group_size: Some(32), sym: false, ..default() },
        SynthOptions { group_size: None, layers: Some(1), ..default() },
        SynthOptions { group_size: Some(128), act_order: true, tables: FloatType::F32, ..default() },
    ] {
        let dir = TempDir::new();
        let bytes = synth(SynthShape::TINY, dir.path(), &options, None).unwrap();
        assert_eq!(bytes, synth_bytes(SynthShape::TINY, &options));
        assert_eq!(bytes, fs::metadata(dir.path().join("model.safetensors")).unwrap().len());
        let checkpoint = open(&dir);
        let quant = checkpoint.quant();
        assert_eq!(quant.group_size, options.group_size, "{options:?}");
        assert_eq!(
            (quant.sym, quant.desc_act, quant.zero_offset),
            (options.sym, options.act_order, 1),
            "{options:?}"
        );
        assert_eq!(checkpoint.embedding().dtype, options.tables);
        let layers = options.layers.unwrap_or(2);
        assert_eq!(checkpoint.tensors().len(), layers * 22 + 4);
        assert!(
            checkpoint.lm_head().is_none() && checkpoint.warnings().is_empty(),
            "{:?}",
            checkpoint.warnings()
        );
    }
}

#[test]
fn synthetic_weights_are_sane_and_repeatable() {
    let (first, second, other) = (TempDir::new(), TempDir::new(), TempDir::new());
    let options = SynthOptions::default();
    for (dir, seed) in [(&first, 0), (&second, 0), (&other, 1)] {
        synth(SynthShape::TINY, dir.path(), &SynthOptions { seed, ..options.clone() }, None).unwrap();
    }
    let read = |dir: &TempDir| fs::read(dir.path().join("model.safetensors")).unwrap();
    assert!(read(&first) == read(&second) && read(&first) != read(&other));
    let checkpoint = open(&first);
    let layer = checkpoint.layer(1);
    let mut histogram = [0usize; 16];
    for word in variants::words(layer.dense_4h_to_h.qweight) {
        (0..8).for_each(|i| histogram[(word >> (4 * i) & 15) as usize] += 1);
    }
    assert!(histogram.iter().all(|&count| count > 0), "{histogram:?}");
    // A matrix of gain g and k inputs has weights of g / sqrt(k); 4 % is what the spread of scales adds and more.
    for (matrix, gain) in [(&layer.query_key_value, 1.7), (&layer.dense_4h_to_h, 0.4)] {
        let weights = dequantise(matrix);
        let mean_square = weights.iter().map(|w| f64::from(w * w)).sum::<f64>() / weights.len() as f64;
        let size = (mean_square * matrix.k as f64).sqrt() / gain;
        assert!((0.96..1.04).contains(&size), "{}: {size}", matrix.name);
    }
    let message = synth(SynthShape::TINY, first.path(), &options, None).unwrap_err().to_string();
    assert!(message.contains("exists"), "{message}");
    let odd = SynthShape { hidden_size: 100, ..SynthShape::TINY };
    assert_eq!(synth(odd, other.path(), &options, None).unwrap_err().exit_code(), 2);
}

#[test]
fn a_synthetic_falcon_7b_has_the_real_ones_size() {
    // Data bytes by the shapes of the published model: both tables in F16, or both in F32; the header is 0.1 MB.
    for (tables, data) in [(FloatType::F16, 4_760_393_472), (FloatType::F32, 5_942_869_504u64)] {
        let bytes = synth_bytes(SynthShape::FALCON_7B, &SynthOptions { tables, ..SynthOptions::default() });
        assert!((data + 50_000..data + 150_000).contains(&bytes), "{tables:?}: {bytes}");
    }
}

#[test]
fn inspect_counts_what_is_there() {
    let report = inspect(&Checkpoint::open(TINY).unwrap(), Some(1 << 30));
    // By hand: 8 layers of 320 x (448 + 320 + 2 x 1280), 18 norm vectors, 4096 x 320.
    assert_eq!(report.parameters, 8 * 320 * 3328 + 18 * 320 + 4096 * 320);
    // A unit is 16 x 64 codes in 512 bytes and 16 scales in 32.
    assert_eq!(report.memory.matrices, 8 * 320 * 3328 / 1024 * (512 + 32));
    assert_eq!(report.memory.tables, 4096 * 320 * 2);
    assert_eq!(report.memory.kv_full_context, 8 * 2 * 64 * 2 * 2048);
    assert_eq!(report.tensors.iter().map(|t| t.count).sum::<usize>(), 180);
    assert_eq!(report.tensors.len(), 4 * 5 + 2 + 4);
    let text = report.to_string();
    for part in ["tiny-falcon-tales", "8 layers, width 320", "4 bits, group 64, symmetric", "it fits"] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    let json = report.to_json();
    assert_eq!(json["architecture"]["hidden_size"], 320);
    assert_eq!(json["quantization"]["zero_points"], "gptq");
    assert_eq!(json["memory"]["gpu_free"], 1 << 30);
    let asymmetric = inspect(&Checkpoint::open(ASYMMETRIC).unwrap(), None);
    assert!(asymmetric.memory.matrices > report.memory.matrices);
    let narrow = inspect(&open(&Model::tiny().group_32().write()), None);
    assert_eq!(narrow.memory.matrices, 8 * 320 * 3328 / 1024 * (512 + 64));
    println!("{text}");
}
