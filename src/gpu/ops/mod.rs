//! One safe function an op: checks every buffer against the shape, then calls the launcher.
//!
//! The names are those of `cuda/kernels.h`, where each operand's shape stands; `src/reference.rs` has the same op as plain
//! loops. A launcher copies its parameters and returns at once; the work is queued on the stream.
//!
//! `product`: gptq_gemv, gptq_batch, gptq_gemm. `matrix`: gptq_repack, row_factors. `near`: gptq_near, table_near. `table`: table_repack, table_pack, embed, head. `rows`: layernorm, permute.
//! `attention`: rope, attn_decode, attn_prefill. `decode_step`: all of them in one launch. `on_sides`: to_sides. `step`: the tokens of a call. `sampling`:
//! start, sample. `probe`: unpack_check, sides, stream_read, mma_peak.

mod attention;
mod claims;
mod decode_step;
mod matrix;
mod near;
mod on_sides;
mod probe;
mod product;
mod rows;
mod sampling;
mod step;
mod table;

use std::ffi::CStr;

use super::context::Stream;
use super::ffi;
use crate::error::{Error, Result};

pub use attention::{ATTN_SHORT, AttnOutput, AttnScratch, LayerCache, attn_decode, attn_prefill, rope};
pub use decode_step::{
    DecodeLayer, DecodeModel, DecodeScratch, DecodeShape, STEP_LAYERS, decode_step, decode_step_blocks,
};
pub use matrix::{Int4Matrix, RawGptq, gptq_repack, row_factors};
pub use on_sides::{OnSides, to_sides};
pub use probe::{Exactness, SideTimes, mma_peak, mma_peak_flop, sides, stream_read, unpack_check};
pub use product::{
    Activations, MatmulKernel, MatmulOutput, NextProduct, gptq_batch_planes, gptq_matmul, slices,
};
pub use rows::{Norm, PendingSum, layernorm, permute};
pub use sampling::{SamplerShape, SamplerState, sample, start, stop};
pub use step::{STEP_FIRST, STEP_TOKEN_WORDS, StepTokens, step_token_words};
pub use table::{Table, embed, head, table_pack, table_repack};

/// Most tokens of a `gptq_gemv` or `decode_step` call.
pub const GEMV_TOKENS: usize = ffi::PEREGRINE_GEMV_TOKENS as usize;
/// Most tokens of a `gptq_batch` call.
pub const BATCH_TOKENS: usize = ffi::PEREGRINE_BATCH_TOKENS as usize;
/// Most tokens of a `head` call.
pub const HEAD_TOKENS: usize = ffi::PEREGRINE_HEAD_TOKENS as usize;
/// Most tokens of a decode step, and of an `attn_decode` call.
pub const STEP_TOKENS: usize = ffi::PEREGRINE_STEP_TOKENS as usize;

const _: () = assert!(crate::planes::PLANE_TOKENS == ffi::PEREGRINE_PLANE_TOKENS as usize);

fn u32_of(op: &str, value: usize) -> Result<u32> {
    u32::try_from(value)
        .map_err(|_| Error::Cuda { op: op.into(), what: format!("{value} does not fit 32 bits") })
}

/// What an error says of a shape that a launcher declines.
pub const DECLINED: &str = "the kernel is not written for this shape";

/// Turns a launcher's code into a result; waits when `PEREGRINE_SYNC` asks for it.
fn check(op: &str, code: i32, stream: &Stream) -> Result<()> {
    match code {
        0 if stream.sync => {
            stream.synchronize().map_err(|e| Error::Cuda { op: op.into(), what: e.to_string() })
        }
        0 => Ok(()),
        ffi::PEREGRINE_BAD_SHAPE => Err(Error::Cuda { op: op.into(), what: DECLINED.into() }),
        code => {
            Err(Error::Cuda { op: op.into(), what: format!("launch failed: {} ({code})", error_name(code)) })
        }
    }
}

#[allow(unsafe_code)]
fn error_name(code: i32) -> String {
    // SAFETY: takes any integer and returns a string constant of the CUDA runtime.
    let name = unsafe { ffi::launch_error_name(code) };
    if name.is_null() {
        return "unknown".into();
    }
    // SAFETY: not null, checked above; a nul-terminated constant that is never freed.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// Whether launches of `op` go to this program's own kernel, and not to one that somebody put in its place.
pub(crate) fn is_built_in(op: &str) -> bool {
    super::swap::launcher(op).is_none()
}

fn launch_on(stream: &Stream) -> Result<ffi::Launch> {
    let context = stream.inner.context();
    context
        .bind_to_thread()
        .map_err(|e| super::context::driver_error("using the GPU from this thread", e))?;
    Ok(ffi::Launch { stream: stream.inner.cu_stream().cast(), overlap: u32::from(stream.overlap) })
}

/// Calls launcher `ffi::$op` with `$params`, on `$stream`.
macro_rules! call {
    ($op:ident, $stream:expr, $params:expr) => {{
        let params = $params;
        let launch = launch_on($stream)?;
        let _range = super::super::nvtx::range(stringify!($op));
        let span = super::super::spans::open(stringify!($op), $stream)?;
        let code = match super::super::swap::launcher(stringify!($op)) {
            // SAFETY: the caller proved each buffer against the shape with `require`, in the lines above; indices that only
            // the device knows are clamped by the kernel (cuda/kernels.h); the launcher copies
            // `params` and `launch` before it returns; buffers are freed in stream order, so they outlive the queued kernel.
            None => unsafe { ffi::$op(&params, &launch) },
            // SAFETY: as above, for a launcher of the same name and contract that somebody chose to load (`swap`).
            Some(launcher) => unsafe { launcher((&raw const params).cast(), &launch) },
        };
        super::super::spans::close(span, $stream)?;
        check(stringify!($op), code, $stream)
    }};
}
use call;
