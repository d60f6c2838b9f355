//! What `config.json`, `generation_config.json` and `quantize_config.json` say, in one dialect.
//!
//! Two dialects of `config.json` exist: the first release's (`RefinedWebModel`: `n_layer`, `n_head`) and the one
//! of transformers (`falcon`: `num_hidden_layers`, `num_attention_heads`). Both are read; what this engine does not
//! run is refused by the name of its field. The engine covers Falcon-7B's block: attention and MLP in parallel from
//! one LayerNorm, one key/value head, rotary positions, heads of 64.
//!
//! Sizes have an upper limit (2^20, and 1024 layers), so that arithmetic on hostile numbers cannot overflow.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::layout::{HEAD_DIM, UNIT_INPUTS, UNIT_ROWS};

/// Id of `<|endoftext|>` in every Falcon tokenizer.
pub const END_OF_TEXT: u32 = 11;

/// Largest width or vocabulary accepted; Falcon-180B stays far below.
const MAX_SIZE: usize = 1 << 20;
/// Most layers accepted.
const MAX_LAYERS: usize = 1 << 10;

/// The shape of a Falcon model. Every field is checked when the checkpoint is opened.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream: 4544.
    pub hidden_size: usize,
    /// Decoder layers: 32.
    pub num_layers: usize,
    /// Query heads: 71. One key/value head is shared by all (multi-query).
    pub num_heads: usize,
    /// Width of the MLP: 18176.
    pub ffn_size: usize,
    /// Rows of the embedding: 65024.
    pub vocab_size: usize,
    /// LayerNorm epsilon: 1e-5.
    pub norm_epsilon: f32,
    /// Base of the rotary angles: 10000.
    pub rope_theta: f32,
    /// Positions the model was trained for: 2048.
    pub max_positions: usize,
    /// Ids that end a text: 11, and the checkpoint's own if it is not the known-bad 1/2 pair.
    pub eos_ids: Vec<u32>,
}

impl ModelConfig {
    /// Rows of `query_key_value`: all query heads, the key, the value. 4672.
    #[must_use]
    pub fn qkv_size(&self) -> usize {
        self.hidden_size + 2 * HEAD_DIM
    }
}

/// How the checkpoint is quantised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantConfig {
    /// Bits per weight: 4.
    pub bits: u32,
    /// Inputs that share a scale; `None` is AutoGPTQ's -1: one group over all inputs.
    pub group_size: Option<usize>,
    /// Act-order: groups are assigned to inputs by `g_idx`.
    pub desc_act: bool,
    /// Symmetric: every zero point is 8.
    pub sym: bool,
    /// What must be added to a stored zero point: 1 in AutoGPTQ's files (v1), 0 in `gptq_v2`. Decided from the
    /// data where the data is unambiguous.
    pub zero_offset: u8,
}

/// `config.json` and `generation_config.json`, read.
#[derive(Debug)]
pub(crate) struct ParsedConfig {
    pub(crate) model: ModelConfig,
    /// `bias: true`: the four linear layers must have a bias.
    pub(crate) needs_bias: bool,
    /// `tie_word_embeddings: false`: an `lm_head` must be there.
    pub(crate) needs_lm_head: bool,
    /// `_name_or_path`, the name under which the model was saved.
    pub(crate) name: Option<String>,
    pub(crate) warnings: Vec<String>,
}

/// What the quantisation's own configuration says; `None` where it says nothing and the tensors decide.
#[derive(Debug, Default)]
pub(crate) struct StatedQuant {
    /// The file that says it; `None` when there is none.
    pub(crate) file: Option<PathBuf>,
    /// Inputs per group; `Some(None)` is -1.
    pub(crate) group_size: Option<Option<usize>>,
    pub(crate) desc_act: Option<bool>,
    pub(crate) sym: Option<bool>,
    /// `checkpoint_format: gptq_v2`: zero points are stored as they are.
    pub(crate) v2: bool,
    /// Name of the weights file without `.safetensors`.
    pub(crate) base_name: Option<String>,
}

/// A JSON object and the file it came from; the getters' errors name both.
struct Fields<'a> {
    file: &'a Path,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The first of `names` that is present and not null, with its name.
    fn find<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &'a Value)> {
        names.iter().find_map(|&name| self.map.get(name).filter(|v| !v.is_null()).map(|v| (name, v)))
    }

    fn wrong<T>(&self, name: &str, found: &Value, wanted: &str) -> Result<T> {
        Err(Error::model(self.file, format_args!("{name} is {found}, wanted {wanted}")))
    }

    fn size(&self, names: &[&str]) -> Result<Option<usize>> {
        let Some((name, value)) = self.find(names) else { return Ok(None) };
        match value.as_u64().and_then(|v| usize::try_from(v).ok()) {
            Some(v) if (1..=MAX_SIZE).contains(&v) => Ok(Some(v)),
            _ => self.wrong(name, value, &format!("a whole number from 1 to {MAX_SIZE}")),
        }
    }

    fn required_size(&self, names: &[&str]) -> Result<usize> {
        self.size(names)?
            .ok_or_else(|| Error::model(self.file, format_args!("{} is missing", names.join(" / "))))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.find(&[name]) {
            None => Ok(None),
            Some((_, Value::Bool(b))) => Ok(Some(*b)),
            Some((_, other)) => self.wrong(name, other, "true or false"),
        }
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>> {
        match self.find(&[name]) {
            None => Ok(None),
            Some((_, Value::String(s))) => Ok(Some(s)),
            Some((_, other)) => self.wrong(name, other, "a string"),
        }
    }

    /// A positive number that stays positive and finite in f32.
    fn positive(&self, name: &str) -> Result<Option<f32>> {
        let Some((_, value)) = self.find(&[name]) else { return Ok(None) };
        match value.as_f64().map(|v| v as f32) {
            Some(v) if v.is_finite() && v > 0.0 => Ok(Some(v)),
            _ => self.wrong(name, value, "a positive number"),
        }
    }

    fn refuse_if(&self, name: &str, unsupported: bool, why: &str) -> Result<()> {
        if unsupported { Err(self.unsupported(name, why)) } else { Ok(()) }
    }

    fn unsupported(&self, name: &str, why: &str) -> Error {
        let found = self.map.get(name).map_or("absent".to_owned(), Value::to_string);
        Error::model(self.file, format_args!("{name} is {found}: {why} is not supported"))
    }
}

/// The JSON object in `bytes`.
pub(crate) fn parse_object(file: &Path, bytes: &[u8]) -> Result<Map<String, Value>> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::model(file, "holds JSON, but not an object { ... }")),
        Err(e) => Err(Error::model(file, format_args!("is not JSON: {e}"))),
    }
}

/// Reads `config.json` in either dialect, and the end-of-text ids of `generation_config.json` if there is one.
pub(crate) fn parse_model(
    file: &Path,
    map: &Map<String, Value>,
    generation: Option<(&Path, &Map<String, Value>)>,
) -> Result<ParsedConfig> {
    let fields = Fields { file, map };
    let refined_web = refuse_other_architectures(&fields)?;
    refuse_other_blocks(&fields, refined_web)?;
    let hidden_size = fields.required_size(&["hidden_size", "n_embed"])?;
    let vocab_size = fields.required_size(&["vocab_size"])?;
    let mut warnings = Vec::new();
    let eos_ids = eos_ids(&fields, generation, vocab_size, &mut warnings)?;
    let model = ModelConfig {
        hidden_size,
        num_layers: fields.required_size(&["num_hidden_layers", "n_layer"])?,
        num_heads: fields.required_size(&["num_attention_heads", "n_head"])?,
        ffn_size: fields.size(&["ffn_hidden_size"])?.unwrap_or(4 * hidden_size),
        vocab_size,
        norm_epsilon: fields.positive("layer_norm_epsilon")?.unwrap_or(1e-5),
        rope_theta: rope_theta(&fields)?,
        max_positions: fields.size(&["max_position_embeddings"])?.unwrap_or(2048),
        eos_ids,
    };
    check_sizes(file, &model)?;
    Ok(ParsedConfig {
        model,
        needs_bias: fields.flag("bias")?.unwrap_or(false),
        needs_lm_head: fields.flag("tie_word_embeddings")? == Some(false),
        name: map.get("_name_or_path").and_then(Value::as_str).map(str::to_owned),
        warnings,
    })
}

/// Whether the dialect is RefinedWeb's; an error for a model that is no Falcon.
fn refuse_other_architectures(fields: &Fields<'_>) -> Result<bool> {
    let architecture = fields.map.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
    match (fields.text("model_type")?, architecture) {
        (Some("falcon"), _) | (None, Some("FalconForCausalLM")) => Ok(false),
        (Some("RefinedWebModel" | "RefinedWeb"), _) | (None, Some("RWForCausalLM")) => Ok(true),
        (Some(other), _) => Err(Error::model(
            fields.file,
            format_args!("model_type is {other:?}, wanted \"falcon\" or \"RefinedWebModel\" (Falcon-7B)"),
        )),
        (None, _) => {
            Err(Error::model(fields.file, "model_type is missing, wanted \"falcon\" or \"RefinedWebModel\""))
        }
    }
}

/// Refuses by name every decoder block but Falcon-7B's.
fn refuse_other_blocks(fields: &Fields<'_>, refined_web: bool) -> Result<()> {
    const GROUPED: &str = "Falcon-40B's grouped key/value heads";
    fields.refuse_if("alibi", fields.flag("alibi")? == Some(true), "ALiBi (falcon-rw)")?;
    let new_architecture = fields.flag("new_decoder_architecture")?;
    fields.refuse_if("new_decoder_architecture", new_architecture == Some(true), GROUPED)?;
    if new_architecture.is_none() {
        fields.refuse_if("n_head_kv", fields.find(&["n_head_kv"]).is_some(), GROUPED)?;
        fields.refuse_if("model_type", fields.text("model_type")? == Some("RefinedWeb"), GROUPED)?;
    }
    let multi_query = fields.flag("multi_query")?.unwrap_or(!refined_web);
    fields.refuse_if("multi_query", !multi_query, "a key/value head for every query head")?;
    let parallel = fields.flag("parallel_attn")?.unwrap_or(!refined_web);
    fields.refuse_if("parallel_attn", !parallel, "MLP after attention instead of beside it")?;
    let two_norms = fields.size(&["num_ln_in_parallel_attn"])?.is_some_and(|n| n != 1);
    fields.refuse_if("num_ln_in_parallel_attn", two_norms, "a LayerNorm for each branch (Falcon-40B)")?;
    let post = fields.flag("apply_residual_connection_post_layernorm")? == Some(true);
    fields.refuse_if("apply_residual_connection_post_layernorm", post, "the residual after the LayerNorm")?;
    let activation = fields.text("activation")?.unwrap_or("gelu");
    fields.refuse_if("activation", activation != "gelu", "an activation other than the exact GELU")
}

/// The base of the rotary angles; any scaling of positions is refused.
fn rope_theta(fields: &Fields<'_>) -> Result<f32> {
    let mut theta = fields.positive("rope_theta")?;
    // transformers 5 writes `rope_parameters`, older ones `rope_scaling`; "default" means no scaling in both.
    for name in ["rope_scaling", "rope_parameters"] {
        let Some((_, value)) = fields.find(&[name]) else { continue };
        let Value::Object(map) = value else { return fields.wrong(name, value, "null or an object") };
        let rope = Fields { file: fields.file, map };
        let kind = rope.text("rope_type")?.or(rope.text("type")?).unwrap_or("default");
        fields.refuse_if(name, kind != "default", "scaling of rotary positions")?;
        theta = theta.or(rope.positive("rope_theta")?);
    }
    Ok(theta.unwrap_or(10000.0))
}

/// The ids that end a text.
///
/// The first Falcon releases said `bos 1, eos 2`, which are the tokens `>>ABSTRACT<<` and `>>INTRODUCTION<<`; a
/// model that waits for them never stops. That pair is ignored, and 11 always ends a text.
fn eos_ids(
    config: &Fields<'_>,
    generation: Option<(&Path, &Map<String, Value>)>,
    vocab_size: usize,
    warnings: &mut Vec<String>,
) -> Result<Vec<u32>> {
    let mut ids = vec![END_OF_TEXT];
    let generation = generation.map(|(file, map)| Fields { file, map });
    for fields in std::iter::once(config).chain(generation.as_ref()) {
        let Some((name, value)) = fields.find(&["eos_token_id"]) else { continue };
        let listed = match value {
            Value::Array(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        };
        let file = fields.file.file_name().unwrap_or_default().to_string_lossy();
        if listed == [Value::from(2)] && fields.map.get("bos_token_id") == Some(&Value::from(1)) {
            warnings.push(format!(
                "{file}: bos 1 and eos 2 are a known mistake of early Falcon releases; a text ends at {END_OF_TEXT}"
            ));
            continue;
        }
        for value in listed {
            match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
                Some(id) if (id as usize) < vocab_size => {
                    if !ids.contains(&id) {
                        ids.push(id);
                    }
                }
                _ => return fields.wrong(name, value, &format!("an id below the vocabulary's {vocab_size}")),
            }
        }
    }
    Ok(ids)
}

/// What the kernels and the device layout need of the sizes.
fn check_sizes(file: &Path, model: &ModelConfig) -> Result<()> {
    let wrong = |what: String| Err(Error::model(file, what));
    if model.num_layers > MAX_LAYERS {
        return wrong(format!("num_hidden_layers is {}, wanted at most {MAX_LAYERS}", model.num_layers));
    }
    if model.hidden_size != HEAD_DIM * model.num_heads {
        let (hidden, heads) = (model.hidden_size, model.num_heads);
        return wrong(format!("hidden_size is {hidden} with {heads} heads, wanted {HEAD_DIM} per head"));
    }
    if !model.ffn_size.is_multiple_of(UNIT_INPUTS) {
        return wrong(format!("ffn_hidden_size is {}, wanted a multiple of {UNIT_INPUTS}", model.ffn_size));
    }
    if !model.vocab_size.is_multiple_of(UNIT_ROWS) {
        return wrong(format!("vocab_size is {}, wanted a multiple of {UNIT_ROWS}", model.vocab_size));
    }
    if model.norm_epsilon >= 1.0 {
        return wrong(format!("layer_norm_epsilon is {}, wanted less than 1", model.norm_epsilon));
    }
    Ok(())
}

/// Reads a quantisation config: `quantize_config.json`, `quant_config.json`, or the object `quantization_config`
/// of `config.json`. What this engine does not run is refused by name.
pub(crate) fn parse_quant(file: &Path, map: &Map<String, Value>) -> Result<StatedQuant> {
    let fields = Fields { file, map };
    let method = fields.text("quant_method")?.unwrap_or("gptq");
    fields.refuse_if("quant_method", method != "gptq", "a method other than GPTQ")?;
    for (name, what) in [
        ("is_marlin_format", "the Marlin format"),
        ("awq_gemm_checkpoint", "the AWQ format"),
        ("lm_head", "a quantised lm_head"),
    ] {
        fields.refuse_if(name, fields.flag(name)? == Some(true), what)?;
    }
    let format_name = if map.contains_key("checkpoint_format") { "checkpoint_format" } else { "format" };
    let format = fields.text(format_name)?.unwrap_or("gptq");
    fields.refuse_if(
        format_name,
        !matches!(format, "gptq" | "gptq_v2"),
        "a format other than gptq and gptq_v2",
    )?;
    if let Some((name, value)) = fields.find(&["bits", "w_bit"]) {
        check_bits(file, name, value)?;
    }
    let pack = fields.text("pack_dtype")?.unwrap_or("int32");
    fields.refuse_if("pack_dtype", pack != "int32", "packing into other words than int32")?;
    let overrides =
        fields.find(&["dynamic"]).is_some_and(|(_, v)| v.as_object().is_none_or(|o| !o.is_empty()));
    fields.refuse_if("dynamic", overrides, "another quantisation for some modules")?;
    let group_size = match fields.find(&["group_size", "q_group_size"]) {
        None => None,
        Some((name, value)) => Some(parse_group_size(file, name, value)?),
    };
    Ok(StatedQuant {
        file: Some(file.to_owned()),
        group_size,
        desc_act: fields.flag("desc_act")?,
        sym: fields.flag("sym")?,
        v2: format == "gptq_v2",
        base_name: fields.text("model_file_base_name")?.map(str::to_owned),
    })
}

/// `Ok` for 4 bits.
pub(crate) fn check_bits(file: &Path, name: &str, value: &Value) -> Result<()> {
    if value.as_u64() == Some(4) {
        return Ok(());
    }
    Err(Error::model(file, format_args!("{name} is {value}: only 4 bits are supported")))
}

/// A group size the unit layout can hold: 32, a multiple of 64, or -1 (`None`).
pub(crate) fn parse_group_size(file: &Path, name: &str, value: &Value) -> Result<Option<usize>> {
    if value.as_i64() == Some(-1) {
        return Ok(None);
    }
    match value.as_u64().and_then(|v| usize::try_from(v).ok()) {
        Some(size) if size == 32 || (size > 0 && size <= MAX_SIZE && size.is_multiple_of(UNIT_INPUTS)) => {
            Ok(Some(size))
        }
        _ => Err(Error::model(
            file,
            format_args!("{name} is {value}: only 32, multiples of {UNIT_INPUTS}, and -1 are supported"),
        )),
    }
}
