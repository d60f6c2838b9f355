//! The time of each launch, when somebody asks for it: an event in front of it and one behind.
//!
//! Events keep neighbours from overlapping, so the sum of the spans is more than the time of the same launches without them.
//! A recording belongs to the thread that began it; while there is none, a launch costs one look at a thread-local flag more.

use std::cell::RefCell;

use super::context::{Event, Stream};
use crate::error::Result;

/// A launch that was recorded.
pub struct Span {
    /// Its op.
    pub op: &'static str,
    start: Event,
    end: Event,
}

thread_local! {
    static RECORDING: RefCell<Option<Vec<Span>>> = const { RefCell::new(None) };
}

/// Records the launches of this thread from now on; forgets what was recorded before.
pub fn record() {
    RECORDING.with(|recording| *recording.borrow_mut() = Some(Vec::new()));
}

/// Ends the recording: op and microseconds of each launch since [`record`], in order; waits for the last one.
///
/// # Errors
/// [`crate::Error::Cuda`] if a kernel failed.
pub fn take() -> Result<Vec<(&'static str, f64)>> {
    let spans = RECORDING.with(|recording| recording.borrow_mut().take()).unwrap_or_default();
    if let Some(last) = spans.last() {
        last.end.wait()?;
    }
    spans
        .iter()
        .map(|span| Ok((span.op, f64::from(span.end.milliseconds_since(&span.start)?) * 1e3)))
        .collect()
}

/// The start of a launch that is recorded. One that goes into a graph does not run now, and an event beside it has no time.
pub(super) fn open(op: &'static str, stream: &Stream) -> Result<Option<(&'static str, Event)>> {
    let recorded = RECORDING.with(|recording| recording.borrow().is_some()) && !stream.captures();
    recorded.then(|| Ok((op, stream.record(true)?))).transpose()
}

/// Its end.
pub(super) fn close(opened: Option<(&'static str, Event)>, stream: &Stream) -> Result<()> {
    let Some((op, start)) = opened else { return Ok(()) };
    let end = stream.record(true)?;
    RECORDING.with(|recording| {
        if let Some(spans) = recording.borrow_mut().as_mut() {
            spans.push(Span { op, start, end });
        }
    });
    Ok(())
}
