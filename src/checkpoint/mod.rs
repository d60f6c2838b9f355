//! Maps a checkpoint and hands out checked views of its tensors.
//!
//! ```text
//! resolve    what the user wrote -> a folder and its weights files      source     files, mapped
//! container  safetensors headers -> names, dtypes, shapes, places       float      F32, F16, BF16
//! gptq       one quantised matrix: its tensors and zero points          scan       reads the data once
//! ```
//!
//! Everything is checked in [`Checkpoint::open`]: configuration first, then names, dtypes and shapes, then the data.
//! What this engine does not run is refused before the weights are touched. After that, views cannot fail.
//!
//! Memory: the files are mapped; the heap holds names and places, some 0.3 MB for Falcon-7B. Time: all data but the
//! codes is read once, 2.6 GB in a checkpoint with F32 tables.

mod container;
mod float;
mod gptq;
mod resolve;
mod scan;
mod source;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::config::{self, ModelConfig, ParsedConfig, QuantConfig, StatedQuant};
use crate::error::{Error, Result};
use container::{Container, Place, WeightFile};
use gptq::{Matrix, MatrixFacts};
use source::{Bytes, Folder, MAX_JSON_BYTES, MAX_TOKENIZER_BYTES};

pub use float::{FloatTensor, FloatType};
pub use gptq::GptqTensor;

const EMBEDDING: &str = "transformer.word_embeddings.weight";
const LM_HEAD: &str = "lm_head.weight";
const FINAL_NORM: &str = "transformer.ln_f";

/// Weight and bias of a LayerNorm, each [1, hidden_size].
#[derive(Debug, Clone, Copy)]
pub struct NormTensors<'a> {
    /// Scale.
    pub weight: FloatTensor<'a>,
    /// Shift.
    pub bias: FloatTensor<'a>,
}

/// The tensors of one decoder layer.
#[derive(Debug, Clone)]
pub struct LayerTensors<'a> {
    /// The norm that attention and MLP both read.
    pub input_layernorm: NormTensors<'a>,
    /// hidden_size -> all query heads, the key, the value.
    pub query_key_value: GptqTensor<'a>,
    /// Attention's output: hidden_size -> hidden_size.
    pub dense: GptqTensor<'a>,
    /// MLP up: hidden_size -> ffn_size.
    pub dense_h_to_4h: GptqTensor<'a>,
    /// MLP down: ffn_size -> hidden_size.
    pub dense_4h_to_h: GptqTensor<'a>,
}

/// A tensor as the files list it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// safetensors' word for its type: `I32`, `F16`, ...
    pub dtype: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its length in the file.
    pub bytes: u64,
    /// The file it is in.
    pub file: PathBuf,
}

/// Where a norm's weight and bias lie.
struct NormPlaces {
    name: String,
    weight: Place,
    bias: Place,
}

/// Where a layer's tensors lie: the norm, then `query_key_value`, `dense`, `dense_h_to_4h`, `dense_4h_to_h`.
struct LayerPlaces {
    norm: NormPlaces,
    matrices: [Matrix; 4],
}

/// Where everything lies, with names, dtypes and shapes checked.
struct Places {
    layers: Vec<LayerPlaces>,
    final_norm: NormPlaces,
    embedding: Place,
    lm_head: Option<Place>,
}

/// An opened checkpoint: mapped files, every tensor checked.
pub struct Checkpoint {
    name: String,
    container: Container,
    config: ModelConfig,
    quant: QuantConfig,
    places: Places,
    /// Of `layers[i].matrices[j]` at `4 * i + j`.
    facts: Vec<MatrixFacts>,
    tokenizer: std::result::Result<Bytes, Error>,
    warnings: Vec<String>,
    instruct: bool,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checkpoint({})", self.name)
    }
}

impl Checkpoint {
    /// Opens a model and checks all of it.
    ///
    /// `model`: a folder, a `.safetensors` file (or a shard index), or a hub name in the local Hugging Face cache.
    ///
    /// # Errors
    /// [`Error::Model`], naming file, tensor, what was found and what was wanted, when something is missing, damaged
    /// or not supported.
    pub fn open(model: &str) -> Result<Checkpoint> {
        let location = resolve::locate(model)?;
        Self::from_folder(&location.folder, location.name, location.weights.as_deref())
    }

    /// A checkpoint whose files are in memory (the built-in model). `files`: names as in a folder, with contents.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_static(name: &str, files: &[(&'static str, &'static [u8])]) -> Result<Checkpoint> {
        let folder = Folder::Static { name: name.to_owned(), files: files.to_vec() };
        Self::from_folder(&folder, name.to_owned(), None)
    }

    fn from_folder(folder: &Folder, name: String, weights: Option<&str>) -> Result<Checkpoint> {
        let (parsed, mut stated) = read_configs(folder)?;
        let ParsedConfig { model: config, mut warnings, .. } = parsed;
        let files = resolve::weight_files(folder, weights, &stated, &mut warnings)?
            .into_iter()
            .map(|(file, bytes)| WeightFile { path: folder.path(&file), bytes })
            .collect();
        let container = Container::new(files)?;
        complete_from_tensors(&container, &config, &mut stated, &mut warnings)?;
        let places = find_tensors(&container, &config, &stated, parsed.needs_bias, parsed.needs_lm_head)?;
        warn_of_extra_tensors(&container, &places, &mut warnings);
        let (facts, tied) = places.scan(&container, &stated)?;
        let quant = decide_quant(&stated, &facts, &mut warnings);
        let mut places = places;
        if tied {
            places.lm_head = None;
        } else if !parsed.needs_lm_head {
            warnings.push(format!(
                "{LM_HEAD} differs from the embedding though config.json does not say tie_word_embeddings: false; \
                 it is used (transformers before 5 uses the embedding)"
            ));
        }
        let tokenizer = match folder.open("tokenizer.json", MAX_TOKENIZER_BYTES) {
            Ok(Some(bytes)) => Ok(bytes),
            Ok(None) => Err(Error::model(
                folder.path("tokenizer.json"),
                "is missing: text needs it (token ids work without: --ids)",
            )),
            Err(e) => Err(e),
        };
        let is_instruct = |name: &str| name.to_ascii_lowercase().contains("instruct");
        let instruct = is_instruct(&name) || parsed.name.as_deref().is_some_and(is_instruct);
        Ok(Checkpoint { name, container, config, quant, places, facts, tokenizer, warnings, instruct })
    }

    /// Hub name, or the folder's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How it is quantised, as the data says it.
    #[must_use]
    pub fn quant(&self) -> &QuantConfig {
        &self.quant
    }

    /// The tensors of layer `index`, which must be below `config().num_layers`.
    #[must_use]
    pub fn layer(&self, index: usize) -> LayerTensors<'_> {
        let layer = &self.places.layers[index];
        let matrix = |j: usize| {
            layer.matrices[j].view(&self.container, self.quant.zero_offset, &self.facts[4 * index + j])
        };
        LayerTensors {
            input_layernorm: self.norm(&layer.norm),
            query_key_value: matrix(0),
            dense: matrix(1),
            dense_h_to_4h: matrix(2),
            dense_4h_to_h: matrix(3),
        }
    }

    /// The norm before the head.
    #[must_use]
    pub fn final_norm(&self) -> NormTensors<'_> {
        self.norm(&self.places.final_norm)
    }

    /// [vocab_size, hidden_size]
    #[must_use]
    pub fn embedding(&self) -> FloatTensor<'_> {
        self.container.float_view(&self.places.embedding)
    }

    /// [vocab_size, hidden_size]; `None` when absent or equal to the embedding.
    #[must_use]
    pub fn lm_head(&self) -> Option<FloatTensor<'_>> {
        self.places.lm_head.as_ref().map(|place| self.container.float_view(place))
    }

    /// Contents of tokenizer.json.
    ///
    /// # Errors
    /// [`Error::Model`] when it is missing or cannot be read; a model works on token ids without it.
    pub fn tokenizer_json(&self) -> Result<&[u8]> {
        match &self.tokenizer {
            Ok(bytes) => Ok(bytes),
            Err(e) => Err(e.clone()),
        }
    }

    /// Things worth telling the user once, one line each.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Whether this is an instruct checkpoint (its name says so): the default prompt template depends on it.
    #[must_use]
    pub fn is_instruct(&self) -> bool {
        self.instruct
    }

    /// Every tensor in the files, by name.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorInfo> {
        let info = |(name, place): (&String, &container::TensorPlace)| TensorInfo {
            name: name.clone(),
            dtype: place.dtype.to_string(),
            shape: place.shape.clone(),
            bytes: place.range.len() as u64,
            file: self.container.files[place.file].path.clone(),
        };
        self.container.tensors.iter().map(info).collect()
    }

    /// The weights files and their lengths in bytes.
    #[must_use]
    pub fn files(&self) -> Vec<(PathBuf, u64)> {
        self.container.files.iter().map(|f| (f.path.clone(), f.bytes.len() as u64)).collect()
    }

    fn norm(&self, places: &NormPlaces) -> NormTensors<'_> {
        NormTensors {
            weight: self.container.float_view(&places.weight),
            bias: self.container.float_view(&places.bias),
        }
    }
}

impl Places {
    /// Reads the data: the facts of all matrices, and whether `lm_head` adds nothing to the embedding.
    fn scan(&self, container: &Container, stated: &StatedQuant) -> Result<(Vec<MatrixFacts>, bool)> {
        let norms: Vec<_> = self
            .layers
            .iter()
            .map(|layer| &layer.norm)
            .chain([&self.final_norm])
            .flat_map(|n| [(format!("{}.weight", n.name), &n.weight), (format!("{}.bias", n.name), &n.bias)])
            .collect();
        scan::scan_norms(container, &norms)?;
        let matrices: Vec<&Matrix> = self.layers.iter().flat_map(|layer| &layer.matrices).collect();
        let facts = scan::scan_matrices(container, &matrices, stated.desc_act)?;
        let lm_head = self.lm_head.as_ref().map(|place| (LM_HEAD, place));
        let tied = scan::scan_tables(container, (EMBEDDING, &self.embedding), lm_head)?;
        Ok((facts, tied))
    }
}

/// The JSON object in `file`, if the folder has it.
fn read_object(folder: &Folder, file: &str) -> Result<Option<(PathBuf, Map<String, Value>)>> {
    let path = folder.path(file);
    match folder.open(file, MAX_JSON_BYTES)? {
        Some(bytes) => Ok(Some((path.clone(), config::parse_object(&path, &bytes)?))),
        None => Ok(None),
    }
}

/// Reads the configuration files. Quantisation: `quantize_config.json`, else `quant_config.json`, else
/// `quantization_config` in `config.json`.
fn read_configs(folder: &Folder) -> Result<(ParsedConfig, StatedQuant)> {
    let Some((path, config)) = read_object(folder, "config.json")? else {
        return Err(Error::model(folder.root(), "holds no config.json; wanted a model's folder"));
    };
    let generation = read_object(folder, "generation_config.json")?;
    let parsed =
        config::parse_model(&path, &config, generation.as_ref().map(|(path, map)| (path.as_path(), map)))?;
    for file in ["quantize_config.json", "quant_config.json"] {
        if let Some((path, map)) = read_object(folder, file)? {
            return Ok((parsed, config::parse_quant(&path, &map)?));
        }
    }
    let stated = match config.get("quantization_config") {
        None | Some(Value::Null) => StatedQuant::default(),
        Some(Value::Object(map)) => config::parse_quant(&path, map)?,
        Some(other) => {
            let what = format!("quantization_config is {other}, wanted an object");
            return Err(Error::model(path, what));
        }
    };
    Ok((parsed, stated))
}

/// Fills what no configuration file states from the tensors: TGI's scalars, else the shape of the scales.
fn complete_from_tensors(
    container: &Container,
    config: &ModelConfig,
    stated: &mut StatedQuant,
    warnings: &mut Vec<String>,
) -> Result<()> {
    if stated.file.is_none() {
        let path = container.files.first().map(|f| f.path.clone()).unwrap_or_default();
        if let Some(bits) = read_scalar(container, "gptq_bits")? {
            config::check_bits(&path, "tensor gptq_bits", &Value::from(bits))?;
        }
        if let Some(size) = read_scalar(container, "gptq_groupsize")? {
            stated.group_size =
                Some(config::parse_group_size(&path, "tensor gptq_groupsize", &Value::from(size))?);
        } else {
            warnings.push("no quantize_config.json: quantisation is read off the tensors".to_owned());
        }
        stated.sym = read_scalar(container, "gptq_sym")?.map(|sym| sym != 0);
    }
    if stated.group_size.is_none() {
        // The widest matrix tells group sizes apart that round to the same count elsewhere.
        let name = "transformer.h.0.mlp.dense_4h_to_h.scales";
        if let Some(&[groups, _]) = container.tensors.get(name).map(|t| &t.shape[..])
            && groups > 0
        {
            let size = config.ffn_size.div_ceil(groups);
            let path = container.missing_in().to_owned();
            let inferred =
                || config::parse_group_size(&path, "group size by the scales' shape", &Value::from(size));
            stated.group_size = Some(if groups == 1 { None } else { inferred()? });
        }
    }
    Ok(())
}

/// The one number in tensor `name`, if it is there.
fn read_scalar(container: &Container, name: &str) -> Result<Option<i64>> {
    let Some(place) = container.tensors.get(name) else { return Ok(None) };
    let bytes = &container.files[place.file].bytes[place.range.clone()];
    let value = match (place.dtype, bytes) {
        (Dtype::I32, &[a, b, c, d]) => i64::from(i32::from_le_bytes([a, b, c, d])),
        (Dtype::I64, &[a, b, c, d, e, f, g, h]) => i64::from_le_bytes([a, b, c, d, e, f, g, h]),
        (Dtype::BOOL | Dtype::U8, &[a]) => i64::from(a),
        _ => {
            let what = format!("is {} of {} values, wanted one whole number", place.dtype, place.len());
            return Err(container.error(name, what));
        }
    };
    Ok(Some(value))
}

/// Finds every tensor the model needs, with its dtype and shape.
fn find_tensors(
    container: &Container,
    config: &ModelConfig,
    stated: &StatedQuant,
    needs_bias: bool,
    needs_lm_head: bool,
) -> Result<Places> {
    let (hidden, ffn) = (config.hidden_size, config.ffn_size);
    let group_size = stated.group_size.flatten();
    let norm = |name: String| {
        let part = |part: &str| container.float(&format!("{name}.{part}"), [1, hidden]);
        Ok(NormPlaces { weight: part("weight")?, bias: part("bias")?, name })
    };
    let layer = |i: usize| {
        let matrix = |module: &str, k_n: [usize; 2]| {
            let name = format!("transformer.h.{i}.{module}");
            Matrix::find(container, name, k_n, group_size, needs_bias, stated.desc_act == Some(true))
        };
        Ok(LayerPlaces {
            norm: norm(format!("transformer.h.{i}.input_layernorm"))?,
            matrices: [
                matrix("self_attention.query_key_value", [hidden, config.qkv_size()])?,
                matrix("self_attention.dense", [hidden, hidden])?,
                matrix("mlp.dense_h_to_4h", [hidden, ffn])?,
                matrix("mlp.dense_4h_to_h", [ffn, hidden])?,
            ],
        })
    };
    let table = [config.vocab_size, hidden];
    let has_lm_head = needs_lm_head || container.tensors.contains_key(LM_HEAD);
    Ok(Places {
        embedding: container.float(EMBEDDING, table)?,
        layers: (0..config.num_layers).map(layer).collect::<Result<_>>()?,
        final_norm: norm(FINAL_NORM.to_owned())?,
        lm_head: if has_lm_head { Some(container.float(LM_HEAD, table)?) } else { None },
    })
}

/// Tensors nobody asked for are no defect, but worth a line: the model may be another than it says.
fn warn_of_extra_tensors(container: &Container, places: &Places, warnings: &mut Vec<String>) {
    let norms = places.layers.iter().map(|layer| &layer.norm).chain([&places.final_norm]);
    let mut known: BTreeSet<String> =
        norms.flat_map(|norm| ["weight", "bias"].map(|part| format!("{}.{part}", norm.name))).collect();
    for matrix in places.layers.iter().flat_map(|layer| &layer.matrices) {
        let parts = ["qweight", "qzeros", "scales", "g_idx", "bias"];
        known.extend(parts.map(|part| format!("{}.{part}", matrix.name)));
    }
    known.extend([EMBEDDING, LM_HEAD, "gptq_bits", "gptq_groupsize", "gptq_sym"].map(str::to_owned));
    let extra: Vec<&String> = container.tensors.keys().filter(|name| !known.contains(*name)).collect();
    if let Some(first) = extra.first() {
        let what = format!("{} tensors are not used, the first is {first}", extra.len());
        warnings.push(crate::error::one_line(&what));
    }
}

/// What the data says about the quantisation, with a warning where the configuration says otherwise.
fn decide_quant(stated: &StatedQuant, facts: &[MatrixFacts], warnings: &mut Vec<String>) -> QuantConfig {
    let zero_offset = gptq::zero_offset(facts, stated.v2, stated.sym);
    let sym =
        facts.iter().all(|f| f.stored_zero.is_some_and(|stored| gptq::is_symmetric(stored, zero_offset)));
    if zero_offset == 1 && stated.v2 || zero_offset == 0 && !stated.v2 {
        let (label, data) = if stated.v2 { ("gptq_v2", "version 1") } else { ("gptq", "version 2") };
        warnings
            .push(format!("the checkpoint is labelled {label} but its zero points are {data}'s; they count"));
    }
    if stated.sym == Some(true) && !sym {
        warnings.push("sym is true, but not every zero point is 8: read as asymmetric".to_owned());
    }
    if zero_offset == 1 && facts.iter().any(|f| f.stores_15) {
        warnings.push(
            "some zero points are stored as 15, which version 1 cannot tell from -1: read as 0, as AutoGPTQ since 0.6"
                .to_owned(),
        );
    }
    QuantConfig {
        bits: 4,
        group_size: stated.group_size.flatten(),
        desc_act: facts.iter().any(|f| f.act_order),
        sym,
        zero_offset,
    }
}
