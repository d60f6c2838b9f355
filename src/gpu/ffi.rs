//! What bindgen made of `cuda/kernels.h`: parameter structs and launchers.
#![allow(missing_docs, non_camel_case_types, dead_code, unreachable_pub, clippy::all)]

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
