//! Writes a random checkpoint in AutoGPTQ's format: Falcon-7B's exact shape without Falcon-7B's weights.
//!
//! For measuring speed and comparing implementations on machines that do not have the real files. The weights are
//! seeded and scaled so that activations stay sane: with K inputs of unit size a matrix gives outputs of the size
//! named in `GAINS`, the residual stream grows to about 2.5 over 32 layers, and logits have a
//! spread of 2.5. The text is noise; there is no tokenizer.
//!
//! Cost: 4.8 GB for Falcon-7B (5.9 GB with F32 tables), written by several threads as fast as the disk takes it. The
//! memory is one chunk of 4 MiB a thread. The same shape, options and seed give the same file on every machine.

use std::f64::consts::TAU;
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

/// Bytes one thread generates and writes at a time. Part of what the seed means: every chunk has its own random numbers.
const CHUNK_BYTES: usize = 4 << 20;
/// The disk is the limit beyond this.
const MAX_THREADS: usize = 16;
/// Standard deviation of `code - 8`: see [`random_codes`].
const CODE_SPREAD: f64 = 3.28;
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
/// Values a float tensor is drawn from; a power of two.
const TABLE_LEN: usize = 4096;

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

/// How a tensor's bytes are made.
#[derive(Debug)]
enum Fill {
    /// Random codes around 8.
    Codes,
    /// One word over and over.
    Word(u32),
    /// Zero points 6 to 10, stored minus one.
    ZeroPoints,
    /// `g_idx`: k / group, or with act-order a shuffle of that.
    GroupIndex { group_size: usize, shuffled: bool },
    /// Random values of a table of encoded ones.
    Halves(Vec<u16>),
    /// The same in single precision.
    Singles(Vec<f32>),
}

/// One tensor to be written.
struct Plan {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
    fill: Fill,
}

/// Writes `config.json`, `quantize_config.json` and `model.safetensors` into `dir`, which is made if it is not there.
///
/// Gives the bytes of `model.safetensors`. `progress` is called with the bytes written and their total, perhaps from
/// other threads, never at the same time.
///
/// # Errors
/// [`Error::Usage`] for sizes this engine does not run and when `dir` has a model already; [`Error::Io`] when writing
/// fails. An unfinished file has no header, so it cannot be taken for a model.
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
    write_weights(&weights, &plans(shape, options), options.seed, progress)
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
        let values = normal_table(mean, spread);
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
    for table in ["transformer.word_embeddings.weight", "lm_head.weight"] {
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
    let work = || {
        let mut buffer = Vec::with_capacity(CHUNK_BYTES);
        while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            buffer.resize(chunk.len, 0);
            fill(&plans[chunk.plan], chunk.number, seed, &mut buffer);
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
            scope.spawn(work);
        }
    });
    if let Some(error) = state.into_inner().ok().and_then(|state| state.1) {
        return Err(error);
    }
    // Last, so that an unfinished file is none: without it the length field is zero.
    file.write_all_at(&header, 0).map_err(fail)?;
    Ok(total)
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

/// Makes chunk `number` of a tensor.
fn fill(plan: &Plan, number: usize, seed: u64, buffer: &mut [u8]) {
    // lm_head repeats the embedding, as in the real checkpoint.
    let name = if plan.name == "lm_head.weight" { "transformer.word_embeddings.weight" } else { &plan.name };
    let mut random = Random::new(seed, name, number);
    match &plan.fill {
        Fill::Codes => fill_words(buffer, || random_codes(&mut random)),
        Fill::Word(word) => fill_words(buffer, || u64::from(*word) << 32 | u64::from(*word)),
        Fill::ZeroPoints => fill_words(buffer, || {
            let (a, b) = (random.next(), random.next());
            (a & 0x3333_3333_3333_3333) + (b & 0x1111_1111_1111_1111) + 0x5555_5555_5555_5555
        }),
        Fill::GroupIndex { group_size, shuffled } => {
            let mut inputs: Vec<usize> = (0..buffer.len() / 4).collect();
            if *shuffled {
                random.shuffle(&mut inputs);
            }
            for (place, input) in inputs.into_iter().enumerate() {
                let group = (place / group_size) as i32;
                buffer[4 * input..4 * input + 4].copy_from_slice(&group.to_le_bytes());
            }
        }
        Fill::Halves(table) => {
            for values in buffer.chunks_mut(8) {
                let draw = random.next();
                for (i, value) in values.chunks_exact_mut(2).enumerate() {
                    value.copy_from_slice(&table[(draw >> (16 * i)) as usize % TABLE_LEN].to_le_bytes());
                }
            }
        }
        Fill::Singles(table) => {
            for values in buffer.chunks_mut(16) {
                let draw = random.next();
                for (i, value) in values.chunks_exact_mut(4).enumerate() {
                    value.copy_from_slice(&table[(draw >> (16 * i)) as usize % TABLE_LEN].to_le_bytes());
                }
            }
        }
    }
}

/// Fills with 8-byte words; a shorter rest gets the head of one.
fn fill_words(buffer: &mut [u8], mut word: impl FnMut() -> u64) {
    for bytes in buffer.chunks_mut(8) {
        bytes.copy_from_slice(&word().to_le_bytes()[..bytes.len()]);
    }
}

/// Sixteen codes: 1 to 15 in a triangle around 8 (two numbers of 3 bits, plus 1), and one in 256 is 0, so that every
/// code occurs. Standard deviation 3.28. Uniform codes would have a mean of 7.5, which adds up over GELU's positive
/// outputs.
fn random_codes(random: &mut Random) -> u64 {
    let (a, b) = (random.next(), random.next());
    let codes = (a & 0x7777_7777_7777_7777) + (b & 0x7777_7777_7777_7777) + 0x1111_1111_1111_1111;
    // The fourth bit of every nibble is still unused; eight of them say whether a code becomes 0.
    let rare = [a, b].into_iter().fold(0x8888_8888_8888_8888, |rare, r| {
        rare & r & r.rotate_left(4) & r.rotate_left(8) & r.rotate_left(12)
    });
    codes & !((rare >> 3) * 15)
}

/// Half-precision values of a normal distribution, in pairs around the mean, so that it is exact.
fn normal_table(mean: f64, spread: f64) -> Vec<u16> {
    let mut random = Random::new(0, "normal", 0);
    let mut uniform = || (random.next() >> 11) as f64 * (0.5f64).powi(53);
    let pairs = (0..TABLE_LEN / 2).map(|_| (-2.0 * (1.0 - uniform()).ln()).sqrt() * (TAU * uniform()).cos());
    pairs.flat_map(|z| [z, -z]).map(|z| f32_to_f16((mean + spread * z) as f32)).collect()
}

/// splitmix64, started from seed, tensor name and chunk: a chunk needs nothing of the one before it.
struct Random(u64);

impl Random {
    fn new(seed: u64, name: &str, chunk: usize) -> Random {
        // FNV-1a of the name, so that a tensor's numbers do not depend on how many others there are.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let mut random = Random(seed);
        random.0 = random.next() ^ hash;
        random.0 = random.next() ^ chunk as u64;
        random.next();
        random
    }

    #[inline]
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Fisher and Yates. The remainder's bias is below 2^-49 for the 18176 inputs of a matrix.
    fn shuffle(&mut self, items: &mut [usize]) {
        for last in (1..items.len()).rev() {
            items.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
    }
}

/// Bytes of `model.safetensors` that [`synth`] would write.
#[must_use]
pub fn synth_bytes(shape: SynthShape, options: &SynthOptions) -> u64 {
    let shape = SynthShape { num_layers: options.layers.unwrap_or(shape.num_layers), ..shape };
    let plans = plans(shape, options);
    (header(&plans).len() + plans.iter().map(|p| p.bytes).sum::<usize>()) as u64
}
