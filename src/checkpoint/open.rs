//! Opening a checkpoint, step by step: configuration, files, places of the tensors, their data.

use std::collections::BTreeSet;
use std::path::PathBuf;

use safetensors::Dtype;
use serde_json::{Map, Value};

use super::container::{Container, WeightFile};
use super::gptq::{self, Matrix, MatrixFacts};
use super::source::{Folder, MAX_JSON_BYTES, MAX_TOKENIZER_BYTES};
use super::{Checkpoint, LayerPlaces, NormPlaces, Places, resolve, scan};
use crate::config::{self, ModelConfig, ParsedConfig, QuantConfig, StatedQuant};
use crate::error::{Error, Result, one_line};

const EMBEDDING: &str = "transformer.word_embeddings.weight";
const LM_HEAD: &str = "lm_head.weight";
const FINAL_NORM: &str = "transformer.ln_f";

/// Opens the model in `folder`; `weights`: the file with its weights, if the user named it.
pub(super) fn open(folder: &Folder, name: String, weights: Option<&str>) -> Result<Checkpoint> {
    let (parsed, mut stated) = read_configs(folder)?;
    let ParsedConfig { model: config, mut warnings, .. } = parsed;
    let files = resolve::weight_files(folder, weights, &stated, &mut warnings)?
        .into_iter()
        .map(|(file, bytes)| WeightFile { path: folder.path(&file), bytes })
        .collect();
    let container = Container::new(files)?;
    complete_from_tensors(&container, &config, &mut stated, &mut warnings)?;
    let mut places = find_tensors(&container, &config, &stated, parsed.needs_bias, parsed.needs_lm_head)?;
    warn_of_extra_tensors(&container, &places, &mut warnings);
    let (facts, tied) = places.scan(&container, &stated)?;
    let quant = decide_quant(&stated, &facts, &mut warnings);
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
    // They may quote the files.
    let warnings = warnings.iter().map(|warning| one_line(warning)).collect();
    Ok(Checkpoint { name, container, config, quant, places, facts, tokenizer, warnings, instruct })
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
        warnings.push(format!("{} tensors are not used, the first is {first}", extra.len()));
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
            "some zero points are stored as 15, which version 1 cannot tell from -1: read as 0, as AutoGPTQ since late 2023"
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
