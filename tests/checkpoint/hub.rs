//! Names in Hugging Face's cache.

use std::fs;
use std::process::Command;

use peregrine::checkpoint::Checkpoint;

use crate::variants::{Model, TempDir};

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
        .args(["--exact", "hub::opener", "--nocapture", "--test-threads=1"])
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
