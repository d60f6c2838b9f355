//! Damaged and hostile checkpoints: each gets one line that names what is wrong, and nothing panics or eats memory.
//!
//! Every case starts from one layer of the tiny model (0.6 MB) and spoils one thing. A counting allocator bounds what
//! opening may take from the heap, whatever the files say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // in helpers, too

#[path = "common/variants.rs"]
mod variants;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use peregrine::Error;
use peregrine::checkpoint::Checkpoint;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use variants::{Model, RawTensor, TempDir, header, serialize, with_header};

/// Most heap bytes that opening any file here may hold at once on the opening thread. What costs most is parsed JSON
/// of the largest header accepted (1 MB of text): measured 28 MB, times 2.
const MAX_HEAP_BYTES: usize = 56 << 20;

/// Counts what each thread holds, and the most it ever held.
struct Counting;

thread_local! {
    static HELD: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

fn count(change: impl FnOnce(usize) -> usize) {
    // A thread that is ending has no counter any more.
    let _ = HELD.try_with(|held| {
        let (now, most) = held.get();
        let now = change(now);
        held.set((now, most.max(now)));
    });
}

// SAFETY: hands everything to the system's allocator and only counts.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(|now| now + layout.size());
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(|now| now.saturating_sub(layout.size()));
        // SAFETY: `pointer` came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most that any opening held, for the figure above.
static MOST: AtomicUsize = AtomicUsize::new(0);

/// Opens `model`, and fails the test if that took more than [`MAX_HEAP_BYTES`].
fn open(model: &str) -> Result<Checkpoint, Error> {
    let before = HELD.get().0;
    HELD.set((before, before));
    let result = Checkpoint::open(model);
    let peak = HELD.get().1 - before;
    MOST.fetch_max(peak, Ordering::Relaxed);
    assert!(peak <= MAX_HEAP_BYTES, "opening {model} held {peak} bytes");
    result
}

/// Opening must fail with status 4 and one line that has all of `parts`.
#[track_caller]
fn refused(model: &str, parts: &[&str]) {
    let Err(error) = open(model) else { panic!("was opened; wanted an error with {parts:?}") };
    let line = error.to_string();
    assert_eq!(error.exit_code(), 4, "{line}");
    assert!(!line.contains('\n') && line.len() < 1000, "not one line: {line}");
    for part in parts {
        assert!(line.contains(part), "{part:?} is not in: {line}");
    }
}

/// One layer of the tiny model: the smallest good checkpoint.
static GOOD: LazyLock<Model> = LazyLock::new(|| Model::tiny().cut(1, 256));

const FILE: &str = "model.safetensors";
const QKV: &str = "transformer.h.0.self_attention.query_key_value";
const DOWN: &str = "transformer.h.0.mlp.dense_4h_to_h";

/// Spoils the model before it is written.
#[track_caller]
fn spoilt(change: impl FnOnce(&mut Model), parts: &[&str]) {
    let mut model = GOOD.clone();
    change(&mut model);
    refused(model.write().str(), parts);
}

/// Spoils the bytes of the weights file.
#[track_caller]
fn spoilt_bytes(change: impl FnOnce(Vec<u8>) -> Vec<u8>, parts: &[&str]) {
    let dir = TempDir::new();
    GOOD.write_json(dir.path());
    fs::write(dir.path().join(FILE), change(serialize(GOOD.tensors.iter()))).unwrap();
    refused(dir.str(), parts);
}

/// Spoils the header, as JSON; the data stays.
#[track_caller]
fn spoilt_header(change: impl FnOnce(&mut Value), parts: &[&str]) {
    let mut json = Value::Object(header(GOOD.tensors.iter()));
    change(&mut json);
    spoilt_header_text(&json.to_string(), parts);
}

#[track_caller]
fn spoilt_header_text(text: &str, parts: &[&str]) {
    let data: Vec<u8> = GOOD.tensors.values().flat_map(|t| t.bytes.iter().copied()).collect();
    spoilt_bytes(|_| with_header(text, &data), parts);
}

/// Spoils a file of the folder.
#[track_caller]
fn spoilt_file(name: &str, contents: &[u8], parts: &[&str]) {
    let dir = GOOD.write();
    fs::write(dir.path().join(name), contents).unwrap();
    refused(dir.str(), parts);
}

#[test]
fn the_good_one_opens() {
    open(GOOD.write().str()).unwrap();
}

#[test]
fn places_that_hold_no_model() {
    let empty = TempDir::new();
    refused(empty.str(), &[empty.str(), "no config.json"]);
    refused("/nowhere/at/all", &["/nowhere/at/all", "No such file"]);
    let text = empty.path().join("notes.txt");
    fs::write(&text, "hello").unwrap();
    refused(text.to_str().unwrap(), &["notes.txt", "not a .safetensors file"]);
    refused("", &["hub name"]);
    refused("\u{1b}[31m\nred", &["\\u{1b}"]);
    fs::write(empty.path().join("config.json"), GOOD.config.to_string()).unwrap();
    refused(empty.str(), &["no .safetensors file"]);
}

#[test]
fn links_and_other_things_that_are_no_files() {
    let dir = GOOD.write();
    let config = dir.path().join("config.json");
    fs::remove_file(&config).unwrap();
    std::os::unix::fs::symlink("config.json", &config).unwrap();
    refused(dir.str(), &["config.json", "cannot be read"]);
    fs::remove_file(&config).unwrap();
    std::os::unix::fs::symlink("nowhere", &config).unwrap();
    refused(dir.str(), &["config.json", "link to a file that does not exist"]);
    fs::remove_file(&config).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &config).unwrap();
    refused(dir.str(), &["config.json", "is not a file"]);
    let dir = GOOD.write();
    fs::remove_file(dir.path().join(FILE)).unwrap();
    fs::create_dir(dir.path().join(FILE)).unwrap();
    refused(dir.str(), &[FILE, "is not a file"]);
    let around = TempDir::new();
    let link = around.path().join("loop");
    std::os::unix::fs::symlink(&link, &link).unwrap();
    refused(link.to_str().unwrap(), &["loop", "wanted a folder"]);
}

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
fn files_that_are_no_safetensors() {
    spoilt_bytes(|_| Vec::new(), &[FILE, "has 0 bytes", "truncated"]);
    spoilt_bytes(|bytes| bytes[..7].to_vec(), &[FILE, "has 7 bytes", "truncated"]);
    spoilt_bytes(|bytes| bytes[..100].to_vec(), &[FILE, "the file has 100", "truncated"]);
    spoilt_bytes(|bytes| bytes[..bytes.len() - 1].to_vec(), &[FILE, "tensor ", "truncated"]);
    spoilt_bytes(|bytes| bytes[..bytes.len() / 2].to_vec(), &[FILE, "tensor ", "truncated"]);
    spoilt_bytes(|bytes| [bytes, vec![0; 3]].concat(), &[FILE, "the rest belongs to none"]);
    spoilt_bytes(
        |bytes| [&u64::MAX.to_le_bytes(), &bytes[8..]].concat(),
        &[FILE, "18446744073709551615", "damaged"],
    );
    spoilt_bytes(|bytes| [&(1u64 << 20).to_le_bytes(), &bytes[8..]].concat(), &[FILE, "header"]);
    spoilt_bytes(|_| vec![0; 4096], &[FILE, "does not begin with {"]);
    spoilt_bytes(|_| b"PK\x03\x04a zip file with a pickle in it".to_vec(), &[FILE, "no safetensors file"]);
    spoilt_bytes(|_| vec![b'{'; 1 << 16], &[FILE, "no safetensors file"]);
    spoilt_header_text("{\"a\": nope}", &[FILE, "not a JSON object"]);
    spoilt_header_text(" {}", &[FILE, "does not begin with {"]);
    spoilt_header_text("{}", &[FILE, "the tensors end at byte 0"]);
    spoilt_header_text(&("{\"a\":".repeat(100_000)), &[FILE, "not a JSON object"]);
}

#[test]
fn headers_with_impossible_places() {
    let name = format!("{QKV}.qweight");
    for (offsets, parts) in [
        (json!([0, u64::MAX]), ["data_offsets end at", "truncated"]),
        (json!([u64::MAX, 0]), ["data_offsets are", "start before the end"]),
        (json!([-1, 5]), ["header", "invalid value"]),
        (json!([0]), ["header", "invalid length"]),
        (json!([0, 3]), ["data_offsets span 3 bytes", "I32"]),
        (json!("all"), ["header", "invalid type"]),
    ] {
        spoilt_header(|json| json[&name]["data_offsets"] = offsets, &[FILE, &name, parts[0], parts[1]]);
    }
    let moved = |json: &mut Value, by: i64| {
        for edge in 0..2 {
            let old = json[&name]["data_offsets"][edge].as_i64().unwrap();
            json[&name]["data_offsets"][edge] = json!(old + by);
        }
    };
    spoilt_header(|json| moved(json, -4), &[FILE, "overlaps"]);
    spoilt_header(|json| moved(json, 4), &[FILE, "leaves a hole"]);
    spoilt_header(|json| json[&name]["shape"] = json!([1u64 << 33, 1u64 << 33]), &[FILE, &name, "is not"]);
    spoilt_header(|json| json[&name]["shape"] = json!([u64::MAX, u64::MAX]), &[FILE, &name, "is not"]);
    spoilt_header(
        |json| json[&name]["shape"] = json!([1, 1, 1, 1, 1, 1, 1, 1, 17920]),
        &[FILE, &name, "8 dimensions"],
    );
    spoilt_header(|json| json[&name]["dtype"] = json!("Q4"), &[FILE, &name, "unknown variant `Q4`"]);
    spoilt_header(|json| json[&name] = json!(5), &[FILE, &name, "header"]);
    spoilt_header(|json| json["__metadata__"] = json!({ "a": 1 }), &[FILE, "header"]);
    spoilt_header(|json| json["__metadata__"] = json!([]), &[FILE, "header"]);
    // Eight tensors whose lengths add up to 2^64: the sum must not overflow.
    let huge =
        |i: u64| json!({ "dtype": "U8", "shape": [1u64 << 60], "data_offsets": [i << 60, (i + 1) << 60] });
    let many: serde_json::Map<_, _> = (0..15).map(|i| (format!("t{i:02}"), huge(i))).collect();
    spoilt_header_text(&Value::Object(many).to_string(), &[FILE, "tensor t00", "truncated"]);
}

#[test]
fn names_that_occur_twice() {
    let json = Value::Object(header(GOOD.tensors.iter())).to_string();
    let again = json!({ "dtype": "F16", "shape": [256, 320], "data_offsets": [0, 163_840] });
    for name in ["lm_head.weight", "lm_head\\u002eweight"] {
        let twice = format!("{{\"{name}\":{again},{}", &json[1..]);
        spoilt_header_text(&twice, &[FILE, "tensor lm_head.weight is in the header twice"]);
    }
    let dir = GOOD.write_shards(2);
    let both: Vec<_> = GOOD.tensors.iter().collect();
    let shard = serialize(both.into_iter());
    fs::write(dir.path().join("model-00002-of-00002.safetensors"), shard).unwrap();
    refused(dir.str(), &["model-00002-of-00002.safetensors", "model-00001-of-00002", "is in"]);
}

#[test]
fn names_that_speak_to_the_terminal() {
    let mut model = GOOD.clone();
    let tensor = RawTensor { dtype: "U8", shape: vec![0], bytes: Vec::new() };
    model.tensors.insert("\u{1b}[2J\nok".to_owned(), tensor);
    let checkpoint = open(model.write().str()).unwrap();
    let report = peregrine::inspect::inspect(&checkpoint, None).to_string();
    assert!(report.contains("\\u{1b}[2J\\nok") && !report.contains('\u{1b}'), "{report}");
    assert!(checkpoint.warnings().iter().all(|w| !w.contains('\u{1b}')), "{:?}", checkpoint.warnings());
}

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

#[test]
fn indices_that_point_elsewhere() {
    let dir = GOOD.write_shards(2);
    let index = dir.path().join("model.safetensors.index.json");
    for (contents, parts) in [
        (json!({}), ["weight_map", "is missing"]),
        (json!({ "weight_map": [] }), ["weight_map", "not an object"]),
        (json!({ "weight_map": { "a": "../model.safetensors" } }), ["tensor a", "beside it"]),
        (json!({ "weight_map": { "a": "/etc/passwd" } }), ["tensor a", "beside it"]),
        (json!({ "weight_map": { "a": 5 } }), ["tensor a", "beside it"]),
        (
            json!({ "weight_map": { "a": "model-00003.safetensors" } }),
            ["model-00003.safetensors", "is missing"],
        ),
        (json!({ "weight_map": {} }), ["index.json", "names 0 shards"]),
    ] {
        fs::write(&index, contents.to_string()).unwrap();
        refused(dir.str(), &parts);
    }
    let many: serde_json::Map<_, _> =
        (0..300).map(|i| (format!("t{i}"), json!(format!("{i}.safetensors")))).collect();
    fs::write(&index, json!({ "weight_map": many }).to_string()).unwrap();
    refused(dir.str(), &["index.json", "300 shards"]);
    fs::remove_file(&index).unwrap();
    refused(dir.str(), &["2 weights files", "model-00001-of-00002.safetensors"]);
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

#[test]
fn what_costs_the_most_memory_is_bounded() {
    // The densest JSON there is: an empty array takes 3 bytes of text and 32 of memory.
    let dense = |bytes: usize| format!("{{\"a\":[{}0]}}", "[],".repeat(bytes / 3));
    spoilt_file("config.json", dense((1 << 20) - 10).as_bytes(), &["config.json", "model_type is missing"]);
    spoilt_header_text(&dense((1 << 20) - 10), &[FILE, "tensor a", "header"]);
    let zeros = format!(
        "{{\"a\":{{\"dtype\":\"U8\",\"data_offsets\":[0,0],\"shape\":[{}0]}}}}",
        "0,".repeat(1 << 18)
    );
    spoilt_header_text(&zeros, &[FILE, "tensor a", "8 dimensions"]);
    let names: String = (0..40_000).map(|i| format!("\"{i:05}\":0,")).collect();
    spoilt_header_text(&format!("{{{names}\"a\":0}}"), &[FILE, "tensor 00000", "header"]);
    let metadata: String = (0..40_000).map(|i| format!("\"{i:05}\":\"\",")).collect();
    let text = format!("{{\"__metadata__\":{{{metadata}\"a\":\"\"}}}}");
    spoilt_header_text(&text, &[FILE, "the tensors end at byte 0"]);
    println!("the most held: {:.1} MB", MOST.load(Ordering::Relaxed) as f64 / 1e6);
}

/// A random change to a file.
#[derive(Debug, Clone)]
enum Mutation {
    Flip { at: prop::sample::Index, bit: u8 },
    Set { at: prop::sample::Index, byte: u8 },
    Truncate { at: prop::sample::Index },
    Insert { at: prop::sample::Index, bytes: Vec<u8> },
    Remove { at: prop::sample::Index, len: usize },
    Copy { from: prop::sample::Index, to: prop::sample::Index, len: usize },
}

fn mutation() -> impl Strategy<Value = Mutation> {
    use prop::sample::Index;
    // JSON's own bytes and digits more often than others: they lead further in.
    let bytes = || {
        prop::collection::vec(
            prop_oneof![any::<u8>(), prop::sample::select(b"{}[]\",:0123456789-e.".to_vec())],
            1..20,
        )
    };
    prop_oneof![
        (any::<Index>(), 0u8..8).prop_map(|(at, bit)| Mutation::Flip { at, bit }),
        (any::<Index>(), bytes()).prop_map(|(at, bytes)| Mutation::Set { at, byte: bytes[0] }),
        any::<Index>().prop_map(|at| Mutation::Truncate { at }),
        (any::<Index>(), bytes()).prop_map(|(at, bytes)| Mutation::Insert { at, bytes }),
        (any::<Index>(), 1usize..200).prop_map(|(at, len)| Mutation::Remove { at, len }),
        (any::<Index>(), any::<Index>(), 1usize..200).prop_map(|(from, to, len)| Mutation::Copy {
            from,
            to,
            len
        }),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    let reach = bytes.len();
    if reach == 0 {
        return;
    }
    match mutation {
        Mutation::Flip { at, bit } => bytes[at.index(reach)] ^= 1 << bit,
        Mutation::Set { at, byte } => bytes[at.index(reach)] = *byte,
        Mutation::Truncate { at } => bytes.truncate(at.index(reach)),
        Mutation::Insert { at, bytes: new } => {
            drop(bytes.splice(at.index(reach)..at.index(reach), new.iter().copied()))
        }
        Mutation::Remove { at, len } => {
            drop(bytes.drain(at.index(reach)..(at.index(reach) + len).min(reach)))
        }
        Mutation::Copy { from, to, len } => {
            let piece = bytes[from.index(reach)..(from.index(reach) + len).min(reach)].to_vec();
            // Over what is there: the lengths stay right, which leads further in.
            let to = to.index(reach - piece.len() + 1);
            bytes[to..to + piece.len()].copy_from_slice(&piece);
        }
    }
}

/// A checkpoint that is opened must hold up to being read: every view is used.
fn use_all_of(checkpoint: &Checkpoint) {
    let config = checkpoint.config();
    let mut sum = 0f32;
    for i in 0..config.num_layers {
        let layer = checkpoint.layer(i);
        for m in [&layer.query_key_value, &layer.dense, &layer.dense_h_to_4h, &layer.dense_4h_to_h] {
            assert_eq!(m.qweight.len(), m.k * m.n / 2);
            assert_eq!(m.qzeros.len(), m.groups() * m.n / 2);
            assert_eq!(m.scales.len(), m.groups() * m.n);
            assert!(m.scales.to_f32().iter().all(|s| s.is_finite()));
            assert!(m.g_idx.is_none_or(|g| variants::words(g).iter().all(|&g| (g as usize) < m.groups())));
        }
        sum += layer.input_layernorm.weight.get(config.hidden_size - 1);
    }
    sum += checkpoint.embedding().get(config.vocab_size * config.hidden_size - 1);
    assert!(sum.is_finite());
    let _ = peregrine::inspect::inspect(checkpoint, None).to_string();
}

/// Opens the good checkpoint with `file` mutated 400 times: it must be refused with status 4, or what is opened must
/// be good to read. `good` is what is mutated, and `file` makes the file of it.
fn survives(name: &str, good: &[u8], most_mutations: usize, file: impl Fn(Vec<u8>) -> Vec<u8>) {
    let dir = GOOD.write();
    let config = ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() };
    let mutations = prop::collection::vec(mutation(), 1..=most_mutations);
    let opened = Cell::new(0);
    let result = TestRunner::new(config).run(&mutations, |mutations| {
        let mut bytes = good.to_vec();
        mutations.iter().for_each(|mutation| mutate(&mut bytes, mutation));
        fs::write(dir.path().join(name), file(bytes)).unwrap();
        match open(dir.str()) {
            Ok(checkpoint) => {
                opened.set(opened.get() + 1);
                use_all_of(&checkpoint);
            }
            Err(Error::Model { .. }) => {}
            Err(other) => panic!("another kind of error: {other:?}"),
        }
        Ok(())
    });
    result.unwrap();
    println!("{name}: {} of 400 were still good", opened.get());
}

#[test]
fn mutated_files_are_survived() {
    survives(FILE, &serialize(GOOD.tensors.iter()), 8, |bytes| bytes);
}

/// The header's length is made right again, so that all mutations reach the JSON and what follows it.
#[test]
fn mutated_headers_are_survived() {
    let data: Vec<u8> = GOOD.tensors.values().flat_map(|t| t.bytes.iter().copied()).collect();
    let header = Value::Object(header(GOOD.tensors.iter())).to_string().into_bytes();
    survives(FILE, &header, 2, |header| [&(header.len() as u64).to_le_bytes(), &header[..], &data].concat());
}

/// Everything but the codes, in which any bits are valid: the bytes of the small tensors.
#[test]
fn mutated_numbers_are_survived() {
    let header = Value::Object(header(GOOD.tensors.iter())).to_string();
    let small: Vec<u8> =
        GOOD.tensors.iter().filter(|(n, _)| n.contains("g_idx")).flat_map(|(_, t)| t.bytes.clone()).collect();
    survives(FILE, &small, 4, |bytes| {
        let mut rest = bytes.into_iter().chain(std::iter::repeat(0));
        let data = GOOD.tensors.iter().flat_map(|(name, t)| match name.contains("g_idx") {
            true => rest.by_ref().take(t.bytes.len()).collect(),
            false => t.bytes.clone(),
        });
        with_header(&header, &data.collect::<Vec<u8>>())
    });
}

#[test]
fn mutated_configs_are_survived() {
    survives("config.json", GOOD.config.to_string().as_bytes(), 3, |bytes| bytes);
}

#[test]
fn mutated_quantisation_is_survived() {
    survives("quantize_config.json", GOOD.quantize.to_string().as_bytes(), 3, |bytes| bytes);
}
