//! Writes a random checkpoint in AutoGPTQ's format: Falcon-7B's exact shape without Falcon-7B's weights.
//!
//! For measuring speed and comparing implementations on machines that do not have the real files. The weights are
//! seeded and scaled so that activations stay sane: with K inputs of unit size a matrix gives outputs of the size
//! named in `GAINS`, the residual stream grows to about 2.5 over 32 layers, and logits have a
//! spread of 2.5. The text is noise; there is no tokenizer.
//!
//! Cost: 4.8 GB for Falcon-7B (5.9 GB with F32 tables), written by several threads as fast as the disk takes it. The
//! memory is one chunk of 4 MiB a thread. The same shape, options and seed give the same file on every machine.

mod fill;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::{Map, Value, json};

use crate::checkpoint::FloatType;
use crate::error::{Error, Result};
use crate::layout::{HEAD_DIM, UNIT_INPUTS, UNIT_ROWS, f16_to_f32, f32_to_f16};
use fill::{CODE_SPREAD, Fill, Random, TABLE_LEN, fill, normal_table, to_bf16};

/// Bytes one thread generates and writes at a time. Part of what the seed means: every chunk has its own random numbers.
const CHUNK_BYTES: usize = 4 << 20;
/// The disk is the limit beyond this.
const MAX_THREADS: usize = 16;
/// Standard deviation of the logits: LayerNorm's outputs have unit size, so a table row of h values needs this / sqrt(h).
const LOGIT_SPREAD: f64 = 2.5;
/// Module, and the size of its outputs for inputs of unit size. 1.7 gives attention scores a spread of 1.7^2, so that
/// heads look at a few positions and not at all of them. Attention mixes positions and adds what they have in common;
/// its share is small (0.1) beside the MLP's (0.4 of GELU's 0.65), or all positions would end with the same logits.
const GAINS: [(&str, f64); 4] = [
    ("self_attention.query_key_value", 1.7),
    ("self_attention.dense", 0.1),
    ("mlp.dense_h_to_4h", 1.0),
    ("mlp.dense_4h_to_h", 0.4),
];
const EMBEDDING: &str = "transformer.word_embeddings.weight";
const LM_HEAD: &str = "lm_head.weight";

/// The sizes of a model. Query heads: `hidden_size / 64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SynthShape {
    /// Width of the residual stream, a multiple of 64.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Width of the MLP, a multiple of 64.
    pub ffn_size: usize,
    /// Rows of the embedding, a multiple of 16.
    pub vocab_size: usize,
}

impl SynthShape {
    /// Falcon-7B: 32 layers of 4544, MLP 18176, vocabulary 65024.
    pub const FALCON_7B: SynthShape =
        SynthShape { hidden_size: 4544, num_layers: 32, ffn_size: 18176, vocab_size: 65024 };
    /// For tests: 2 layers of 320, MLP 1280, vocabulary 512; 1.5 MB.
    pub const TINY: SynthShape =
        SynthShape { hidden_size: 320, num_layers: 2, ffn_size: 1280, vocab_size: 512 };

    /// `falcon-7b` or `tiny`.
    #[must_use]
    pub fn named(name: &str) -> Option<SynthShape> {
        match name {
            "falcon-7b" => Some(Self::FALCON_7B),
            "tiny" => Some(Self::TINY),
            _ => None,
        }
    }
}

/// How a synthetic checkpoint is stored. The default is how the real one is believed to be, with F16 tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SynthOptions {
    /// Seed of all random numbers.
    pub seed: u64,
    /// Layers, if not the shape's.
    pub layers: Option<usize>,
    /// Inputs per group: 32 or a multiple of 64; `None` is -1.
    pub group_size: Option<usize>,
    /// Every zero point 8; otherwise 6 to 10.
    pub sym: bool,
    /// Groups assigned to inputs in a random order.
    pub act_order: bool,
    /// Type of tables and norms: F16 or F32 (which then holds F16's values).
    pub tables: FloatType,
}

impl Default for SynthOptions {
    fn default() -> Self {
        let tables = FloatType::F16;
        SynthOptions { seed: 0, layers: None, group_size: Some(64), sym: true, act_order: false, tables }
    }
}

/// One tensor to be written.
struct Plan {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
    fill: Fill,
}

/// The weights' name until they are finished.
pub const PART: &str = "model.safetensors.part";

/// Writes `config.json`, `quantize_config.json` and `model.safetensors` into `dir`, which is made if it is not there.
///
/// Gives the bytes of `model.safetensors`. `progress` is called with the bytes written and their total, perhaps from
/// other threads, never at the same time.
///
/// # Errors
/// [`Error::Usage`] for sizes this engine does not run and when `dir` has a model already; [`Error::Io`] when writing
/// fails. The weights have their name only when they are finished; until then they are [`PART`], which the next attempt overwrites.
pub fn synth(
    shape: SynthShape,
    dir: &Path,
    options: &SynthOptions,
    progress: Option<fn(done_bytes: u64, total_bytes: u64)>,
) -> Result<u64> {
    let shape = SynthShape { num_layers: options.layers.unwrap_or(shape.num_layers), ..shape };
    check(shape, options)?;
    let weights = dir.join("model.safetensors");
    if weights.exists() {
        return Err(Error::Usage(format!("synth: {} exists; give another folder", weights.display())));
    }
    fs::create_dir_all(dir).map_err(|e| Error::Io(format!("synth: cannot make {}: {e}", dir.display())))?;
    let (config, quantize) = configs(shape, options);
    write_json(&dir.join("config.json"), &config)?;
    write_json(&dir.join("quantize_config.json"), &quantize)?;
    let part = dir.join(PART);
    let bytes = write_weights(&part, &plans(shape, options), options.seed, progress)?;
    let fail = |e| Error::Io(format!("synth: cannot name {}: {e}", weights.display()));
    fs::rename(&part, &weights).map_err(fail)?;
    Ok(bytes)
}

fn check(shape: SynthShape, options: &SynthOptions) -> Result<()> {
    let wrong = |what: String| Err(Error::Usage(format!("synth: {what}")));
    for (name, value, unit) in [
        ("hidden_size", shape.hidden_size, HEAD_DIM),
        ("ffn_size", shape.ffn_size, UNIT_INPUTS),
        ("vocab_size", shape.vocab_size, UNIT_ROWS),
        ("layers", shape.num_layers, 1),
    ] {
        if value == 0 || !value.is_multiple_of(unit) {
            return wrong(format!("{name} is {value}, wanted a multiple of {unit} above 0"));
        }
    }
    match options.group_size {
        Some(size) if size != 32 && (size == 0 || !size.is_multiple_of(UNIT_INPUTS)) => {
            return wrong(format!("group size is {size}, wanted 32, a multiple of {UNIT_INPUTS}, or -1"));
        }
        _ => {}
    }
    if options.tables == FloatType::BF16 {
        return wrong("tables are BF16, wanted F16 or F32".to_owned());
    }
    Ok(())
}

fn configs(shape: SynthShape, options: &SynthOptions) -> (Value, Value) {
    let mut quantize = json!({
        "bits": 4, "group_size": options.group_size.map_or(json!(-1), |g| json!(g)), "damp_percent": 0.01,
        "desc_act": options.act_order, "static_groups": false, "sym": options.sym, "true_sequential": true,
        "model_name_or_path": null, "model_file_base_name": "model", "is_marlin_format": false, "quant_method": "gptq",
    });
    let heads = shape.hidden_size / HEAD_DIM;
    let config = json!({
        "model_type": "falcon", "architectures": ["FalconForCausalLM"], "_name_or_path": "peregrine-synth",
        "hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_layers, "num_attention_heads": heads,
        "num_kv_heads": heads, "ffn_hidden_size": shape.ffn_size, "vocab_size": shape.vocab_size,
        "multi_query": true, "parallel_attn": true, "new_decoder_architecture": false, "alibi": false, "bias": false,
        "layer_norm_epsilon": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048, "activation": "gelu",
        "bos_token_id": 11, "eos_token_id": 11, "tie_word_embeddings": true, "torch_dtype": "float16",
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "initializer_range": 0.02, "use_cache": true,
        "quantization_config": quantize.clone(),
    });
    // What a reader sees first says what this file is.
    quantize["comment"] = json!("random weights, made by peregrine synth");
    (config, quantize)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = format!("{value:#}\n");
    fs::write(path, text).map_err(|e| Error::Io(format!("synth: cannot write {}: {e}", path.display())))
}

/// All tensors in AutoGPTQ's order: 4-byte types first, then by name.
fn plans(shape: SynthShape, options: &SynthOptions) -> Vec<Plan> {
    let SynthShape { hidden_size: hidden, ffn_size: ffn, vocab_size: vocab, .. } = shape;
    let mut all = Vec::new();
    let float = |name: String, shape: Vec<usize>, mean: f64, spread: f64| {
        let mut values = normal_table(mean, spread);
        if shape.len() == 2 {
            values.iter_mut().for_each(|v| *v = to_bf16(*v));
        }
        match options.tables {
            FloatType::F32 => {
                plan(name, "F32", shape, Fill::Singles(values.iter().map(|&v| f16_to_f32(v)).collect()))
            }
            _ => plan(name, "F16", shape, Fill::Halves(values)),
        }
    };
    for layer in 0..shape.num_layers {
        let name = |part: &str| format!("transformer.h.{layer}.{part}");
        all.push(float(name("input_layernorm.weight"), vec![hidden], 1.0, 0.1));
        all.push(float(name("input_layernorm.bias"), vec![hidden], 0.0, 0.02));
        let sizes = [[hidden, hidden + 2 * HEAD_DIM], [hidden, hidden], [hidden, ffn], [ffn, hidden]];
        for ((module, gain), k_n) in GAINS.into_iter().zip(sizes) {
            all.extend(matrix_plans(&name(module), k_n, gain, options));
        }
    }
    let table_spread = LOGIT_SPREAD / (hidden as f64).sqrt();
    for table in [EMBEDDING, LM_HEAD] {
        all.push(float(table.to_owned(), vec![vocab, hidden], 0.0, table_spread));
    }
    all.push(float("transformer.ln_f.weight".to_owned(), vec![hidden], 1.0, 0.1));
    all.push(float("transformer.ln_f.bias".to_owned(), vec![hidden], 0.0, 0.02));
    all.sort_by(|a, b| (a.dtype == "F16", &a.name).cmp(&(b.dtype == "F16", &b.name)));
    all
}

/// The five tensors of a quantised matrix of k inputs and n outputs.
fn matrix_plans(name: &str, [k, n]: [usize; 2], gain: f64, options: &SynthOptions) -> [Plan; 5] {
    let group_size = options.group_size.map_or(k, |size| size.min(k));
    let groups = k.div_ceil(group_size);
    let scale = gain / (k as f64).sqrt() / CODE_SPREAD;
    // Scales differ from group to group, by a factor of 0.7 to 1.3.
    let scales =
        (0..TABLE_LEN).map(|i| f32_to_f16((scale * (0.7 + 0.6 * i as f64 / TABLE_LEN as f64)) as f32));
    let zeros = if options.sym { Fill::Word(0x7777_7777) } else { Fill::ZeroPoints };
    let part = |part: &str, dtype, shape, fill| plan(format!("{name}.{part}"), dtype, shape, fill);
    [
        part("qweight", "I32", vec![k / 8, n], Fill::Codes),
        part("qzeros", "I32", vec![groups, n / 8], zeros),
        part("scales", "F16", vec![groups, n], Fill::Halves(scales.collect())),
        part("g_idx", "I32", vec![k], Fill::GroupIndex { group_size, shuffled: options.act_order }),
        part("bias", "F16", vec![n], Fill::Word(0)),
    ]
}

fn plan(name: String, dtype: &'static str, shape: Vec<usize>, fill: Fill) -> Plan {
    let bytes = shape.iter().product::<usize>() * if dtype == "F16" { 2 } else { 4 };
    Plan { name, dtype, shape, bytes, fill }
}

/// Writes the tensors in parallel, then the header.
fn write_weights(path: &Path, plans: &[Plan], seed: u64, progress: Option<fn(u64, u64)>) -> Result<u64> {
    let header = header(plans);
    let total = (header.len() + plans.iter().map(|p| p.bytes).sum::<usize>()) as u64;
    let fail = |e: std::io::Error| Error::Io(format!("synth: cannot write {}: {e}", path.display()));
    let file = File::create(path).map_err(fail)?;
    file.set_len(total).map_err(fail)?;
    let chunks = chunks(plans, header.len() as u64);
    let next = AtomicUsize::new(0);
    let state = Mutex::new((0u64, None));
    let write = || {
        let mut buffer = Vec::with_capacity(CHUNK_BYTES);
        while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            buffer.resize(chunk.len, 0);
            let plan = &plans[chunk.plan];
            fill(&plan.fill, &mut Random::new(seed, &original(&plan.name), chunk.number), &mut buffer);
            let written = file.write_all_at(&buffer, chunk.offset);
            // A poisoned lock means another thread panicked; its panic is passed on when it is joined.
            let Ok(mut state) = state.lock() else { return };
            if let Err(e) = written {
                state.1 = Some(fail(e));
                next.store(chunks.len(), Ordering::Relaxed);
                return;
            }
            state.0 += chunk.len as u64;
            if let Some(progress) = progress {
                progress(state.0, total);
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(write);
        }
    });
    if let Some(error) = state.into_inner().ok().and_then(|state| state.1) {
        return Err(error);
    }
    file.write_all_at(&header, 0).map_err(fail)?;
    Ok(total)
}

/// The tensor whose values this one repeats; itself, if it repeats none. lm_head is the embedding, as in the real checkpoint. Both
/// matrices that see the norm's output have one order: AutoGPTQ sorts inputs by what it sees of them.
fn original(name: &str) -> String {
    match name.strip_suffix("mlp.dense_h_to_4h.g_idx") {
        Some(layer) => format!("{layer}self_attention.query_key_value.g_idx"),
        None if name == LM_HEAD => EMBEDDING.to_owned(),
        None => name.to_owned(),
    }
}

/// The container's length field and header, padded so that the data is aligned to 8 bytes.
fn header(plans: &[Plan]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut end = 0;
    for plan in plans {
        let start = end;
        end += plan.bytes;
        let entry = json!({ "dtype": plan.dtype, "shape": plan.shape, "data_offsets": [start, end] });
        map.insert(plan.name.clone(), entry);
    }
    let mut text = Value::Object(map).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A piece of a tensor.
struct Chunk {
    /// Index of its tensor.
    plan: usize,
    /// Its number within the tensor.
    number: usize,
    /// Bytes from the start of the file.
    offset: u64,
    len: usize,
}

fn chunks(plans: &[Plan], data_start: u64) -> Vec<Chunk> {
    let mut all = Vec::new();
    let mut offset = data_start;
    for (index, plan) in plans.iter().enumerate() {
        for number in 0..plan.bytes.div_ceil(CHUNK_BYTES) {
            let len = CHUNK_BYTES.min(plan.bytes - number * CHUNK_BYTES);
            all.push(Chunk { plan: index, number, offset, len });
            offset += len as u64;
        }
    }
    all
}

/// Bytes of `model.safetensors` that [`synth`] would write.
#[must_use]
pub fn synth_bytes(shape: SynthShape, options: &SynthOptions) -> u64 {
    let shape = SynthShape { num_layers: options.layers.unwrap_or(shape.num_layers), ..shape };
    let plans = plans(shape, options);
    (header(&plans).len() + plans.iter().map(|p| p.bytes).sum::<usize>()) as u64
}
