//! What is asked of a GPU, not of a model: `unpack_check`, `stream_read`.

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::{call, check, launch_on, u32_of};
use crate::error::Result;

/// `unpack_check`: the number of (code, activation) pairs for which this GPU's tensor cores do not keep subnormals.
#[allow(unsafe_code)]
pub fn unpack_check(stream: &Stream) -> Result<u32> {
    let mut mismatches = DevBuf::<u32>::zeros(stream, "mismatches", 1)?;
    call!(unpack_check, stream, ffi::UnpackCheckParams { mismatches: mismatches.ptr_mut(stream) })?;
    Ok(mismatches.download(stream, 0, 1)?[0])
}

/// `stream_read`: reads all of `data` once with `blocks` blocks; gives the exclusive or of its words by way of `mix [1]`.
#[allow(unsafe_code)]
pub fn stream_read(stream: &Stream, data: &DevBuf<u8>, mix: &mut DevBuf<u32>, blocks: usize) -> Result<()> {
    let op = "stream_read";
    mix.require(op, 1)?;
    let params = ffi::StreamReadParams {
        data: data.ptr(stream),
        mix: mix.ptr_mut(stream),
        bytes: data.len() as u64,
        blocks: u32_of(op, blocks)?,
    };
    call!(stream_read, stream, params)
}
