//! What bindgen made of `cuda/kernels.h` and `cuda/probes.h`: parameter structs and launchers.
#![allow(missing_docs, non_camel_case_types, dead_code, unreachable_pub, clippy::all)]
// Generated: zeroing a plain C struct, and nothing a comment of ours could prove.
#![allow(clippy::undocumented_unsafe_blocks, clippy::multiple_unsafe_ops_per_block)]

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
