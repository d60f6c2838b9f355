//! Buffers with a guard in front and one behind, which show a kernel that writes outside its own: for the lab.

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};

use super::buffer::DevBuf;
use super::context::{Stream, driver_error};
use crate::error::Result;

/// Bytes in front of a guarded buffer and behind it: several rows of activations.
const GUARD_BYTES: usize = 64 << 10;

/// A type whose buffers can be guarded.
pub trait Guard: DeviceRepr + ValidAsZeroBits + Copy {
    /// What guards are filled with: not a number, so that a kernel that reads it shows it.
    const GUARD: Self;
    /// Equal bits.
    fn same(self, other: Self) -> bool;
}

impl Guard for u8 {
    const GUARD: u8 = 0x7e;
    fn same(self, other: u8) -> bool {
        self == other
    }
}

impl Guard for u16 {
    const GUARD: u16 = 0x7e5a;
    fn same(self, other: u16) -> bool {
        self == other
    }
}

impl Guard for u32 {
    const GUARD: u32 = 0x7fc5_a5a5;
    fn same(self, other: u32) -> bool {
        self == other
    }
}

impl Guard for f32 {
    const GUARD: f32 = f32::from_bits(u32::GUARD);
    fn same(self, other: f32) -> bool {
        self.to_bits() == other.to_bits()
    }
}

impl<T: Guard> DevBuf<T> {
    /// A copy of `host` with a guard in front and one behind.
    ///
    /// # Errors
    /// As [`DevBuf::zeros`].
    pub fn guarded(stream: &Stream, name: &'static str, host: &[T]) -> Result<DevBuf<T>> {
        let margin = GUARD_BYTES / size_of::<T>();
        let guard = vec![T::GUARD; margin];
        let all = DevBuf::from_host(stream, name, &[&guard, host, &guard].concat())?;
        Ok(DevBuf { margin, ..all })
    }

    /// Where a guard was written: elements before the buffer's start (negative) or behind its end (from 0); `None` if both are whole.
    ///
    /// # Errors
    /// A driver failure.
    pub fn trespass(&self, stream: &Stream) -> Result<Option<isize>> {
        let (margin, len) = (self.margin, self.len());
        let all = stream.inner.clone_dtoh(&*self.slice).map_err(|e| driver_error(self.name, e))?;
        stream.synchronize()?;
        let touched = |i: &usize| !all[*i].same(T::GUARD);
        let behind = (margin + len..all.len()).find(touched).map(|i| (i - margin - len) as isize);
        Ok(behind.or_else(|| (0..margin).rev().find(touched).map(|i| i as isize - margin as isize)))
    }
}
