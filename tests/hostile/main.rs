//! Damaged and hostile checkpoints: each gets one line that names what is wrong, and nothing panics or eats memory.
//!
//! Every case starts from one layer of the tiny model (0.6 MB) and spoils one thing. A counting allocator bounds what
//! opening may take from the heap, whatever the files say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // in helpers, too

mod config;
mod container;
mod kit;
mod mutated;
mod places;
mod tensors;
#[path = "../common/variants/mod.rs"]
mod variants;
