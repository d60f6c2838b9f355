//! Files that are no safetensors, or whose headers lie.

use std::fs;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::kit::{
    FILE, GOOD, MOST, QKV, open, refused, spoilt_bytes, spoilt_file, spoilt_header, spoilt_header_text,
};
use crate::variants::{RawTensor, header, serialize};

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
