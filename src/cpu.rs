//! The `cpu` device: the forward pass made of the [reference](mod@crate::reference) ops, f32 throughout.
//!
//! It runs everything but the kernels on a machine without a GPU, and says what a GPU's logits should be. Weights
//! stay in the mapped files; a timeline's KV cache is f32, 512 bytes per token and layer.
//!
//! Cost: one token of the demonstration model takes milliseconds, one of Falcon-7B seconds.

use std::sync::Arc;

use crate::checkpoint::{Checkpoint, GptqTensor, LayerTensors, NormTensors};
use crate::error::{Error, Result};
use crate::layout::HEAD_DIM;
use crate::reference;
use crate::sampler::{self, Sampled, Sampling};

/// Positions whose logits are computed together: bounds the memory of [`CpuTimeline::logits`], 17 MB for Falcon-7B.
const LOGIT_ROWS: usize = 64;

/// A model on the CPU: its checkpoint, as it is mapped.
pub struct CpuModel {
    checkpoint: Arc<Checkpoint>,
}

impl CpuModel {
    /// The model of an opened checkpoint. Nothing is read or copied yet.
    ///
    /// # Errors
    /// None today; a device that allocates may fail.
    pub fn load(checkpoint: Arc<Checkpoint>) -> Result<CpuModel> {
        Ok(CpuModel { checkpoint })
    }

    /// Bytes of the tensors a forward pass reads.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        let norm = |n: &NormTensors<'_>| n.weight.bytes.len() + n.bias.bytes.len();
        let matrix = |w: &GptqTensor<'_>| {
            let bias = w.bias.map_or(0, |b| b.bytes.len());
            w.qweight.len() + w.qzeros.len() + w.scales.bytes.len() + w.g_idx.map_or(0, <[u8]>::len) + bias
        };
        let head = self.checkpoint.lm_head().map_or(0, |head| head.bytes.len());
        let mut bytes = self.checkpoint.embedding().bytes.len() + norm(&self.checkpoint.final_norm()) + head;
        for index in 0..self.checkpoint.config().num_layers {
            let layer = self.checkpoint.layer(index);
            bytes += norm(&layer.input_layernorm) + matrix(&layer.query_key_value) + matrix(&layer.dense);
            bytes += matrix(&layer.dense_h_to_4h) + matrix(&layer.dense_4h_to_h);
        }
        bytes as u64
    }

    /// The residual stream [ids, hidden] after the first `layers` layers, of a text that is `ids` and nothing more.
    /// It is what to compare with when logits differ and one wants to know where it began.
    ///
    /// # Errors
    /// [`Error::Usage`] if an id is not in the vocabulary or the model has fewer layers.
    pub fn hidden(&self, ids: &[u32], layers: usize) -> Result<Vec<f32>> {
        self.check_ids(ids)?;
        let available = self.checkpoint.config().num_layers;
        if layers > available {
            return Err(Error::Usage(format!("hidden: got {layers} layers, the model has {available}")));
        }
        let mut cache = vec![LayerCache::default(); layers];
        Ok(self.forward(ids, &mut cache, 0))
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.checkpoint.config().vocab_size;
        match ids.iter().position(|&id| id as usize >= vocab) {
            Some(i) => Err(Error::Usage(format!("token {i} is id {}, wanted an id below {vocab}", ids[i]))),
            None => Ok(()),
        }
    }

    /// Runs `ids` at positions `start`.. through the first `cache.len()` layers, and appends their keys and values
    /// to the cache: [ids, hidden].
    fn forward(&self, ids: &[u32], cache: &mut [LayerCache], start: usize) -> Vec<f32> {
        let mut x = reference::embed(&self.checkpoint.embedding(), ids);
        for (index, cache) in cache.iter_mut().enumerate() {
            self.layer(&mut x, &self.checkpoint.layer(index), cache, start);
        }
        x
    }

    /// One decoder layer: attention and MLP read the same norm, and both are added to x [m, hidden].
    fn layer(&self, x: &mut [f32], layer: &LayerTensors<'_>, cache: &mut LayerCache, start: usize) {
        let config = self.checkpoint.config();
        let normed = self.norm(x, &layer.input_layernorm);
        let qkv = reference::gptq_matmul(&normed, &layer.query_key_value);
        let mut q = Vec::with_capacity(x.len());
        for row in qkv.chunks_exact(config.qkv_size()) {
            let (queries, key_value) = row.split_at(config.hidden_size);
            q.extend_from_slice(queries);
            cache.keys.extend_from_slice(&key_value[..HEAD_DIM]);
            cache.values.extend_from_slice(&key_value[HEAD_DIM..]);
        }
        reference::rope(&mut q, config.num_heads, start, config.rope_theta);
        reference::rope(&mut cache.keys[start * HEAD_DIM..], 1, start, config.rope_theta);
        let attended = reference::attention(&q, &cache.keys, &cache.values, config.num_heads, start);
        let attention_out = reference::gptq_matmul(&attended, &layer.dense);
        let mut up = reference::gptq_matmul(&normed, &layer.dense_h_to_4h);
        reference::gelu(&mut up);
        let mut out = reference::gptq_matmul(&up, &layer.dense_4h_to_h);
        reference::add(&mut out, &attention_out);
        reference::add(x, &out);
    }

    fn norm(&self, x: &[f32], norm: &NormTensors<'_>) -> Vec<f32> {
        let epsilon = self.checkpoint.config().norm_epsilon;
        reference::layernorm(x, &norm.weight.to_f32(), &norm.bias.to_f32(), epsilon)
    }

    /// Logits [m, vocab] of the residual stream x [m, hidden] after the last layer.
    fn head(&self, x: &[f32]) -> Vec<f32> {
        let head = self.checkpoint.lm_head().unwrap_or_else(|| self.checkpoint.embedding());
        reference::head(&self.norm(x, &self.checkpoint.final_norm()), &head)
    }
}

/// Rotated keys and values [context, 64] of one layer.
#[derive(Debug, Clone, Default)]
struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// What `begin` was told, and what has been chosen since.
struct Choices {
    sampling: Sampling,
    /// Every token so far, the chosen ones included.
    history: Vec<u32>,
    /// The last chosen token, as long as it is not in the cache.
    pending: Option<u32>,
}

/// One sequence on the CPU: its KV cache, and the logits of its last token.
pub struct CpuTimeline {
    model: Arc<CpuModel>,
    max_context: usize,
    /// One entry a layer.
    cache: Vec<LayerCache>,
    position: usize,
    /// `[vocab]`: of the last token in the cache. `None` while that token's logits were not asked for.
    logits: Option<Vec<f32>>,
    choices: Option<Choices>,
}

impl CpuTimeline {
    /// An empty timeline that may grow to `max_context` tokens. The cache grows with its tokens.
    ///
    /// # Errors
    /// None today; a device that allocates may fail.
    pub fn new(model: Arc<CpuModel>, max_context: usize) -> Result<CpuTimeline> {
        let cache = vec![LayerCache::default(); model.checkpoint.config().num_layers];
        Ok(CpuTimeline { model, max_context, cache, position: 0, logits: None, choices: None })
    }

    /// Tokens in the KV cache.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position
    }

    /// Forgets every token from `position` on, and a chosen token that is not in the cache yet.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are fewer tokens than that.
    pub fn rewind(&mut self, position: usize) -> Result<()> {
        if position > self.position {
            let held = self.position;
            return Err(Error::Usage(format!(
                "rewind to position {position}: the cache holds {held} tokens"
            )));
        }
        self.choices = None;
        if position < self.position {
            self.logits = None;
        }
        self.position = position;
        for layer in &mut self.cache {
            layer.keys.truncate(position * HEAD_DIM);
            layer.values.truncate(position * HEAD_DIM);
        }
        Ok(())
    }

    /// Appends `ids` in one pass and holds the logits of the last.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are no ids, one is not in the vocabulary, or they do not fit into the context;
    /// nothing has changed then.
    pub fn prefill(&mut self, ids: &[u32]) -> Result<()> {
        self.choices = None;
        let x = self.append(ids)?;
        self.hold_last(&x);
        Ok(())
    }

    /// Appends `ids` and hands the logits `[vocab]` of each to `sink`, in order: from one pass over all of them, or
    /// with `token_by_token` from one forward pass a token.
    ///
    /// # Errors
    /// As [`CpuTimeline::prefill`], and whatever `sink` returns; the ids may be in the cache then.
    pub fn logits(
        &mut self,
        ids: &[u32],
        token_by_token: bool,
        sink: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        self.choices = None;
        self.check(ids)?;
        let config = self.model.checkpoint.config();
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        for ids in ids.chunks(if token_by_token { 1 } else { ids.len() }) {
            let x = self.append(ids)?;
            for x in x.chunks(LOGIT_ROWS * hidden) {
                let logits = self.model.head(x);
                logits.chunks_exact(vocab).try_for_each(&mut *sink)?;
                self.logits = logits.chunks_exact(vocab).next_back().map(<[f32]>::to_vec);
            }
        }
        Ok(())
    }

    /// Prepares [`CpuTimeline::next_token`]: how to choose, and every token so far (as many as the cache holds), over
    /// which the repetition penalty counts.
    ///
    /// # Errors
    /// [`Error::Usage`] if `history` has another length.
    pub fn begin(&mut self, sampling: &Sampling, history: &[u32]) -> Result<()> {
        if history.len() != self.position {
            let (got, held) = (history.len(), self.position);
            return Err(Error::Usage(format!(
                "begin: got a history of {got} tokens, the cache holds {held}"
            )));
        }
        self.choices = Some(Choices { sampling: sampling.clone(), history: history.to_vec(), pending: None });
        Ok(())
    }

    /// Chooses the token after the last one. It is put into the cache by the `next_token` that follows, if one does.
    ///
    /// # Errors
    /// [`Error::Usage`] if [`CpuTimeline::begin`] was not called, no logits are held (after a rewind), or the
    /// context is full; [`Error::Cuda`] from [`sampler::sample`] if the logits are not numbers.
    pub fn next_token(&mut self) -> Result<Sampled> {
        let Some(mut choices) = self.choices.take() else {
            return Err(Error::Usage("next_token: call begin first".to_owned()));
        };
        if let Some(id) = choices.pending {
            let x = self.append(&[id])?;
            self.hold_last(&x);
        }
        let Some(logits) = &self.logits else {
            return Err(Error::Usage(
                "next_token: no logits are held; prefill at least one token first".to_owned(),
            ));
        };
        let sampled = sampler::sample(logits, &choices.history, &choices.sampling)?;
        choices.history.push(sampled.id);
        choices.pending = Some(sampled.id);
        self.choices = Some(choices);
        Ok(sampled)
    }

    /// Whether `ids` can be appended.
    fn check(&self, ids: &[u32]) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::Usage("there are no tokens to append, wanted at least one".to_owned()));
        }
        if ids.len() > self.max_context - self.position {
            let (held, new, most) = (self.position, ids.len(), self.max_context);
            return Err(Error::Usage(format!(
                "the context is full: {held} tokens and {new} more, wanted at most {most} in all"
            )));
        }
        self.model.check_ids(ids)
    }

    /// Runs `ids` and puts them into the cache: [ids, hidden] after the last layer.
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.check(ids)?;
        self.logits = None;
        let x = self.model.forward(ids, &mut self.cache, self.position);
        self.position += ids.len();
        Ok(x)
    }

    /// Computes and holds the logits of the last row of x [m, hidden].
    fn hold_last(&mut self, x: &[f32]) {
        let hidden = self.model.checkpoint.config().hidden_size;
        self.logits = Some(self.model.head(&x[x.len() - hidden..]));
    }
}
