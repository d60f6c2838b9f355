//! The public door: an [`Engine`] is a loaded model, a [`Session`] is one text that grows, a [`Generation`] is an
//! answer being written.
//!
//! ```text
//! mod        Engine: opens a checkpoint, chooses the device, loads the tokenizer
//! device     the model and its timelines on the CPU or the GPU, behind one set of methods
//! session    Session: the tokens so far, what of them is in the KV cache, prompts and logits
//! generation Generation: one token after the other, when to stop, how fast it was
//! batch      Batch: several texts answered together, in token ids
//! ```
//!
//! An engine never changes and is cheap to clone; its sessions share the weights. A session is used by one thread
//! at a time. Nothing here names a kernel or does arithmetic.

mod batch;
mod device;
mod generation;
mod session;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::timing::{LoadPart, LoadTimes};
use crate::tokenizer::Tokenizer;

pub use batch::Batch;
pub use device::Device;
pub use generation::{Generation, GenerationStats, StopReason, Token};
pub use session::Session;

/// Most texts of a [`Batch`].
const MOST_SLOTS: usize = 64;

/// How a model is loaded. The default: on a GPU if one can be used, else on the CPU, silently.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoadOptions {
    /// Where the model runs.
    pub device: Device,
    /// Called while weights are copied to a GPU, with the bytes done and the bytes in all. The CPU copies none.
    pub progress: Option<fn(done_bytes: u64, total_bytes: u64)>,
}

/// What a session is made with.
#[derive(Debug, Clone, Copy, Default)]
pub struct SessionOptions {
    /// Tokens the session may hold, prompt and answer together; `None` is all the positions the model was trained
    /// for (2048).
    pub max_context: Option<usize>,
}

/// Memory a loaded model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes of the weights: on the GPU, where Hopper has those twice that a decode step reads, or on the CPU of the mapped files.
    pub weight_bytes: u64,
    /// Of those, bytes that a decode step reads, once: all but an embedding that is not the head.
    pub step_weight_bytes: u64,
    /// Bytes a token takes in a session's KV cache.
    pub kv_bytes_per_token: u64,
    /// Bytes in use on the GPU by this process and all others, if the device can tell.
    pub gpu_used_bytes: Option<u64>,
}

/// A loaded model. Immutable, cheap to clone, and usable from several threads at once.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    checkpoint: Arc<Checkpoint>,
    tokenizer: Result<Tokenizer>,
    stop_ids: Vec<u32>,
    model: device::Model,
    device_name: String,
    fallback_reason: Option<String>,
    load_parts: Vec<LoadPart>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine({} on {})", self.inner.checkpoint.name(), self.inner.device_name)
    }
}

impl Engine {
    /// Opens `model` (a folder, a `.safetensors` file, or a name in the local Hugging Face cache) and loads it.
    ///
    /// # Errors
    /// [`Error::Model`] if a file is missing, damaged or not supported; [`Error::NoGpu`] if a GPU was asked for and
    /// there is none, [`Error::OutOfGpuMemory`] and [`Error::Cuda`] if it cannot hold or run the model. Only
    /// [`Error::NoGpu`] makes [`Device::Auto`] fall back to the CPU.
    pub fn load(model: &str, options: &LoadOptions) -> Result<Engine> {
        Engine::from_checkpoint(Checkpoint::open(model)?, options)
    }

    /// Loads an opened checkpoint.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn from_checkpoint(checkpoint: Checkpoint, options: &LoadOptions) -> Result<Engine> {
        let mut times = LoadTimes::begin();
        let checkpoint = Arc::new(checkpoint);
        let file = Path::new(checkpoint.name()).join("tokenizer.json");
        let tokenizer = checkpoint.tokenizer_json().and_then(|bytes| Tokenizer::from_json(bytes, &file));
        times.lap("tokenizer");
        let mut load_parts = times.parts().to_vec();
        let (model, fallback_reason) = device::Model::load(&checkpoint, options, &mut load_parts)?;
        let device_name = model.device_name();
        // The checkpoint's own come first: a GPU knows the first sixteen.
        let mut stop_ids = checkpoint.config().eos_ids.clone();
        if let Ok(tokenizer) = &tokenizer {
            let special = (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.is_special(id));
            let others: Vec<u32> = special.filter(|id| !stop_ids.contains(id)).collect();
            stop_ids.extend(others);
        }
        let inner =
            Inner { checkpoint, tokenizer, stop_ids, model, device_name, fallback_reason, load_parts };
        Ok(Engine { inner: Arc::new(inner) })
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.inner.checkpoint.config()
    }

    /// The files the model was loaded from.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.inner.checkpoint
    }

    /// The checkpoint's tokenizer.
    ///
    /// # Errors
    /// [`Error::Model`] if `tokenizer.json` is missing or damaged. Token ids work without it.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.inner.tokenizer.as_ref().map_err(Error::clone)
    }

    /// What the model runs on: `cpu (reference, 2 threads)` or `NVIDIA H200 (cuda:0)`.
    #[must_use]
    pub fn device_name(&self) -> &str {
        &self.inner.device_name
    }

    /// Why [`Device::Auto`] chose the CPU; `None` if it did not.
    #[must_use]
    pub fn fallback_reason(&self) -> Option<&str> {
        self.inner.fallback_reason.as_deref()
    }

    /// How long the parts of [`Engine::from_checkpoint`] took; on the CPU there is little to do.
    #[must_use]
    pub fn load_parts(&self) -> &[LoadPart] {
        &self.inner.load_parts
    }

    /// Memory the model takes.
    #[must_use]
    pub fn memory(&self) -> MemoryUse {
        self.inner.model.memory(self.config())
    }

    /// A new, empty session.
    ///
    /// # Errors
    /// [`Error::Usage`] if `max_context` is 0 or more than the model's positions; [`Error::OutOfGpuMemory`] if the
    /// KV cache does not fit.
    pub fn session(&self, options: SessionOptions) -> Result<Session> {
        let max_context = self.max_context(options)?;
        Ok(Session::new(self.clone(), self.inner.model.timeline(max_context)?, max_context))
    }

    /// Room for `slots` texts (1 to 64) that are answered together, each with a context of its own.
    ///
    /// On Hopper the first batch of more than 8 lays the layers' weights once more in GPU memory (4.9 GB for Falcon-7B), if half of what is free
    /// is enough: its steps take less time so. They stay as long as the engine.
    ///
    /// # Errors
    /// As [`Engine::session`]; [`Error::Usage`] if `slots` is out of range.
    pub fn batch(&self, slots: usize, options: SessionOptions) -> Result<Batch> {
        let max_context = self.max_context(options)?;
        if slots == 0 || slots > MOST_SLOTS {
            return Err(Error::Usage(format!("a batch of {slots} texts: wanted 1 to {MOST_SLOTS}")));
        }
        Batch::new(self.clone(), &self.inner.model, slots, max_context)
    }

    fn max_context(&self, options: SessionOptions) -> Result<usize> {
        let positions = self.config().max_positions;
        let max_context = options.max_context.unwrap_or(positions);
        if max_context == 0 || max_context > positions {
            return Err(Error::Usage(format!(
                "a context of {max_context} tokens: wanted 1 to {positions}, the positions the model was trained for"
            )));
        }
        Ok(max_context)
    }

    /// Ids that end a text: `<|endoftext|>`, the checkpoint's own end ids, and the tokenizer's other special tokens,
    /// which no Falcon answer contains.
    fn stop_ids(&self) -> &[u32] {
        &self.inner.stop_ids
    }
}
