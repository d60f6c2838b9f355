//! How long loading took, part by part: what `-v` prints.

#[cfg(feature = "cuda")]
use std::time::Duration;
use std::time::Instant;

/// A part of loading.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadPart {
    /// For example `weights`.
    pub name: &'static str,
    /// How long it took.
    pub seconds: f64,
    /// It is within the next part that is not, beside others: their times may add up to more than that part's.
    pub within: bool,
}

/// Collects the parts as they end.
#[derive(Debug, Clone)]
pub(crate) struct LoadTimes {
    parts: Vec<LoadPart>,
    lap_began: Instant,
}

impl LoadTimes {
    /// The first part begins now.
    pub(crate) fn begin() -> LoadTimes {
        LoadTimes { parts: Vec::new(), lap_began: Instant::now() }
    }

    /// A part ends here, and the next begins.
    pub(crate) fn lap(&mut self, name: &'static str) {
        let seconds = self.lap_began.elapsed().as_secs_f64();
        self.parts.push(LoadPart { name, seconds, within: false });
        self.lap_began = Instant::now();
    }

    /// Something that ran within the part that will end next.
    #[cfg(feature = "cuda")]
    pub(crate) fn within(&mut self, name: &'static str, time: Duration) {
        self.parts.push(LoadPart { name, seconds: time.as_secs_f64(), within: true });
    }

    /// All parts, in order.
    pub(crate) fn parts(&self) -> &[LoadPart] {
        &self.parts
    }
}
