//! What a prompt and a step must move and do: the floor of any program for this model, whatever its kernels.

use crate::config::ModelConfig;
use crate::engine::Engine;
use crate::layout::HEAD_DIM;

/// Bytes to move and floating-point operations to do.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Bytes that must come from memory or go there, each once.
    pub bytes: f64,
    /// Two for a multiply-add.
    pub flop: f64,
}

impl Work {
    /// Seconds on a machine with these ceilings, bytes and operations a second.
    #[must_use]
    pub fn floor_seconds(&self, bytes_per_second: f64, flop_per_second: f64) -> f64 {
        (self.bytes / bytes_per_second).max(self.flop / flop_per_second)
    }
}

/// Weights of the quantised matrices of all layers.
#[must_use]
pub fn matrix_weights(config: &ModelConfig) -> f64 {
    let (hidden, ffn) = (config.hidden_size, config.ffn_size);
    (config.num_layers * hidden * (config.qkv_size() + hidden + 2 * ffn)) as f64
}

/// Parameters, an embedding that is the head counted once.
#[must_use]
pub fn parameters(config: &ModelConfig) -> f64 {
    let norms = 2 * (config.num_layers + 1) * config.hidden_size;
    matrix_weights(config) + (config.vocab_size * config.hidden_size + norms) as f64
}

/// A prompt of `tokens` after `depth` others, for each of `texts`, one text after the other: the weights are read once a text.
#[must_use]
pub fn prompt(engine: &Engine, tokens: usize, depth: usize, texts: usize) -> Work {
    let config = engine.config();
    let keys: f64 = (0..tokens).map(|t| (depth + t + 1) as f64).sum();
    let attention = keys * (4 * config.num_heads * HEAD_DIM * config.num_layers) as f64;
    let head = 2.0 * (config.vocab_size * config.hidden_size) as f64;
    let kv = (depth + tokens) as f64 * engine.memory().kv_bytes_per_token as f64;
    let flop = 2.0 * matrix_weights(config) * tokens as f64 + attention + head;
    Work { bytes: texts as f64 * (engine.memory().step_weight_bytes as f64 + kv), flop: texts as f64 * flop }
}

/// A step that gives each of `texts` a token, after `context` others each.
#[must_use]
pub fn step(engine: &Engine, context: f64, texts: usize) -> Work {
    let config = engine.config();
    let weights = matrix_weights(config) + (config.vocab_size * config.hidden_size) as f64;
    let attention = (context + 1.0) * (4 * config.num_heads * HEAD_DIM * config.num_layers) as f64;
    let kv = (context + 1.0) * engine.memory().kv_bytes_per_token as f64;
    Work {
        bytes: engine.memory().step_weight_bytes as f64 + texts as f64 * kv,
        flop: texts as f64 * (2.0 * weights + attention),
    }
}
