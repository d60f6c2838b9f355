//! What a test does that needs a GPU: with `#[path = "common/gpu.rs"] mod gpu;`.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]
#![allow(clippy::expect_used, clippy::panic, reason = "a test's helper fails by panicking")]

use std::io::Write;

use peregrine::{Error, Result};

/// What was opened or loaded; `None`, said loudly, when there is no GPU. With PEREGRINE_REQUIRE_GPU=1 that is a failure instead.
pub fn unless_no_gpu<T>(loaded: Result<T>) -> Option<T> {
    match loaded {
        Ok(loaded) => Some(loaded),
        Err(Error::NoGpu(reason)) => {
            let required = std::env::var("PEREGRINE_REQUIRE_GPU").is_ok_and(|v| v == "1");
            assert!(!required, "PEREGRINE_REQUIRE_GPU=1, but {reason}");
            // Not eprintln!, which the test harness hides when a test passes.
            let test = std::thread::current().name().unwrap_or_default().to_owned();
            let line = format!("SKIPPED {test}: {reason}; PEREGRINE_REQUIRE_GPU=1 makes this a failure\n");
            std::io::stderr().write_all(line.as_bytes()).expect("stderr");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The first GPU, and a stream on it.
#[cfg(feature = "cuda")]
pub fn gpu() -> Option<(peregrine::gpu::Gpu, peregrine::gpu::Stream)> {
    let gpu = unless_no_gpu(peregrine::gpu::Gpu::open(0))?;
    let stream = unless_no_gpu(gpu.stream())?;
    Some((gpu, stream))
}
