//! Maps a checkpoint and hands out checked views of its tensors.

use crate::config::{ModelConfig, QuantConfig};
use crate::error::Result;

/// Type of a stored float tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType { F32, F16, BF16 }

/// A view of a float tensor in the file. The bytes may be unaligned.
#[derive(Debug, Clone, Copy)]
pub struct FloatTensor<'a> { pub dtype: FloatType, pub shape: [usize; 2], pub bytes: &'a [u8] }
impl FloatTensor<'_> {
    pub fn len(&self) -> usize { self.shape[0] * self.shape[1] }
    pub fn get(&self, i: usize) -> f32 { let _ = i; todo!() }
    pub fn to_f32(&self) -> Vec<f32> { todo!() }
    pub fn to_f16_bits(&self) -> Vec<u16> { todo!() }
}

/// A view of one quantised matrix, `y = x W^T + bias`, `W[n, k] = f16(scale[g(k), n] * (code[k, n] - zero[g(k), n]))`.
#[derive(Debug, Clone)]
pub struct GptqTensor<'a> {
    /// `transformer.h.3.mlp.dense_h_to_4h`
    pub name: String,
    /// Inputs.
    pub k: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs per group (k itself when the file says -1).
    pub group_size: usize,
    /// [k / 8, n] little-endian words, lowest nibble = lowest k.
    pub qweight: &'a [u8],
    /// [groups, n / 8] little-endian words, lowest nibble = lowest n; the stored value, before `zero_offset`.
    pub qzeros: &'a [u8],
    /// 1 (v1) or 0 (v2): zero = (stored + zero_offset), masked to 4 bits as AutoGPTQ's kernels do for asymmetric v1.
    pub zero_offset: u8,
    /// Some(8) when every zero point of the matrix is 8.
    pub constant_zero: Option<u8>,
    /// [groups, n]
    pub scales: FloatTensor<'a>,
    /// Group of each input, [k] little-endian i32; `None` when it is k / group_size.
    pub g_idx: Option<&'a [u8]>,
    /// [n]; `None` when absent or all zero.
    pub bias: Option<FloatTensor<'a>>,
}

/// Weight and bias of a LayerNorm, each [hidden_size].
#[derive(Debug, Clone, Copy)]
pub struct NormTensors<'a> { pub weight: FloatTensor<'a>, pub bias: FloatTensor<'a> }

/// The tensors of one decoder layer.
#[derive(Debug, Clone)]
pub struct LayerTensors<'a> {
    pub input_layernorm: NormTensors<'a>,
    pub query_key_value: GptqTensor<'a>,
    pub dense: GptqTensor<'a>,
    pub dense_h_to_4h: GptqTensor<'a>,
    pub dense_4h_to_h: GptqTensor<'a>,
}

/// An opened checkpoint: mapped files, every tensor checked.
pub struct Checkpoint { _private: () }
impl Checkpoint {
    /// `model`: a folder, a .safetensors file, or a hub name in the local Hugging Face cache.
    pub fn open(model: &str) -> Result<Checkpoint> { let _ = model; todo!() }
    /// A checkpoint whose files are in memory (the built-in model).
    pub fn from_static(name: &str, files: &[(&'static str, &'static [u8])]) -> Result<Checkpoint> { let _ = (name, files); todo!() }
    pub fn config(&self) -> &ModelConfig { todo!() }
    pub fn quant(&self) -> &QuantConfig { todo!() }
    pub fn layer(&self, index: usize) -> LayerTensors<'_> { let _ = index; todo!() }
    pub fn final_norm(&self) -> NormTensors<'_> { todo!() }
    /// [vocab_size, hidden_size]
    pub fn embedding(&self) -> FloatTensor<'_> { todo!() }
    /// [vocab_size, hidden_size]; `None` when absent or equal to the embedding.
    pub fn lm_head(&self) -> Option<FloatTensor<'_>> { todo!() }
    /// Contents of tokenizer.json, or the error that says it is missing.
    pub fn tokenizer_json(&self) -> Result<&[u8]> { todo!() }
    /// Things worth telling the user once, one line each.
    pub fn warnings(&self) -> &[String] { todo!() }
    /// Whether this is an instruct checkpoint (its name says so): the default prompt template depends on it.
    pub fn is_instruct(&self) -> bool { todo!() }
}
