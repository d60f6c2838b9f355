//! What `config.json`, `generation_config.json` and `quantize_config.json` say, in one dialect.

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
        self.hidden_size + 2 * crate::layout::HEAD_DIM
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
