//! What a checkpoint holds and what it will cost: architecture, quantisation, tensors, bytes, memory.
//!
//! Needs no GPU. The memory plan follows from the unit layout: a matrix of n outputs and k inputs is n/16 x k/64 units,
//! each 512 bytes of codes, 32 of scales (64 with groups of 32), and as much again of zero points unless they are all 8.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, GptqTensor};
use crate::config::{ModelConfig, QuantConfig};
use crate::error::one_line;
use crate::layout::{HEAD_DIM, PIECE_BYTES, UNIT_CODE_BYTES, UNIT_INPUTS, UNIT_ROWS};

/// Bytes of an f16.
const HALF: u64 = 2;
/// Bytes of an f32.
const SINGLE: u64 = 4;

/// Tensors of the same name but for the layer, of one dtype and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorGroup {
    /// `transformer.h.*.self_attention.dense.qweight`
    pub name: String,
    /// safetensors' word for the type.
    pub dtype: String,
    /// Dimensions of each.
    pub shape: Vec<usize>,
    /// How many there are.
    pub count: usize,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// Bytes on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Quantised matrices in the unit layout.
    pub matrices: u64,
    /// Embedding, and the head if it is another, in f16; one whose values were bf16 takes three quarters of that once it is loaded.
    pub tables: u64,
    /// Norms and biases in f32, and the input order of act-order matrices in u32.
    pub vectors: u64,
    /// Keys and values of one position, in f16.
    pub kv_per_position: u64,
    /// Keys and values of a full context.
    pub kv_full_context: u64,
    /// What decode steps on Hopper read once more, by the sides of L2, if half of the memory that is free is enough for it; not in
    /// [`MemoryPlan::total`].
    pub hopper_copy: u64,
    /// What steps of more than 8 texts on Hopper read once more, likewise, as soon as there are that many; about, and not in
    /// [`MemoryPlan::total`].
    pub hopper_batch_copy: u64,
}

impl MemoryPlan {
    /// Everything that stays on any GPU, with a full context.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights() + self.kv_full_context
    }

    /// Everything but the cache.
    #[must_use]
    pub fn weights(&self) -> u64 {
        self.matrices + self.tables + self.vectors
    }
}

/// What [`inspect`] found. `Display` gives text, [`Report::to_json`] the same as JSON.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Hub name, or the folder's name.
    pub name: String,
    /// Whether the name says that it follows instructions.
    pub instruct: bool,
    /// Whether a tokenizer.json is there.
    pub tokenizer: bool,
    /// The model's shape.
    pub config: ModelConfig,
    /// How it is quantised.
    pub quant: QuantConfig,
    /// Whether the head is a table of its own.
    pub untied_head: bool,
    /// Weights files and their bytes.
    pub files: Vec<(String, u64)>,
    /// All tensors, grouped.
    pub tensors: Vec<TensorGroup>,
    /// Numbers the model consists of; the head counts if it is a table of its own.
    pub parameters: u64,
    /// Bytes on the GPU.
    pub memory: MemoryPlan,
    /// Bytes of weights that decoding one token reads; the cache comes on top, `kv_per_position` for each position.
    pub bytes_per_token: u64,
    /// Free bytes of the GPU, if the caller looked.
    pub gpu_free_bytes: Option<u64>,
    /// What [`Checkpoint::warnings`] says.
    pub warnings: Vec<String>,
}

/// Looks at an opened checkpoint. `gpu_free_bytes`: free memory of the GPU it would go to, if there is one.
#[must_use]
pub fn inspect(checkpoint: &Checkpoint, gpu_free_bytes: Option<u64>) -> Report {
    let config = checkpoint.config();
    let untied_head = checkpoint.lm_head().is_some();
    let memory = memory_plan(checkpoint);
    let [hidden, ffn, vocab, layers] =
        [config.hidden_size, config.ffn_size, config.vocab_size, config.num_layers].map(|v| v as u64);
    let linear = hidden * (config.qkv_size() as u64 + hidden + 2 * ffn);
    let tables = vocab * hidden * if untied_head { 2 } else { 1 };
    let head_bytes = vocab * hidden * HALF;
    Report {
        name: checkpoint.name().to_owned(),
        instruct: checkpoint.is_instruct(),
        tokenizer: checkpoint.tokenizer_json().is_ok(),
        config: config.clone(),
        quant: checkpoint.quant().clone(),
        untied_head,
        files: checkpoint
            .files()
            .into_iter()
            .map(|(path, bytes)| (path.display().to_string(), bytes))
            .collect(),
        tensors: group_tensors(checkpoint),
        parameters: layers * linear + (2 * layers + 2) * hidden + tables,
        memory,
        bytes_per_token: memory.matrices + memory.vectors - row_factor_bytes(config)
            + head_bytes
            + hidden * HALF,
        gpu_free_bytes,
        warnings: checkpoint.warnings().to_vec(),
    }
}

fn memory_plan(checkpoint: &Checkpoint) -> MemoryPlan {
    let config = checkpoint.config();
    let (hidden, layers) = (config.hidden_size as u64, config.num_layers as u64);
    let tables = if checkpoint.lm_head().is_some() { 2 } else { 1 };
    let norms = (2 * layers + 2) * hidden * SINGLE;
    let mut plan = MemoryPlan {
        matrices: 0,
        tables: tables * config.vocab_size as u64 * hidden * HALF,
        vectors: norms + row_factor_bytes(config),
        kv_per_position: layers * 2 * HEAD_DIM as u64 * HALF,
        kv_full_context: layers * 2 * HEAD_DIM as u64 * HALF * config.max_positions as u64,
        hopper_copy: 0,
        hopper_batch_copy: near_bytes(config),
    };
    for i in 0..config.num_layers {
        let layer = checkpoint.layer(i);
        for matrix in [layer.query_key_value, layer.dense, layer.dense_h_to_4h, layer.dense_4h_to_h] {
            plan.matrices += matrix_bytes(&matrix);
            plan.vectors += matrix.bias.map_or(0, |bias| bias.len() as u64 * SINGLE);
            plan.vectors += matrix.g_idx.map_or(0, |g_idx| g_idx.len() as u64);
        }
    }
    plan.hopper_copy = plan.matrices + config.vocab_size as u64 * hidden * HALF;
    plan
}

/// Bytes the weights will take on a GPU: what [`inspect`] plans, without caches and working buffers.
#[cfg(feature = "cuda")]
pub(crate) fn resident_weight_bytes(checkpoint: &Checkpoint) -> u64 {
    let plan = memory_plan(checkpoint);
    plan.matrices + plan.tables + plan.vectors
}

/// Bytes of the copies that `cuda/near.cuh` and `cuda/head_near.cuh` draw, on a GPU with as many multiprocessors as an H100 or H200: of the
/// matrices pieces for six units of a row tile, with room for twelve tiles a part; of the table, as f16, two pieces for a unit of four row
/// tiles, with room for the largest share.
fn near_bytes(config: &ModelConfig) -> u64 {
    const MULTIPROCESSORS: usize = 132;
    // NEAR_UNITS of cuda/near.cuh, PEREGRINE_SLICE_UNITS of cuda/kernels.h, HEAD_GROUP and HEAD_CHUNK of cuda/head_near.cuh.
    const STAGE_UNITS: usize = 6;
    const SLICE_UNITS: usize = 72;
    const GROUP: usize = 4;
    const CHUNK: usize = 32;
    let product = |n: usize, k: usize, slices: usize| {
        let groups = n.div_ceil(4 * UNIT_ROWS);
        let parts = (MULTIPROCESSORS / slices).min(groups).max(groups.div_ceil(3));
        let units = (k / UNIT_INPUTS).div_ceil(slices);
        // There is none if a slice has less than a stage.
        let stages = if units < STAGE_UNITS { 0 } else { units.div_ceil(STAGE_UNITS) };
        2 * parts.div_ceil(2) * slices * stages * 12 * PIECE_BYTES
    };
    let (hidden, wide) = (config.hidden_size, config.ffn_size + config.hidden_size);
    let layer = product(config.qkv_size() + config.ffn_size, hidden, 1)
        + product(hidden, wide, (wide / UNIT_INPUTS).div_ceil(SLICE_UNITS));
    let tiles = config.vocab_size / UNIT_ROWS;
    let blocks = tiles.min(MULTIPROCESSORS);
    let table = match blocks / 2 {
        0 => 0, // one block would leave out a side
        shares => {
            let most = tiles.div_ceil(2).div_ceil(shares);
            let room = most.next_multiple_of(if most > CHUNK { CHUNK } else { GROUP });
            2 * blocks.div_ceil(2) * hidden * room * UNIT_ROWS * HALF as usize
        }
    };
    (config.num_layers * layer + table) as u64
}

/// Bytes of the quantised rows' factors, which products of more than 8 tokens read.
fn row_factor_bytes(config: &ModelConfig) -> u64 {
    let rows = config.qkv_size() + config.ffn_size + config.hidden_size;
    (config.num_layers * rows) as u64 * HALF
}

/// Bytes of a matrix in the unit layout.
fn matrix_bytes(matrix: &GptqTensor<'_>) -> u64 {
    let units = matrix.n.div_ceil(UNIT_ROWS) * matrix.k.div_ceil(UNIT_INPUTS);
    let groups_per_unit = UNIT_INPUTS.div_ceil(matrix.group_size);
    let scales = UNIT_ROWS * groups_per_unit * 2;
    let zeros = if matrix.constant_zero.is_some() { 0 } else { scales };
    (units * (UNIT_CODE_BYTES + scales + zeros)) as u64
}

/// The tensors with their layer numbers left out, in the files' order of names.
fn group_tensors(checkpoint: &Checkpoint) -> Vec<TensorGroup> {
    let mut groups: BTreeMap<(String, String, Vec<usize>), (usize, u64)> = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        let without_layer =
            |part: &str| if part.parse::<usize>().is_ok() { "*".to_owned() } else { part.to_owned() };
        let name = tensor.name.split('.').map(without_layer).collect::<Vec<_>>().join(".");
        let group = groups.entry((name, tensor.dtype, tensor.shape)).or_default();
        group.0 += 1;
        group.1 += tensor.bytes;
    }
    let group = |((name, dtype, shape), (count, bytes))| TensorGroup { name, dtype, shape, count, bytes };
    groups.into_iter().map(group).collect()
}

impl Report {
    /// The report as one JSON object; sizes are in bytes.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let (config, quant, memory) = (&self.config, &self.quant, &self.memory);
        let tensor = |t: &TensorGroup| json!({ "name": t.name, "dtype": t.dtype, "shape": t.shape, "count": t.count, "bytes": t.bytes });
        json!({
            "name": self.name,
            "instruct": self.instruct,
            "tokenizer": self.tokenizer,
            "architecture": {
                "model_type": "falcon",
                "hidden_size": config.hidden_size,
                "num_layers": config.num_layers,
                "num_heads": config.num_heads,
                "num_kv_heads": 1,
                "head_dim": HEAD_DIM,
                "ffn_size": config.ffn_size,
                "vocab_size": config.vocab_size,
                "norm_epsilon": config.norm_epsilon,
                "rope_theta": config.rope_theta,
                "max_positions": config.max_positions,
                "eos_ids": config.eos_ids,
                "tied_head": !self.untied_head,
            },
            "quantization": {
                "bits": quant.bits,
                "group_size": quant.group_size.map_or(json!(-1), |g| json!(g)),
                "desc_act": quant.desc_act,
                "sym": quant.sym,
                "zero_points": if quant.zero_offset == 1 { "gptq" } else { "gptq_v2" },
            },
            "files": self.files.iter().map(|(file, bytes)| json!({ "file": file, "bytes": bytes })).collect::<Vec<_>>(),
            "tensors": self.tensors.iter().map(tensor).collect::<Vec<_>>(),
            "parameters": self.parameters,
            "memory": {
                "matrices": memory.matrices,
                "tables": memory.tables,
                "vectors": memory.vectors,
                "weights": memory.weights(),
                "kv_per_position": memory.kv_per_position,
                "kv_full_context": memory.kv_full_context,
                "total": memory.total(),
                "hopper_copy": memory.hopper_copy,
                "hopper_batch_copy": memory.hopper_batch_copy,
                "gpu_free": self.gpu_free_bytes,
            },
            "bytes_per_token": self.bytes_per_token,
            "warnings": self.warnings,
        })
    }

    fn show_memory(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (c, m) = (&self.config, &self.memory);
        writeln!(f, "memory on a GPU")?;
        for (what, bytes) in [
            ("quantised matrices", m.matrices),
            ("tables (f16 at most)", m.tables),
            ("norms, biases", m.vectors),
            (&format!("cache for {} positions", c.max_positions), m.kv_full_context),
            ("together", m.total()),
        ] {
            writeln!(f, "  {what:26} {:>10}", show_bytes(bytes))?;
        }
        for (what, bytes) in
            [("on Hopper besides", m.hopper_copy), ("... for more than 8 texts", m.hopper_batch_copy)]
        {
            writeln!(f, "  {what:26} {:>10}  if half of what is free is enough", show_bytes(bytes))?;
        }
        if let Some(free) = self.gpu_free_bytes {
            let fits = if free >= m.total() { "it fits, before working buffers" } else { "it does not fit" };
            writeln!(f, "  {:26} {:>10}  {fits}", "free on this GPU", show_bytes(free))?;
        }
        writeln!(
            f,
            "read per token {}, and {} for each position of context",
            show_bytes(self.bytes_per_token),
            show_bytes(m.kv_per_position)
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (c, q) = (&self.config, &self.quant);
        writeln!(
            f,
            "model         {}{}",
            one_line(&self.name),
            if self.instruct { " (instruct)" } else { "" }
        )?;
        writeln!(
            f,
            "architecture  falcon: {} layers, width {}, {} query heads of {HEAD_DIM}, 1 key/value head, MLP {}, vocabulary {}",
            c.num_layers, c.hidden_size, c.num_heads, c.ffn_size, c.vocab_size
        )?;
        let head = if self.untied_head { "own head" } else { "tied head" };
        writeln!(
            f,
            "              positions {}, rotary base {}, norm epsilon {:e}, {head}, end of text {:?}",
            c.max_positions, c.rope_theta, c.norm_epsilon, c.eos_ids
        )?;
        writeln!(
            f,
            "quantisation  {} bits, group {}, {}, {}, zero points version {}",
            q.bits,
            q.group_size.map_or("-1 (all inputs)".to_owned(), |g| g.to_string()),
            if q.sym { "symmetric" } else { "asymmetric" },
            if q.desc_act { "act-order" } else { "no act-order" },
            if q.zero_offset == 1 { 1 } else { 2 }
        )?;
        writeln!(f, "parameters    {:.1} million", self.parameters as f64 / 1e6)?;
        writeln!(
            f,
            "tokenizer     {}",
            if self.tokenizer { "tokenizer.json" } else { "none (token ids only)" }
        )?;
        for (file, bytes) in &self.files {
            writeln!(f, "file          {}, {}", one_line(file), show_bytes(*bytes))?;
        }
        writeln!(f, "tensors")?;
        for t in &self.tensors {
            let shape = format!("{:?}", t.shape);
            // A tensor's name is the file's to choose, and must not reach a terminal as it is.
            let name = one_line(&t.name);
            writeln!(f, "  {:4} x {:4} {shape:14} {:>10}  {name}", t.count, t.dtype, show_bytes(t.bytes))?;
        }
        self.show_memory(f)?;
        self.warnings.iter().try_for_each(|warning| writeln!(f, "warning: {warning}"))
    }
}

/// Bytes with a unit a person reads: decimal, as file sizes and bandwidths are.
fn show_bytes(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.3} GB", bytes as f64 / 1e9),
    }
}
