//! # Peregrine
//!
//! A hand-written CUDA engine for Falcon-7B-Instruct GPTQ (4 bit, group 64): one model, one GPU, no framework.
//!
//! ```text
//!  files --checkpoint--> tensor views --repack--> one int4 layout --weights--> device --+
//!  text --tokenizer--> token ids -----------------------------------> engine --> forward --> logits --> sampler --> token id --> text
//!                                                     kv cache, scratch ---^       |
//!              32 x { norm -> [qkv ; up] -> rope + kv append -> attention, gelu -> [down | dense] -> + residual } -> norm -> head
//! ```
//!
//! The whole door, an [`Engine`](engine::Engine) that holds the model and a [`Session`](engine::Session) that holds one
//! text:
//!
//! ```no_run
//! use peregrine::engine::{Engine, LoadOptions, SessionOptions};
//! use peregrine::sampler::Sampling;
//!
//! # fn main() -> peregrine::Result<()> {
//! let engine = Engine::load("TheBloke/falcon-7b-instruct-GPTQ", &LoadOptions::default())?; // a path, or a name in the local hub cache
//! let mut session = engine.session(SessionOptions::default())?;
//! for token in session.generate("Tell me about AI", &Sampling::greedy().max_new_tokens(512))? {
//!     print!("{}", token?.text);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Without a GPU the same program runs on the CPU, with the [reference](mod@reference) ops; `engine.device_name()` says
//! which it is. Nothing in a model's folder is ever executed.
//!
//! A module uses only what stands left of it:
//!
//! `error, layout` < `config` < `checkpoint, repack, reference, planes` < `gpu` < `weights, kv_cache, scratch` < `forward` <
//! `cuda` < `engine` < `measure` < `lab` < the program; `sampler, speculate, tokenizer, prompt, timing` rest on
//! `layout, error` only.

pub mod checkpoint;
pub mod config;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod engine;
pub mod error;
#[cfg(feature = "cuda")]
mod forward;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod inspect;
#[cfg(feature = "cuda")]
mod kv_cache;
#[cfg(feature = "cuda")]
pub mod lab;
pub mod layout;
pub mod measure;
pub mod planes;
pub mod prompt;
pub mod reference;
pub mod repack;
pub mod sampler;
#[cfg(feature = "cuda")]
mod scratch;
pub mod speculate;
pub mod synth;
pub mod timing;
pub mod tokenizer;
#[cfg(feature = "cuda")]
mod trace;
#[cfg(feature = "cuda")]
mod weights;

pub use error::{Error, Result};
