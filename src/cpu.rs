//! The `cpu` device: the forward pass made of the [reference](mod@crate::reference) ops, f32 throughout.
//!
//! It runs everything but the kernels on a machine without a GPU, and says what a GPU's logits should be. Weights
//! stay in the mapped files; a timeline's KV cache is f32, 512 bytes per token and layer.
//!
//! Cost: one token of the demonstration model takes milliseconds, one of Falcon-7B seconds.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::checkpoint::{Checkpoint, GptqTensor, LayerTensors, NormTensors};
use crate::error::{Error, Result};
use crate::layout::HEAD_DIM;
use crate::reference;
use crate::sampler::{self, Sampled, Sampling};
use crate::speculate::{self, MOST_DRAFTS, Pace, Tally};

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

    /// Of [`CpuModel::weight_bytes`], bytes that a decode step reads: all but an embedding that is not the head.
    #[must_use]
    pub fn step_weight_bytes(&self) -> u64 {
        let apart = self.checkpoint.lm_head().is_some();
        self.weight_bytes() - if apart { self.checkpoint.embedding().bytes.len() as u64 } else { 0 }
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
    stop_ids: Vec<u32>,
    /// Every token so far, the chosen ones included.
    history: Vec<u32>,
    /// Tokens of the next step: the last chosen one, which is not in the cache yet, and drafts of what follows. Empty
    /// before the first choice.
    step: Vec<u32>,
    /// Tokens chosen, handed out or not.
    made: usize,
    pace: Pace,
    /// Chosen but not handed out, with the row and the drafts of their step.
    waiting: VecDeque<(Sampled, usize, usize)>,
    tally: Tally,
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
        self.cut(position);
        Ok(())
    }

    /// Takes the positions from `position` on off the cache.
    fn cut(&mut self, position: usize) {
        self.position = position;
        for layer in &mut self.cache {
            layer.keys.truncate(position * HEAD_DIM);
            layer.values.truncate(position * HEAD_DIM);
        }
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

    /// Prepares [`CpuTimeline::next_token`]: how to choose, the ids that end the text, and every token so far (as many as
    /// the cache holds), over which the repetition penalty counts.
    ///
    /// # Errors
    /// [`Error::Usage`] if `history` has another length.
    pub fn begin(&mut self, sampling: &Sampling, stop_ids: &[u32], history: &[u32]) -> Result<()> {
        if history.len() != self.position {
            let (got, held) = (history.len(), self.position);
            return Err(Error::Usage(format!(
                "begin: got a history of {got} tokens, the cache holds {held}"
            )));
        }
        self.choices = Some(Choices {
            sampling: sampling.clone(),
            stop_ids: stop_ids.to_vec(),
            history: history.to_vec(),
            step: Vec::new(),
            made: 0,
            pace: Pace::default(),
            waiting: VecDeque::new(),
            tally: Tally::default(),
        });
        Ok(())
    }

    /// Chooses the token after the last one. It is put into the cache by the `next_token` that follows, if one does. With
    /// [`Sampling::speculate`] a call may choose several, which the following calls hand out; they are in the cache by then.
    ///
    /// # Errors
    /// [`Error::Usage`] if [`CpuTimeline::begin`] was not called, no logits are held (after a rewind), or the
    /// context is full; [`Error::Cuda`] from [`sampler::sample`] if the logits are not numbers.
    pub fn next_token(&mut self) -> Result<Sampled> {
        let Some(mut choices) = self.choices.take() else {
            return Err(Error::Usage("next_token: call begin first".to_owned()));
        };
        if choices.waiting.is_empty() {
            self.step(&mut choices)?;
        }
        let Some((sampled, row, drafts)) = choices.waiting.pop_front() else {
            return Err(Error::Usage(
                "next_token: no logits are held; prefill at least one token first".to_owned(),
            ));
        };
        choices.tally.count(row, drafts);
        self.choices = Some(choices);
        Ok(sampled)
    }

    /// What the steps since `begin` came to, of the tokens handed out.
    #[must_use]
    pub fn tally(&self) -> Tally {
        self.choices.as_ref().map_or(Tally::default(), |choices| choices.tally)
    }

    /// Runs the tokens of a step and chooses what follows: a token, and one more for each draft that was right.
    fn step(&mut self, choices: &mut Choices) -> Result<()> {
        let vocab = self.model.checkpoint.config().vocab_size;
        let start = self.position;
        let logits = if choices.step.is_empty() {
            self.logits.take().unwrap_or_default()
        } else {
            let x = self.append(&choices.step)?;
            self.model.head(&x)
        };
        let drafts = choices.step.get(1..).unwrap_or(&[]);
        for (row, logits) in logits.chunks_exact(vocab).enumerate() {
            let sampled = match sampler::sample(logits, &choices.history, &choices.sampling) {
                Ok(sampled) => sampled,
                Err(error) if row == 0 => return Err(error),
                // It comes up again when the tokens in front of it have been handed out.
                Err(_) => break,
            };
            choices.history.push(sampled.id);
            choices.waiting.push_back((sampled, row, drafts.len()));
            if drafts.get(row) != Some(&sampled.id) || choices.stop_ids.contains(&sampled.id) {
                break;
            }
        }
        let chosen = choices.waiting.len();
        choices.made += chosen;
        if !choices.step.is_empty() {
            self.cut(start + chosen);
        }
        if let Some(last) = logits.chunks_exact(vocab).nth(chosen.saturating_sub(1)) {
            self.logits = Some(last.to_vec());
        }

        let may_draft = choices.pace.next(drafts.len(), chosen.saturating_sub(1));
        let Choices { history, sampling, .. } = &*choices;
        let room = speculate::room(self.position, self.max_context, choices.made, sampling.max_new_tokens);
        let most = if sampling.speculate && may_draft { room.min(MOST_DRAFTS) } else { 0 };
        let drafts = speculate::draft(history, most);
        choices.step = history.last().copied().into_iter().chain(drafts).collect();
        Ok(())
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
