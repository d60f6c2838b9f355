//! Variants of the tiny model, written by tests: other dialects, dtypes, groupings, containers, and damaged ones.
//!
//! A [`Model`] is the checkpoint in memory: change its JSON and tensors, then write it to a folder. Use it with
//! `#[path = "common/variants/mod.rs"] mod variants;`. Every change says whether the weights stay the same numbers (then
//! the goldens of `models/tiny-falcon-tales` hold) or not.
// Each test binary uses its part, and a failure in a helper is the test's.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod quantise;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use peregrine::layout::f16_to_f32;
use serde_json::{Map, Value, json};

/// The tiny model's folder in the repository.
pub const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-falcon-tales");
/// The same model quantised asymmetrically.
pub const ASYMMETRIC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/d");
/// The four quantised modules of a layer.
pub const MODULES: [&str; 4] =
    ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"];

/// A folder that is removed when dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> TempDir {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("peregrine-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        TempDir(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn str(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One tensor of a file.
#[derive(Clone)]
pub struct RawTensor {
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A checkpoint in memory.
#[derive(Clone)]
pub struct Model {
    /// `config.json`
    pub config: Value,
    /// `quantize_config.json`; null: not written.
    pub quantize: Value,
    /// Other files by name: `tokenizer.json`, `generation_config.json`.
    pub files: BTreeMap<String, Vec<u8>>,
    pub tensors: BTreeMap<String, RawTensor>,
    /// Name of the weights file without `.safetensors`.
    pub base_name: String,
}

impl Model {
    /// `models/tiny-falcon-tales` as it is.
    pub fn tiny() -> Model {
        Model::read(Path::new(TINY))
    }

    /// A checkpoint whose weights are in `model.safetensors`.
    pub fn read(dir: &Path) -> Model {
        let json = |name: &str| serde_json::from_slice(&fs::read(dir.join(name)).unwrap()).unwrap();
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let raw = |t: safetensors::tensor::TensorView<'_>| RawTensor {
            dtype: ["I32", "F16", "F32"].into_iter().find(|d| *d == t.dtype().to_string()).unwrap(),
            shape: t.shape().to_vec(),
            bytes: t.data().to_vec(),
        };
        Model {
            config: json("config.json"),
            quantize: json("quantize_config.json"),
            files: [("tokenizer.json".to_owned(), fs::read(dir.join("tokenizer.json")).unwrap())].into(),
            tensors: tensors.tensors().into_iter().map(|(name, t)| (name, raw(t))).collect(),
            base_name: "model".to_owned(),
        }
    }

    /// The first `layers` layers and `vocab` rows of the tables, without tokenizer: 0.6 MB a layer. Other weights.
    pub fn cut(mut self, layers: usize, vocab: usize) -> Model {
        self.set("num_hidden_layers", json!(layers));
        self.set("vocab_size", json!(vocab));
        self.files.clear();
        self.tensors.retain(|name, _| {
            let layer = name.strip_prefix("transformer.h.").and_then(|rest| rest.split('.').next());
            layer.is_none_or(|i| i.parse::<usize>().unwrap() < layers)
        });
        for table in ["transformer.word_embeddings.weight", "lm_head.weight"] {
            let t = self.tensors.get_mut(table).unwrap();
            t.bytes.truncate(vocab * t.shape[1] * 2);
            t.shape[0] = vocab;
        }
        self
    }

    /// Sets a key of `config.json`.
    pub fn set(&mut self, key: &str, value: Value) {
        self.config[key] = value;
    }

    /// Sets a key of the quantisation, in both places that state it.
    pub fn set_quant(&mut self, key: &str, value: Value) {
        if self.quantize.is_object() {
            self.quantize[key] = value.clone();
        }
        if let Some(Value::Object(config)) = self.config.get_mut("quantization_config") {
            config.insert(key.to_owned(), value);
        }
    }

    pub fn tensor(&mut self, name: &str) -> &mut RawTensor {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The modules that are quantised, by their full names.
    pub fn modules(&self) -> Vec<String> {
        self.tensors.keys().filter_map(|name| name.strip_suffix(".qweight")).map(str::to_owned).collect()
    }

    /// The first release's dialect of config.json, no quantisation in it, and AutoGPTQ 0.2's file name. Same weights.
    pub fn legacy(mut self) -> Model {
        let config = self.config.as_object_mut().unwrap();
        for (new, old) in [("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head")] {
            let value = config.remove(new).unwrap();
            config.insert(old.to_owned(), value);
        }
        for key in
            ["quantization_config", "num_kv_heads", "new_decoder_architecture", "rope_theta", "rope_scaling"]
        {
            config.remove(key);
        }
        config.remove("max_position_embeddings");
        config.insert("model_type".to_owned(), json!("RefinedWebModel"));
        config.insert("architectures".to_owned(), json!(["RWForCausalLM"]));
        self.quantize = json!({ "bits": 4, "group_size": 64, "damp_percent": 0.01, "desc_act": false });
        self.base_name = "gptq_model-4bit-64g".to_owned();
        self
    }

    /// Tables and norms as F32. Same weights.
    pub fn tables_f32(self) -> Model {
        self.convert_floats("F32", |name| {
            !name.ends_with(".scales") && !name.ends_with(".bias") || is_norm(name)
        })
    }

    /// Tables and norms as BF16: loses 3 bits. Other weights, by 0.4 % at most.
    pub fn tables_bf16(self) -> Model {
        self.convert_floats("BF16", |name| {
            !name.ends_with(".scales") && !name.ends_with(".bias") || is_norm(name)
        })
    }

    fn convert_floats(mut self, dtype: &'static str, which: impl Fn(&str) -> bool) -> Model {
        for (name, t) in self.tensors.iter_mut().filter(|(name, t)| t.dtype == "F16" && which(name)) {
            let values = halves(&t.bytes).into_iter().map(f16_to_f32);
            t.bytes = match dtype {
                "F32" => values.flat_map(f32::to_le_bytes).collect(),
                "BF16" => values.flat_map(|v| bf16(v).to_le_bytes()).collect(),
                other => panic!("no conversion of {name} to {other}"),
            };
            t.dtype = dtype;
        }
        self
    }

    /// Without the biases of the linear layers, which are all zero. Same weights.
    pub fn no_bias(mut self) -> Model {
        self.tensors.retain(|name, _| !name.ends_with(".bias") || is_norm(name));
        self
    }

    /// Without `lm_head`, which is the embedding. Same weights.
    pub fn no_lm_head(mut self) -> Model {
        self.tensors.remove("lm_head.weight");
        self
    }

    /// Zero points as version 2 stores them; labelled so if `label`. Same weights (for symmetric quantisation).
    pub fn v2_zeros(mut self, label: bool) -> Model {
        for name in self.modules() {
            let t = self.tensor(&format!("{name}.qzeros"));
            t.bytes =
                words(&t.bytes).into_iter().flat_map(|w| w.wrapping_add(0x1111_1111).to_le_bytes()).collect();
        }
        if label {
            self.set_quant("checkpoint_format", json!("gptq_v2"));
        }
        self
    }

    /// Groups of 32: every group of 64 becomes two with its scale and zero point. Same weights.
    pub fn group_32(mut self) -> Model {
        for name in self.modules() {
            for part in ["scales", "qzeros"] {
                let t = self.tensor(&format!("{name}.{part}"));
                let row = t.bytes.len() / t.shape[0];
                t.bytes = t.bytes.chunks(row).flat_map(|row| [row, row].concat()).collect();
                t.shape[0] *= 2;
            }
            let t = self.tensor(&format!("{name}.g_idx"));
            let k = t.shape[0];
            t.bytes = (0..k).flat_map(|k| (k as i32 / 32).to_le_bytes()).collect();
        }
        self.set_quant("group_size", json!(32));
        self
    }

    /// Writes everything but the weights.
    pub fn write_json(&self, dir: &Path) {
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        if !self.quantize.is_null() {
            fs::write(dir.join("quantize_config.json"), self.quantize.to_string()).unwrap();
        }
        for (name, bytes) in &self.files {
            fs::write(dir.join(name), bytes).unwrap();
        }
    }

    /// Writes the model to a new folder.
    pub fn write(&self) -> TempDir {
        let dir = TempDir::new();
        self.write_json(dir.path());
        let weights = serialize(self.tensors.iter());
        fs::write(dir.path().join(format!("{}.safetensors", self.base_name)), weights).unwrap();
        dir
    }

    /// Writes the model to a new folder, its tensors dealt to `count` shards with an index.
    pub fn write_shards(&self, count: usize) -> TempDir {
        let dir = TempDir::new();
        self.write_json(dir.path());
        let mut map = Map::new();
        for shard in 0..count {
            let name = format!("{}-{:05}-of-{count:05}.safetensors", self.base_name, shard + 1);
            let mine = || self.tensors.iter().enumerate().filter(|(i, _)| i % count == shard).map(|(_, t)| t);
            map.extend(mine().map(|(tensor, _)| (tensor.clone(), json!(name))));
            fs::write(dir.path().join(name), serialize(mine())).unwrap();
        }
        let index = json!({ "metadata": { "total_size": 0 }, "weight_map": map });
        let name = format!("{}.safetensors.index.json", self.base_name);
        fs::write(dir.path().join(name), index.to_string()).unwrap();
        dir
    }
}

/// The header of `tensors`, in the order given.
pub fn header<'a>(tensors: impl Iterator<Item = (&'a String, &'a RawTensor)>) -> Map<String, Value> {
    let mut end = 0;
    let mut map = Map::new();
    for (name, t) in tensors {
        let start = end;
        end += t.bytes.len();
        let entry = json!({ "dtype": t.dtype, "shape": t.shape, "data_offsets": [start, end] });
        map.insert(name.clone(), entry);
    }
    map
}

/// A safetensors file of `tensors`.
pub fn serialize<'a>(tensors: impl Iterator<Item = (&'a String, &'a RawTensor)> + Clone) -> Vec<u8> {
    let header = Value::Object(header(tensors.clone())).to_string();
    let data: Vec<u8> = tensors.flat_map(|(_, t)| t.bytes.iter().copied()).collect();
    with_header(&header, &data)
}

/// A safetensors file with just this header, right or wrong. Not padded: the tensors are unaligned more often than not.
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn is_norm(name: &str) -> bool {
    name.contains("layernorm") || name.contains("ln_f")
}

fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

pub fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

pub fn halves(bytes: &[u8]) -> Vec<u16> {
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes(b.try_into().unwrap())).collect()
}
