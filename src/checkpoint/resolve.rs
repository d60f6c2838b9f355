//! From what the user writes to files: a folder, a `.safetensors` file, or a hub name in the Hugging Face cache.
//!
//! Nothing is downloaded and no file of a model is executed. The cache's layout:
//!
//! ```text
//! <hub>/models--TheBloke--falcon-7b-instruct-GPTQ/refs/main              40 hex digits
//!                                                 snapshots/<hex>/<file> -> ../../blobs/<hash>
//! ```

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::source::{Bytes, Folder, MAX_JSON_BYTES};
use crate::config::{StatedQuant, parse_object};
use crate::error::{Error, Result};

/// The folder a model is in, and the weights file if the user named one.
pub(crate) struct Location {
    pub(crate) folder: Folder,
    pub(crate) weights: Option<String>,
    /// The name that tells what the model is: hub name or last component of the folder.
    pub(crate) name: String,
}

/// Finds the model that `model` names.
pub(crate) fn locate(model: &str) -> Result<Location> {
    let path = Path::new(model);
    match fs::metadata(path) {
        Ok(m) if m.is_dir() => {
            Ok(Location { name: folder_name(path), folder: Folder::Disk(path.to_owned()), weights: None })
        }
        Ok(_) => locate_file(path),
        Err(_) if is_hub_name(model) => locate_in_cache(model, hub_cache(|name| env::var_os(name))),
        Err(e) => Err(Error::model(
            path,
            format_args!(
                "{e}; wanted a folder, a .safetensors file, or a hub name (owner/name) in the local cache"
            ),
        )),
    }
}

fn locate_file(path: &Path) -> Result<Location> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if !(name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")) {
        return Err(Error::model(path, "is not a .safetensors file; wanted one, or the model's folder"));
    }
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    Ok(Location {
        name: folder_name(folder),
        folder: Folder::Disk(folder.to_owned()),
        weights: Some(name.to_owned()),
    })
}

/// Last component of a folder, or the hub name when the folder is a snapshot of the cache.
fn folder_name(folder: &Path) -> String {
    let full = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let last = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match full.parent() {
        Some(snapshots) if snapshots.ends_with("snapshots") => {
            let repository = snapshots.parent().map(last).unwrap_or_default();
            repository.strip_prefix("models--").unwrap_or(&repository).replacen("--", "/", 1)
        }
        _ => last(&full),
    }
}

/// `owner/name` of letters, digits, `.`, `_` and `-`, as the hub allows.
fn is_hub_name(model: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && !p.starts_with('.')
            && p.len() <= 96
            && p.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    model.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

/// The hub cache's folder, by the environment variables of `huggingface_hub` in their order.
fn hub_cache(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let home = || variable("HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let folder = |name: &str| {
        let path = PathBuf::from(variable(name).filter(|v| !v.is_empty())?);
        // `huggingface_hub` expands a leading ~ as well.
        match path.strip_prefix("~") {
            Ok(rest) => Some(home()?.join(rest)),
            Err(_) => Some(path),
        }
    };
    folder("HF_HUB_CACHE")
        .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| folder("HF_HOME").map(|p| p.join("hub")))
        .or_else(|| folder("XDG_CACHE_HOME").map(|p| p.join("huggingface/hub")))
        .or_else(|| home().map(|p| p.join(".cache/huggingface/hub")))
}

/// The snapshot of hub model `name` in the cache.
fn locate_in_cache(name: &str, cache: Option<PathBuf>) -> Result<Location> {
    let absent = |place: &str| {
        Error::model(
            name,
            format_args!("no such folder, and not in {place}; get it with: hf download {name}"),
        )
    };
    let Some(cache) = cache else {
        return Err(absent("the Hugging Face cache (neither HF_HOME nor HOME is set)"));
    };
    let wanted = format!("models--{}", name.replace('/', "--"));
    let repository = if cache.join(&wanted).is_dir() {
        cache.join(&wanted)
    } else {
        // The hub ignores case where a file system does not: one folder that differs in case only is the model.
        let mut others: Vec<String> = folders_in(&cache);
        others.retain(|folder| folder.eq_ignore_ascii_case(&wanted));
        match &others[..] {
            [one] => cache.join(one),
            [] => return Err(absent(&cache.display().to_string())),
            many => {
                let what = format!(
                    "{} fit this name but for case: {}; write one exactly",
                    many.len(),
                    many.join(", ")
                );
                return Err(Error::model(cache, what));
            }
        }
    };
    let folder = snapshot(&repository, name)?;
    Ok(Location { name: folder_name(&folder), folder: Folder::Disk(folder), weights: None })
}

/// The snapshot that `refs/main` names, or the only one.
fn snapshot(repository: &Path, name: &str) -> Result<PathBuf> {
    let reference = repository.join("refs/main");
    let short = fs::metadata(&reference).is_ok_and(|m| m.is_file() && m.len() <= 64);
    if short && let Ok(revision) = fs::read_to_string(&reference) {
        let revision = revision.trim();
        if revision.is_empty() || !revision.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(Error::model(
                reference,
                format_args!("holds {revision:?}, wanted a revision's hex digits"),
            ));
        }
        let folder = repository.join("snapshots").join(revision);
        if folder.is_dir() {
            return Ok(folder);
        }
    }
    let snapshots = repository.join("snapshots");
    match &folders_in(&snapshots)[..] {
        [one] => Ok(snapshots.join(one)),
        [] => {
            Err(Error::model(snapshots, format_args!("holds no snapshot; get it with: hf download {name}")))
        }
        many => {
            let what =
                format!("holds {} snapshots and refs/main names none of them; give one's folder", many.len());
            Err(Error::model(snapshots, what))
        }
    }
}

/// Names of the folders in `folder`, sorted; none when it cannot be listed.
fn folders_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter(|e| e.path().is_dir()).filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

/// The names of the weights files in `folder`, in reading order: one, or the shards of an index.
pub(crate) fn weight_files(
    folder: &Folder,
    named: Option<&str>,
    quant: &StatedQuant,
    warnings: &mut Vec<String>,
) -> Result<Vec<(String, Bytes)>> {
    let file = match named {
        Some(file) => file.to_owned(),
        None => choose_weights(folder, quant, warnings)?,
    };
    let whole = |file: String| match folder.open(&file, usize::MAX)? {
        Some(bytes) => Ok((file, bytes)),
        None => Err(Error::model(folder.path(&file), "is missing")),
    };
    if !file.ends_with(".index.json") {
        return Ok(vec![whole(file)?]);
    }
    let path = folder.path(&file);
    let index = match folder.open(&file, MAX_JSON_BYTES)? {
        Some(bytes) => parse_object(&path, &bytes)?,
        None => return Err(Error::model(path, "is missing")),
    };
    let Some(Value::Object(map)) = index.get("weight_map") else {
        return Err(Error::model(
            path,
            "weight_map is missing or not an object: no index of safetensors shards",
        ));
    };
    let mut shards = Vec::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().unwrap_or_default();
        if !is_plain_name(shard) || !shard.ends_with(".safetensors") {
            let what =
                format!("weight_map: tensor {tensor} is in {shard:?}, wanted a .safetensors file beside it");
            return Err(Error::model(path, what));
        }
        shards.push(shard.to_owned());
    }
    shards.sort_unstable();
    shards.dedup();
    if shards.is_empty() || shards.len() > MAX_SHARDS {
        return Err(Error::model(
            path,
            format_args!("names {} shards, wanted 1 to {MAX_SHARDS}", shards.len()),
        ));
    }
    shards.into_iter().map(whole).collect()
}

/// Most shards of a checkpoint: each one costs a file handle and a map. Falcon-180B has 81.
const MAX_SHARDS: usize = 256;

/// Which file holds the weights: the one the quantisation config names, AutoGPTQ's default names, or the only one.
fn choose_weights(folder: &Folder, quant: &StatedQuant, warnings: &mut Vec<String>) -> Result<String> {
    let mut present = folder.names_ending_in(".safetensors.index.json")?;
    let indexed = !present.is_empty();
    let whole = folder.names_ending_in(".safetensors")?;
    present.extend(whole.iter().cloned());
    let mut bases = Vec::new();
    if let Some(base) = &quant.base_name {
        if !is_plain_name(base) {
            let file = quant.file.clone().unwrap_or_default();
            return Err(Error::model(
                file,
                format_args!("model_file_base_name is {base:?}, wanted a plain file name"),
            ));
        }
        bases.push(base.trim_end_matches(".safetensors").to_owned());
    }
    let group = quant.group_size.flatten().map_or("-1".to_owned(), |g| g.to_string());
    bases.extend([format!("gptq_model-4bit-{group}g"), "model".to_owned()]);
    for base in &bases {
        for file in [format!("{base}.safetensors"), format!("{base}.safetensors.index.json")] {
            if present.contains(&file) {
                if whole.len() > 1 && !file.ends_with("index.json") {
                    warnings.push(format!("{} files end in .safetensors here; {file} is used", whole.len()));
                }
                return Ok(file);
            }
        }
    }
    match &present[..] {
        [one] => Ok(one.clone()),
        [index, ..] if indexed && folder.names_ending_in(".safetensors.index.json")?.len() == 1 => {
            Ok(index.clone())
        }
        [] => Err(Error::model(
            folder.root(),
            "holds no .safetensors file (weights in other formats are not read)",
        )),
        many => {
            let what = format!(
                "holds {} weights files: {}; give one of them as the model",
                many.len(),
                many.join(", ")
            );
            Err(Error::model(folder.root(), what))
        }
    }
}

/// A file name that stays in its folder.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_found_by_the_variables_in_their_order() {
        let all = [
            ("HF_HUB_CACHE", "/a", "/a"),
            ("HF_HOME", "~/b", "/home/u/b/hub"),
            ("XDG_CACHE_HOME", "/c", "/c/huggingface/hub"),
            ("HOME", "/home/u", "/home/u/.cache/huggingface/hub"),
        ];
        for skip in 0..all.len() {
            let set = &all[skip..];
            let found = hub_cache(|name| set.iter().find(|v| v.0 == name).map(|v| OsString::from(v.1)));
            assert_eq!(found.unwrap(), Path::new(set[0].2));
        }
        assert_eq!(hub_cache(|_| None), None);
        assert_eq!(hub_cache(|_| Some(OsString::new())), None);
    }

    #[test]
    fn hub_names_are_told_from_paths() {
        for name in ["TheBloke/falcon-7b-instruct-GPTQ", "a/b"] {
            assert!(is_hub_name(name), "{name}");
        }
        for name in ["/a", "./a", "../a", "a", "a/b/c", "a/", "a/..", "a b/c"] {
            assert!(!is_hub_name(name), "{name}");
        }
    }
}
