//! Every kernel against `src/reference.rs`, at Falcon-7B's shapes and at the edges. Outputs start as NaN; each case runs twice and
//! must give the same bits. Skipped, loudly, where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::single_range_in_vec_init,
    unreachable_pub,
    reason = "tests"
)]

mod attention;
mod attn_decode;
mod awaited;
mod gelu;
#[path = "../common/gpu.rs"]
mod gpu;
mod kit;
mod matmul;
mod planes;
mod rows;
mod sampling;
mod table;
mod units;
