//! One call of an op: guarded buffers with seeded data, the launch, and what the reference says must come out.

mod attention;
mod product;
mod rows;

use crate::error::{Error, Result};
use crate::gpu::{DevBuf, Guard, Stream};
use crate::measure::work::Work;

/// f16 rounding of an output: 2.8e-4 at most. Measured: 2.4e-4.
const F16_TOLERANCE: f64 = 3e-4;
/// f32 sums of exact products. Measured: 1.6e-7.
const F32_TOLERANCE: f64 = 4e-7;
/// The ops that have calls, and what they do.
pub const OPS: &[(&str, &str)] = &[
    ("embed", "rows of the table, as f32"),
    ("layernorm", "adds the slices of the product in front, then normalises"),
    ("gptq_gemv", "4-bit product, at most 8 tokens"),
    ("gptq_batch", "4-bit product, at most 72 tokens"),
    ("gptq_gemm", "4-bit product, any number of tokens"),
    ("rope", "rotates queries and keys, appends to the cache (prompts)"),
    ("attn_decode", "rotates, appends and attends, few tokens"),
    ("attn_prefill", "attention of a prompt"),
    ("head", "logits"),
    ("permute", "gathers activations (act-order)"),
];

/// What came out of a call, and what should have.
pub struct Output {
    /// What it is: `out [tokens, hidden]`.
    pub name: &'static str,
    /// Elements of a row, for naming one.
    pub row: usize,
    /// What the kernel wrote.
    pub got: Vec<f32>,
    /// What the reference gives.
    pub want: Vec<f32>,
    /// Largest relative difference; 0: the same bits.
    pub tolerance: f64,
}

/// A call that is ready to be launched.
pub trait Call {
    /// For messages: the shape.
    fn label(&self) -> String;
    /// Outputs are not a number, what is updated in place is as at first.
    ///
    /// # Errors
    /// A driver failure.
    fn reset(&mut self, stream: &Stream) -> Result<()>;
    /// Queues the kernel.
    ///
    /// # Errors
    /// What the op's wrapper returns.
    fn launch(&mut self, stream: &Stream) -> Result<()>;
    /// What came out; and what was wanted, if `wanted`, which may take the CPU a second.
    ///
    /// # Errors
    /// A driver failure.
    fn outputs(&self, stream: &Stream, wanted: bool) -> Result<Vec<Output>>;
    /// A buffer that was written outside, by name and place.
    ///
    /// # Errors
    /// A driver failure.
    fn trespass(&self, stream: &Stream) -> Result<Option<(&'static str, isize)>>;
    /// What it must move and do.
    fn work(&self) -> Work;
}

/// The calls of an op: real shapes and edges, or the one or two that matter for time.
///
/// # Errors
/// [`Error::Usage`] if there is no such op; a driver failure.
pub fn calls(op: &str, stream: &Stream, timing: bool) -> Result<Vec<Box<dyn Call>>> {
    let mut calls: Vec<Box<dyn Call>> = Vec::new();
    match op {
        "layernorm" | "permute" | "embed" | "head" => rows::calls(op, stream, timing, &mut calls)?,
        "gptq_gemv" | "gptq_batch" | "gptq_gemm" => product::calls(op, stream, timing, &mut calls)?,
        "rope" | "attn_decode" | "attn_prefill" => attention::calls(op, stream, timing, &mut calls)?,
        other => {
            let known: Vec<&str> = OPS.iter().map(|op| op.0).collect();
            return Err(Error::Usage(format!("the lab has no op '{other}': it has {}", known.join(", "))));
        }
    }
    Ok(calls)
}

/// As [`calls`], and those of the built-in kernels whose activations are planes of bytes, on a GPU that takes them: kernels of somebody
/// else's need not know of these, and the model does without them where there is one.
///
/// # Errors
/// As [`calls`].
pub fn own_calls(op: &str, stream: &Stream, timing: bool) -> Result<Vec<Box<dyn Call>>> {
    let mut calls = calls(op, stream, timing)?;
    match op {
        "gptq_batch" => product::planes_calls(stream, timing, &mut calls)?,
        "layernorm" => rows::planes_calls(stream, timing, &mut calls)?,
        _ => {}
    }
    Ok(calls)
}

/// The first buffer that was written outside.
macro_rules! trespass {
    ($stream:expr, $($name:literal: $buffer:expr),+) => {{
        $(if let Some(place) = $buffer.trespass($stream)? {
            return Ok(Some(($name, place)));
        })+
        Ok(None)
    }};
}

use trespass;

/// What the reference gives, if it is asked for.
fn only(wanted: bool, reference: impl FnOnce() -> Vec<f32>) -> Vec<f32> {
    if wanted { reference() } else { Vec::new() }
}

fn guarded<T: Guard>(stream: &Stream, name: &'static str, host: &[T]) -> Result<DevBuf<T>> {
    DevBuf::guarded(stream, name, host)
}

fn all<T: Guard>(stream: &Stream, buffer: &DevBuf<T>) -> Result<Vec<T>> {
    buffer.download(stream, 0, buffer.len())
}
