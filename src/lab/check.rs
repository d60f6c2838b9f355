//! Is a kernel right? Each call twice: against the reference, for the same bits, and within its buffers.

use super::calls::{Call, Output};
use super::kit;
use crate::error::{Error, Result};
use crate::gpu::Stream;
use crate::gpu::ops::DECLINED;

/// What a check of one call found.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// The call's shape.
    pub label: String,
    /// The kernel is not written for this shape, and said so: nothing was measured.
    pub declined: bool,
    /// Relative difference of each output, and its worst element in words.
    pub measured: Vec<String>,
    /// What is wrong; empty: nothing.
    pub faults: Vec<String>,
}

/// Where a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The kernel is launched next.
    Launching,
    /// The kernel has ended; its results are looked at.
    Comparing,
}

/// Checks one call; `at` hears of each stage.
///
/// # Errors
/// A driver failure: the kernel faulted, or could not be launched; what `at` returns.
pub fn check(
    call: &mut dyn Call,
    stream: &Stream,
    at: &mut dyn FnMut(Stage) -> Result<()>,
) -> Result<Finding> {
    let mut finding =
        Finding { label: call.label(), declined: false, measured: Vec::new(), faults: Vec::new() };
    let mut once = |wanted: bool| {
        call.reset(stream)?;
        at(Stage::Launching)?;
        call.launch(stream)?;
        stream.synchronize()?;
        at(Stage::Comparing)?;
        call.outputs(stream, wanted)
    };
    let first = match once(true) {
        Err(Error::Cuda { what, .. }) if what == DECLINED => {
            finding.declined = true;
            return Ok(finding);
        }
        first => first?,
    };
    let second = once(false)?;
    if let Some((buffer, place)) = call.trespass(stream)? {
        let side = if place < 0 {
            format!("{} elements before its start", -place)
        } else {
            format!("element {place} behind its end")
        };
        finding.faults.push(format!("wrote outside {buffer}: {side}"));
    }
    for (output, again) in first.iter().zip(&second) {
        judge(output, &mut finding);
        let different = output.got.iter().zip(&again.got).position(|(a, b)| a.to_bits() != b.to_bits());
        if let Some(i) = different {
            let (name, place) = (output.name, place(output, i));
            finding.faults.push(format!("{name}: a second run gives other bits, first at {place}"));
        }
    }
    Ok(finding)
}

/// Compares an output with what was wanted.
fn judge(output: &Output, finding: &mut Finding) {
    let Output { name, got, want, tolerance, .. } = output;
    if got.len() != want.len() {
        finding.faults.push(format!("{name}: {} values, wanted {}", got.len(), want.len()));
        return;
    }
    let found = kit::difference(got, want);
    let (Some(g), Some(w)) = (got.get(found.worst), want.get(found.worst)) else { return };
    let worst = format!("worst at {}: got {g}, wanted {w}", place(output, found.worst));
    if *tolerance == 0.0 {
        let wrong = got.iter().zip(want).filter(|(g, w)| g != w).count();
        if wrong > 0 {
            finding.faults.push(format!("{name}: {wrong} of {} values differ; {worst}", got.len()));
        }
        finding.measured.push(format!("{name}: {wrong} of {} values differ", got.len()));
        return;
    }
    if !g.is_finite() {
        let unset = got.iter().filter(|g| !g.is_finite()).count();
        finding.faults.push(format!(
            "{name}: {unset} of {} values are not finite (never written, or from what is outside a buffer); first at {}",
            got.len(),
            place(output, found.worst)
        ));
        return;
    }
    let line = format!("{name}: off by {:.1e}, at most {tolerance:.0e}; {worst}", found.relative);
    if found.relative > *tolerance {
        finding.faults.push(line.clone());
    }
    finding.measured.push(line);
}

/// `token 3, value 17`.
fn place(output: &Output, i: usize) -> String {
    format!("token {}, value {}", i / output.row.max(1), i % output.row.max(1))
}
