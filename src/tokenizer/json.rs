//! Reads `tokenizer.json` and proves everything the rest relies on.
//!
//! The file comes from strangers, and the `tokenizers` crate's own reader trusts it: merges that are not in the
//! vocabulary can make it panic, regular expressions from the file are executed, and a truncation rule in the
//! file cuts prompts silently. So the file is checked here, against the one pipeline that Falcon has, and the
//! crate is then given checked parts only. Anything else is refused by name.
//!
//! Limits: 16 MiB of JSON (Falcon's has 2.7 MB), 1024 added tokens (Falcon has 12). Ids are dense: 0, 1, 2, ...
//! Memory: the JSON tree, at most some 16 times the file.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Bounds the memory a hostile file can make us take.
const MAX_FILE_BYTES: usize = 16 << 20;
/// Every added token is tried at every character of a text.
const MAX_ADDED_TOKENS: usize = 1024;

/// The checks say what is wrong; [`parse`] adds which file.
type Checked<T> = std::result::Result<T, String>;

/// A token that is looked for in the text before anything else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddedToken {
    pub(super) id: u32,
    pub(super) content: String,
    /// Skipped when decoding, and plain text when a user writes it.
    pub(super) special: bool,
}

/// A checked `tokenizer.json`.
#[derive(Debug)]
pub(super) struct Definition {
    /// The token of each id, byte-mapped; added tokens that the model does not know come last.
    pub(super) tokens: Vec<String>,
    /// How many of `tokens` belong to the BPE model.
    pub(super) model_len: usize,
    /// By rank. Both parts and their joint are in the model's vocabulary.
    pub(super) merges: Vec<(String, String)>,
    /// In the order of the file.
    pub(super) added: Vec<AddedToken>,
}

/// Reads and checks the contents of `file`.
pub(super) fn parse(bytes: &[u8], file: &Path) -> Result<Definition> {
    parse_checked(bytes).map_err(|what| Error::model(file, what))
}

fn parse_checked(bytes: &[u8]) -> Checked<Definition> {
    if bytes.len() > MAX_FILE_BYTES {
        return Err(format!("{} bytes; a tokenizer has at most {MAX_FILE_BYTES}", bytes.len()));
    }
    let root: Value = serde_json::from_slice(bytes).map_err(|e| format!("not JSON: {e}"))?;
    let root = root.as_object().ok_or("got JSON that is not an object, wanted a Hugging Face tokenizer")?;
    check_pipeline(root)?;
    let model =
        root.get("model").and_then(Value::as_object).ok_or("\"model\" is missing or not an object")?;
    check_model(model)?;
    let mut tokens = vocabulary(model)?;
    let model_len = tokens.len();
    let (added, merges) = {
        let ids: HashMap<&str, u32> = (0u32..).zip(&tokens).map(|(id, token)| (token.as_str(), id)).collect();
        (added_tokens(root, &ids)?, merges(model, &ids)?)
    };
    tokens.extend(added.iter().filter(|t| t.id as usize >= model_len).map(|t| t.content.clone()));
    Ok(Definition { tokens, model_len, merges, added })
}

/// Everything around the model must be Falcon's: no normaliser, the four pre-tokenizer steps, byte-level decoder.
fn check_pipeline(root: &Map<String, Value>) -> Checked<()> {
    if let Some(version) = root.get("version").filter(|v| **v != "1.0") {
        return Err(format!("version {version}, wanted \"1.0\""));
    }
    if let Some(normalizer) = root.get("normalizer").filter(|v| !v.is_null()) {
        return Err(format!("normalizer {}; Falcon's tokenizer has none", kind(normalizer)));
    }
    // A byte-level post-processor only moves offsets, which nobody reads here.
    if let Some(post) = root.get("post_processor").filter(|v| !v.is_null() && kind(v) != "ByteLevel") {
        return Err(format!("post_processor {}; Falcon's tokenizer has none", kind(post)));
    }
    let decoder = root.get("decoder").map_or("null", kind);
    if decoder != "ByteLevel" {
        return Err(format!("decoder {decoder}, wanted ByteLevel"));
    }
    check_pre_tokenizer(root.get("pre_tokenizer").unwrap_or(&Value::Null))
}

fn check_pre_tokenizer(found: &Value) -> Checked<()> {
    let steps = found.get("pretokenizers").and_then(Value::as_array).filter(|_| kind(found) == "Sequence");
    let steps = steps.ok_or_else(|| format!("pre_tokenizer {}, wanted Falcon's Sequence", kind(found)))?;
    let wanted = [
        json!({"type": "Punctuation", "behavior": "Contiguous"}),
        json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}),
        json!({"type": "Digits", "individual_digits": false}),
        json!({"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": false}),
    ];
    if steps.len() != wanted.len() {
        return Err(format!("pre_tokenizer of {} steps, wanted Falcon's {}", steps.len(), wanted.len()));
    }
    for (i, (step, wanted)) in steps.iter().zip(&wanted).enumerate() {
        let mut step = step.clone();
        if let Some(step) = step.as_object_mut() {
            step.remove("trim_offsets"); // moves offsets only
            if wanted.get("use_regex").is_some() {
                step.entry("use_regex").or_insert(Value::Bool(true)); // files of 2022 do not have it
            }
        }
        if step != *wanted {
            return Err(format!("pre_tokenizer step {i} is {step}, wanted {wanted}"));
        }
    }
    Ok(())
}

/// The `type` of a component, for messages.
fn kind(component: &Value) -> &str {
    match component.get("type").and_then(Value::as_str) {
        Some(kind) => kind,
        None if component.is_null() => "null",
        None => "without a type",
    }
}

fn check_model(model: &Map<String, Value>) -> Checked<()> {
    if let Some(kind) = model.get("type").filter(|v| **v != "BPE") {
        return Err(format!("model.type {kind}, wanted \"BPE\""));
    }
    let options = [
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    ];
    for option in options {
        let off = |v: &Value| v.is_null() || *v == false || *v == "" || *v == 0.0;
        if let Some(value) = model.get(option).filter(|v| !off(v)) {
            return Err(format!("model.{option} is {value}; Falcon's tokenizer does not use it"));
        }
    }
    Ok(())
}

/// The token of each id. A token named twice leaves a gap, so dense ids prove that there is none.
fn vocabulary(model: &Map<String, Value>) -> Checked<Vec<String>> {
    let vocab =
        model.get("vocab").and_then(Value::as_object).ok_or("model.vocab is missing or not an object")?;
    if vocab.is_empty() {
        return Err("model.vocab is empty".into());
    }
    let mut tokens: Vec<Option<&str>> = vec![None; vocab.len()];
    for (token, id) in vocab {
        let slot = id.as_u64().and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
        let slot = slot.ok_or_else(|| {
            format!(
                "model.vocab: token {token:?} has id {id}, wanted one below {} (ids without gaps)",
                vocab.len()
            )
        })?;
        if let Some(other) = slot.replace(token) {
            return Err(format!("model.vocab: tokens {other:?} and {token:?} have the same id {id}"));
        }
    }
    Ok(tokens.into_iter().flatten().map(str::to_owned).collect())
}

/// Merges are written "a b", or ["a", "b"] by newer versions.
fn merges(model: &Map<String, Value>, ids: &HashMap<&str, u32>) -> Checked<Vec<(String, String)>> {
    let merges =
        model.get("merges").and_then(Value::as_array).ok_or("model.merges is missing or not a list")?;
    let mut checked = Vec::with_capacity(merges.len());
    let mut joined = String::new();
    for (rank, merge) in merges.iter().enumerate() {
        let pair = match merge {
            Value::String(line) => line.split_once(' ').filter(|(_, b)| !b.contains(' ')),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(a), Value::String(b)] => Some((a.as_str(), b.as_str())),
                _ => None,
            },
            _ => None,
        };
        let (a, b) = pair.ok_or_else(|| format!("model.merges[{rank}] is {merge}, wanted two tokens"))?;
        joined.clear();
        joined.push_str(a);
        joined.push_str(b);
        for token in [a, b, &joined] {
            if !ids.contains_key(token) {
                return Err(format!("model.merges[{rank}]: {token:?} is not in model.vocab"));
            }
        }
        checked.push((a.to_owned(), b.to_owned()));
    }
    Ok(checked)
}

/// Added tokens carry the id the model gives them, or continue after the model's.
fn added_tokens(root: &Map<String, Value>, ids: &HashMap<&str, u32>) -> Checked<Vec<AddedToken>> {
    let list = match root.get("added_tokens") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(list) => list.as_array().ok_or("added_tokens is not a list")?,
    };
    if list.len() > MAX_ADDED_TOKENS {
        return Err(format!("{} added_tokens; this engine takes at most {MAX_ADDED_TOKENS}", list.len()));
    }
    let mut added: Vec<AddedToken> = Vec::with_capacity(list.len());
    let mut next_id = ids.len() as u64;
    for (i, entry) in list.iter().enumerate() {
        let content = entry.get("content").and_then(Value::as_str).filter(|c| !c.is_empty());
        let content = content.ok_or_else(|| format!("added_tokens[{i}] has no content"))?;
        let wanted = ids.get(content).copied().map_or(next_id, u64::from);
        let id = entry.get("id").unwrap_or(&Value::Null);
        if id.as_u64() != Some(wanted) {
            return Err(format!("added_tokens[{i}] {content:?} has id {id}, wanted {wanted}"));
        }
        if added.iter().any(|t| t.content == content) {
            return Err(format!("added_tokens[{i}] {content:?} is there twice"));
        }
        for flag in ["single_word", "lstrip", "rstrip"] {
            if entry.get(flag).is_some_and(|v| *v != false) {
                return Err(format!("added_tokens[{i}] {content:?} has {flag}; Falcon's tokens do not"));
            }
        }
        next_id += u64::from(wanted == next_id);
        let special = entry.get("special").is_some_and(|v| *v == true);
        added.push(AddedToken { id: wanted as u32, content: content.to_owned(), special });
    }
    Ok(added)
}
