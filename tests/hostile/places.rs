//! Names, folders, links and indices that lead to no model.

use std::fs;

use serde_json::json;

use crate::kit::{FILE, GOOD, open, refused};
use crate::variants::TempDir;

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
