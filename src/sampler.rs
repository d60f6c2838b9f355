//! Choosing the next token: Hugging Face `generate` semantics.

/// How tokens are chosen and when a text ends. Defaults are Hugging Face's (`do_sample=False`).
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy (no sampling); otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the k most likely ids when sampling; 0 disables. Hugging Face's default is 50.
    pub top_k: usize,
    /// Keep the smallest set of ids whose probabilities sum to more than this; 1 disables.
    pub top_p: f32,
    /// Drop ids less likely than this times the most likely; 0 disables.
    pub min_p: f32,
    /// Every id seen in prompt or output has its logit divided (if positive) or multiplied (if negative); 1 disables.
    pub repetition_penalty: f32,
    /// No run of this many ids occurs twice; 0 disables.
    pub no_repeat_ngram_size: usize,
    /// Seed of the random choice. The same seed gives the same text.
    pub seed: u64,
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Go on after an end-of-text id (for measuring).
    pub ignore_eos: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 50,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            no_repeat_ngram_size: 0,
            seed: 0,
            max_new_tokens: 512,
            stop: Vec::new(),
            ignore_eos: false,
        }
    }
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub id: u32,
    /// Natural logarithm of its probability under the model's own logits (before any processing).
    pub logprob: f32,
}
