//! The tokenizer against Hugging Face's ids (tests/fixtures/goldens, and llama.cpp's vectors for Falcon's own
//! tokenizer where that is at hand), the text stream against decoding at once (its stop strings: see its own module), and damaged files.
//!
//! Falcon's tokenizer is not ours to publish: tests that need it look for `falcon-tokenizer/tokenizer.json` in
//! $PEREGRINE_DATA or ../shared/data and say so when they skip.

// Helpers of tests may panic as tests may; clippy.toml only knows functions marked #[test].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use peregrine::Error;
use peregrine::prompt::{Template, Turn};
use peregrine::tokenizer::{TextStream, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

static SMALL_JSON: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let root = Path::new(if Path::new("models").exists() { "." } else { env!("CARGO_MANIFEST_DIR") });
    let places = ["models/tiny-falcon-tales/tokenizer.json", "../shared/fixtures/a/tokenizer.json"];
    places
        .iter()
        .find_map(|place| std::fs::read(root.join(place)).ok())
        .expect("the small model's tokenizer.json")
});
static SMALL: LazyLock<Tokenizer> = LazyLock::new(|| load(&SMALL_JSON).unwrap());
/// The crate's own reading of the same file, which ours must equal.
static SMALL_CRATE: LazyLock<[tokenizers::Tokenizer; 2]> = LazyLock::new(|| crate_readings(&SMALL_JSON));

/// The crate's tokenizers of a file: special tokens in a text are text for the first, ids for the second.
fn crate_readings(json: &[u8]) -> [tokenizers::Tokenizer; 2] {
    [false, true].map(|special| {
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(json).unwrap();
        tokenizer.set_encode_special_tokens(!special);
        tokenizer
    })
}

fn load(json: &[u8]) -> peregrine::Result<Tokenizer> {
    Tokenizer::from_json(json, Path::new("tokenizer.json"))
}

/// The folder of Falcon's own tokenizer, or `None` with a line that says why.
fn falcon_folder(test: &str) -> Option<PathBuf> {
    let data =
        std::env::var_os("PEREGRINE_DATA").map_or_else(|| PathBuf::from("../shared/data"), PathBuf::from);
    let folder = data.join("falcon-tokenizer");
    if folder.join("tokenizer.json").exists() {
        return Some(folder);
    }
    eprintln!("SKIPPED {test}: no {}; set PEREGRINE_DATA", folder.join("tokenizer.json").display());
    None
}

fn falcon(test: &str) -> Option<(Tokenizer, [tokenizers::Tokenizer; 2], PathBuf)> {
    let folder = falcon_folder(test)?;
    let json = std::fs::read(folder.join("tokenizer.json")).unwrap();
    Some((load(&json).unwrap(), crate_readings(&json), folder))
}

#[test]
fn small_tokenizer_passes_hugging_face_s_cases() {
    let cases: Value = serde_json::from_str(include_str!("fixtures/goldens/tokenizer_cases.json")).unwrap();
    let cases = cases["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 21);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> =
            case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(SMALL.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(SMALL.decode(&ids, false), case["decoded"].as_str().unwrap(), "{text:?}");
        assert_eq!(SMALL.decode(&ids, true), case["decoded_skip_special"].as_str().unwrap(), "{text:?}");
    }
}

#[test]
fn falcon_s_tokenizer_passes_all_47_vectors() {
    let Some((ours, _, folder)) = falcon("falcon_s_tokenizer_passes_all_47_vectors") else { return };
    let texts = std::fs::read_to_string(folder.join("vectors.inp")).unwrap();
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let wanted = std::fs::read_to_string(folder.join("vectors.out")).unwrap();
    // Split, not `lines`: the last of the 47 texts is empty, and so is its line of ids.
    let wanted =
        wanted.split('\n').map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect());
    let wanted: Vec<Vec<u32>> = wanted.collect();
    assert_eq!((texts.len(), wanted.len()), (47, 47));
    for (text, wanted) in texts.iter().zip(&wanted) {
        for special in [false, true] {
            assert_eq!(&ours.encode(text, special).unwrap(), wanted, "{text:?}");
        }
    }
}

#[test]
fn falcon_s_tokenizer_gives_the_known_ids() {
    let Some((ours, _, _)) = falcon("falcon_s_tokenizer_gives_the_known_ids") else { return };
    assert_eq!(ours.vocab_size(), 65024);
    let user = "Tell me about AI";
    let card = [
        44, 5335, 11428, 569, 3398, 248, 2735, 335, 607, 2355, 2425, 25, 193, 7932, 37, 14280, 454, 544,
        8317, 193, 44295, 37,
    ];
    let girafatron = "Girafatron is obsessed with giraffes, the most glorious animal on the face of this Earth. \
        Giraftron believes all other animals are irrelevant when compared to the glorious majesty of the giraffe.\n\
        Daniel: Hello, Girafatron!\nGirafatron:";
    let cases: [(&str, &[u32]); 12] = [
        (&Template::Card.prompt(user), &card),
        (&Template::Upstream.prompt(user), &[193, 193, 7932, 37, 14280, 454, 544, 8317, 193, 193, 44295, 37]),
        ("1234567", &[10963, 27681, 34]),
        ("м", &[150, 132]),
        ("½", &[136, 133]),
        ("x²y", &[99, 136, 122, 100]),
        ("don't", &[11105, 18, 95]),
        ("\r\n", &[195, 193]),
        ("\u{b}", &[]),
        ("a   b\n\n\nc", &[76, 258, 262, 1001, 193, 78]),
        ("Hello <|endoftext|> world", &[9856, 204, 11, 1079]),
        ("\u{fffd}", &[13112, 133]),
    ];
    for (text, ids) in cases {
        assert_eq!(ours.encode(text, true).unwrap(), ids, "{text:?}");
    }
    let ids = ours.encode(girafatron, true).unwrap();
    assert_eq!((ids.len(), &ids[..5]), (61, &[50, 330, 1622, 249, 1480][..]));
    assert_eq!(ids[55..], [50, 330, 1622, 249, 1480, 37]);
}

#[test]
fn a_conversation_s_parts_tokenise_as_the_whole() {
    // `next_turn` is appended to a session that already holds the tokens of the history.
    let Some((ours, _, _)) = falcon("a_conversation_s_parts_tokenise_as_the_whole") else { return };
    for template in [Template::Card, Template::Upstream] {
        let first = Turn { user: "Hello".into(), assistant: Some("Hi, what is it?".into()) };
        let whole = template.conversation(&[first, Turn { user: "Who are you?".into(), assistant: None }]);
        let mut parts = ours.encode(&template.prompt("Hello"), false).unwrap();
        parts.extend(ours.encode(" Hi, what is it?", false).unwrap());
        parts.extend(ours.encode(&template.next_turn("Who are you?"), false).unwrap());
        assert_eq!(ours.encode(&whole, false).unwrap(), parts, "{template:?}");
    }
}

#[test]
fn special_tokens_in_a_text_are_text_unless_asked_for() {
    for (id, text) in [(11, "<|endoftext|>"), (0, ">>TITLE<<"), (10, ">>MIDDLE<<")] {
        assert_eq!(SMALL.encode(text, true).unwrap(), [id]);
        let ids = SMALL.encode(text, false).unwrap();
        assert!(ids.len() > 1 && !ids.iter().any(|&id| SMALL.is_special(id)), "{text}: {ids:?}");
        assert_eq!(SMALL.decode(&ids, true), text, "nothing of it is lost");
    }
    assert!((0..12).all(|id| SMALL.is_special(id)) && !SMALL.is_special(12) && !SMALL.is_special(u32::MAX));
}

#[test]
fn unknown_ids_have_no_bytes() {
    assert_eq!(SMALL.token_bytes(SMALL.vocab_size() as u32), None);
    assert_eq!(SMALL.token_bytes(u32::MAX), None);
    assert_eq!(SMALL.decode(&[12, u32::MAX, 4096, 12], false), "!!");
}

#[test]
fn a_long_run_of_blanks_is_tokenised_to_its_end() {
    // The GPT-2 pattern's engine has a limit on steps back, and says nothing when it is reached.
    let text = " ".repeat((512 << 10) - 1) + "x";
    let ids = SMALL.encode(&text, false).unwrap();
    assert_eq!(SMALL.decode(&ids, false), text);
    assert_eq!(
        ids[ids.len() - 2..],
        SMALL.encode("  x", false).unwrap()[1..],
        "the last blank goes with the word"
    );
    let error = SMALL.encode(&(text + " "), false).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
}

fn text_with_specials() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-zA-Z ',.:;0-9\n\t]{0,12}",
        2 => any::<String>(),
        1 => Just("<|endoftext|>".to_owned()),
        1 => Just(">>TITLE<<".to_owned()),
        1 => Just(">>TITLE<|endoftext".to_owned()),
        1 => Just("²³¼ £ ́é 🦊\u{200d}\u{85}\u{3000}".to_owned()),
    ];
    proptest::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

/// Ours and the crate's own reading of the file agree on `text`, in both modes.
fn assert_encodes_as_the_crate(ours: &Tokenizer, theirs: &[tokenizers::Tokenizer; 2], text: &str) {
    for special in [false, true] {
        let wanted = theirs[usize::from(special)].encode(text, false).unwrap();
        assert_eq!(ours.encode(text, special).unwrap(), wanted.get_ids(), "{text:?}, special {special}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn encodes_as_the_crate(texts in proptest::collection::vec(text_with_specials(), 4)) {
        for text in texts {
            assert_encodes_as_the_crate(&SMALL, &SMALL_CRATE, &text);
        }
    }

    #[test]
    fn decodes_as_the_crate_at_once_and_streamed(
        ids in proptest::collection::vec(prop_oneof![0u32..4096, 106u32..240, 0u32..12], 0..60),
        skip_special in any::<bool>(),
    ) {
        // Ids below 240 are single bytes, so that characters are cut and broken in every way.
        let wanted = SMALL_CRATE[0].decode(&ids, skip_special).unwrap();
        prop_assert_eq!(SMALL.decode(&ids, skip_special), wanted.clone());
        let mut stream = TextStream::new(&[]);
        let mut joined = String::new();
        for &id in ids.iter().filter(|&&id| !(skip_special && SMALL.is_special(id))) {
            let step = stream.push(SMALL.token_bytes(id).unwrap());
            prop_assert!(!step.stopped);
            joined.push_str(&step.text);
        }
        joined.push_str(&stream.finish());
        prop_assert_eq!(joined, wanted);
    }

    #[test]
    fn damaged_files_are_refused_or_work(at in 0.0..1.0f64, len in 0usize..40, with in any::<Vec<u8>>()) {
        let mut json = SMALL_JSON.clone();
        let start = (at * json.len() as f64) as usize;
        let end = (start + len).min(json.len());
        json.splice(start..end, with);
        check_loads_or_is_refused(&json);
    }

    #[test]
    fn exchanged_characters_are_refused_or_work(at in 0.0..1.0f64, with in "[0-9\"\\[\\]{},: a-zĠ]{0,3}") {
        let mut json = SMALL_JSON.clone();
        let start = (at * (json.len() - 3) as f64) as usize;
        json.splice(start..start + 1, with.into_bytes());
        check_loads_or_is_refused(&json);
    }
}

fn check_loads_or_is_refused(json: &[u8]) {
    match load(json) {
        Ok(tokenizer) => {
            // It must not have brought in anything that panics later.
            let ids = tokenizer.encode("Once upon a time, 1234 <|endoftext|> é", true).unwrap();
            assert!(ids.iter().all(|&id| tokenizer.token_bytes(id).is_some()));
        }
        Err(error) => assert_refused(&error, ""),
    }
}

fn assert_refused(error: &Error, wanted: &str) {
    let line = error.to_string();
    assert_eq!(error.exit_code(), 4, "{line}");
    assert!(line.starts_with("tokenizer.json: ") && line.contains(wanted), "wanted {wanted:?} in {line:?}");
    assert!(!line.chars().any(char::is_control) && line.len() < 2000, "not one line: {line:?}");
}

#[test]
fn falcon_s_tokenizer_encodes_and_decodes_as_the_crate() {
    let Some((ours, theirs, _)) = falcon("falcon_s_tokenizer_encodes_and_decodes_as_the_crate") else {
        return;
    };
    let config = ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let encodes = |text: String| {
        assert_encodes_as_the_crate(&ours, &theirs, &text);
        Ok(())
    };
    runner.run(&text_with_specials(), encodes).unwrap();
    let decodes = |ids: Vec<u32>| {
        prop_assert_eq!(ours.decode(&ids, false), theirs[0].decode(&ids, false).unwrap());
        Ok(())
    };
    let ids = proptest::collection::vec(prop_oneof![0u32..65024, 106u32..240], 0..60);
    runner.run(&ids, decodes).unwrap();
}

/// The small tokenizer's file with one change.
fn changed(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut json: Value = serde_json::from_slice(&SMALL_JSON).unwrap();
    change(&mut json);
    serde_json::to_vec(&json).unwrap()
}

#[test]
fn hostile_files_are_refused_by_name() {
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 33] = [
        ("not an object", |j| *j = json!([1])),
        ("version", |j| j["version"] = json!("2.0")),
        ("normalizer NFC", |j| j["normalizer"] = json!({"type": "NFC"})),
        ("post_processor TemplateProcessing", |j| {
            j["post_processor"] = json!({"type": "TemplateProcessing"})
        }),
        ("decoder null", |j| j["decoder"] = Value::Null),
        ("decoder Metaspace", |j| j["decoder"] = json!({"type": "Metaspace"})),
        ("pre_tokenizer null", |j| j["pre_tokenizer"] = Value::Null),
        ("pre_tokenizer ByteLevel", |j| j["pre_tokenizer"] = json!({"type": "ByteLevel"})),
        ("3 steps", |j| drop(j["pre_tokenizer"]["pretokenizers"].as_array_mut().unwrap().pop())),
        ("step 3", |j| j["pre_tokenizer"]["pretokenizers"][3]["pattern"]["Regex"] = json!("(a+)+$")),
        ("step 1", |j| j["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = json!(true)),
        ("\"model\" is missing", |j| drop(j.as_object_mut().unwrap().remove("model"))),
        ("model.type", |j| j["model"]["type"] = json!("Unigram")),
        ("model.dropout", |j| j["model"]["dropout"] = json!(0.1)),
        ("model.unk_token", |j| j["model"]["unk_token"] = json!("!")),
        // Longer than the merges it would be cut from: the crate's own reader panics here.
        ("model.continuing_subword_prefix", |j| j["model"]["continuing_subword_prefix"] = json!("######")),
        ("model.ignore_merges", |j| j["model"]["ignore_merges"] = json!(true)),
        ("model.vocab is missing", |j| j["model"]["vocab"] = Value::Null),
        ("model.vocab is empty", |j| j["model"]["vocab"] = json!({})),
        ("has id 4096", |j| j["model"]["vocab"]["!"] = json!(4096)),
        ("has id 18446744073709551615", |j| j["model"]["vocab"]["!"] = json!(u64::MAX)),
        ("has id -1", |j| j["model"]["vocab"]["!"] = json!(-1)),
        ("has id \\\"12\\\"", |j| j["model"]["vocab"]["!"] = json!("12")),
        ("have the same id 13", |j| j["model"]["vocab"]["!"] = json!(13)),
        ("model.merges is missing", |j| j["model"]["merges"] = json!({})),
        ("merges[0] is 7", |j| j["model"]["merges"][0] = json!(7)),
        ("merges[1]", |j| j["model"]["merges"][1] = json!("a b c")),
        ("merges[2]", |j| j["model"]["merges"][2] = json!(["a"])),
        ("merges[3]: \"nothing\" is not", |j| j["model"]["merges"][3] = json!("nothing here")),
        // Both parts are known, their joint is not and is longer than any token: the crate's own reader panics here.
        ("merges[4]: \"<|endoftext|><|endoftext|>\"", |j| {
            j["model"]["merges"][4] = json!(["<|endoftext|>", "<|endoftext|>"]);
        }),
        ("added_tokens[0]", |j| j["added_tokens"][0]["id"] = json!(99)),
        ("is there twice", |j| j["added_tokens"][1] = j["added_tokens"][0].clone()),
        ("has lstrip", |j| j["added_tokens"][2]["lstrip"] = json!(true)),
    ];
    for (wanted, change) in cases {
        let wanted = wanted.replace("\\\"", "\"");
        match load(&changed(change)) {
            Ok(_) => panic!("accepted: {wanted}"),
            Err(error) => assert_refused(&error, &wanted),
        }
    }
}

#[test]
fn files_that_are_not_json_are_refused() {
    let deep = vec![b'['; 1 << 20];
    let huge = vec![b' '; (16 << 20) + 1];
    let cut = &SMALL_JSON[..SMALL_JSON.len() / 2];
    for bytes in [b"" as &[u8], b"{", b"\xff\xfe", b"null", &deep, &huge, cut, b"{\"model\": \"\\ud800\"}"] {
        assert_refused(&load(bytes).err().expect("refused"), "");
    }
}

#[test]
fn an_error_stays_on_one_line_whatever_the_file_says() {
    let json = changed(|j| {
        j["model"]["merges"][0] = json!(["a\nb\r\u{1b}[31m", "x".repeat(5000)]);
    });
    assert_refused(&load(&json).err().expect("refused"), "merges[0]");
}

#[test]
fn merges_written_as_pairs_and_added_tokens_after_the_model_s_are_read() {
    let json = changed(|j| {
        for merge in j["model"]["merges"].as_array_mut().unwrap() {
            *merge = json!(merge.as_str().unwrap().split(' ').collect::<Vec<_>>());
        }
        j["pre_tokenizer"]["pretokenizers"][1].as_object_mut().unwrap().remove("use_regex");
        let token = |id, content, special| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special})
        };
        let added = j["added_tokens"].as_array_mut().unwrap();
        added.extend([token(4096, "<pad>", true), token(4097, "<pad>ding é", false)]);
    });
    let (ours, theirs) = (load(&json).unwrap(), crate_readings(&json));
    assert_eq!(ours.vocab_size(), 4098);
    assert_eq!(ours.token_bytes(4097), Some("<pad>ding é".as_bytes()));
    for text in ["A story<pad>ding é and <pad> more", "<pad><pad>din", "<pad>ding é<|endoftext|>"] {
        assert_encodes_as_the_crate(&ours, &theirs, text);
        let ids = ours.encode(text, true).unwrap();
        assert_eq!(ours.decode(&ids, true), theirs[0].decode(&ids, true).unwrap());
        assert_eq!(ours.decode(&ids, false), text);
    }
}
