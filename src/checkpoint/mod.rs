//! Maps a checkpoint and hands out checked views of its tensors.
//!
//! ```text
//! resolve    what the user wrote -> a folder and its weights files      source     files, mapped
//! container  safetensors headers -> names, dtypes, shapes, places       float      F32, F16, BF16
//! gptq       one quantised matrix: its tensors and zero points          scan       reads the data once
//! open       puts the steps together
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
mod open;
mod resolve;
mod scan;
mod source;

use std::fmt;
use std::path::PathBuf;

use crate::config::{ModelConfig, QuantConfig};
use crate::error::{Error, Result};
use container::{Container, Place};
use gptq::{Matrix, MatrixFacts};
use source::{Bytes, Folder};

pub use float::{FloatTensor, FloatType};
pub use gptq::GptqTensor;

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
        open::open(&location.folder, location.name, location.weights.as_deref())
    }

    /// A checkpoint whose files are in memory (the built-in model). `files`: names as in a folder, with contents.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_static(name: &str, files: &[(&'static str, &'static [u8])]) -> Result<Checkpoint> {
        let folder = Folder::Static { name: name.to_owned(), files: files.to_vec() };
        open::open(&folder, name.to_owned(), None)
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
