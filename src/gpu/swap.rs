//! A launcher from a library of somebody's own in place of a built-in one: what `peregrine lab try` rests on.
//!
//! The library exports a launcher of `cuda/kernels.h` by its name. While it is in, every launch of that op in the process goes
//! there; all checks of shapes and buffers stay. What the kernel does with its pointers nobody can check from here: the lab
//! runs it in a process of its own, with guarded buffers.

use std::ffi::c_void;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use libloading::Library;

use super::ffi;
use crate::error::{Error, Result, one_line};

/// A launcher of any op: its parameter struct, and where the launch goes.
pub(super) type Launcher = unsafe extern "C" fn(params: *const c_void, launch: *const ffi::Launch) -> i32;

/// Whether there is one, so that a launch need not take the lock.
static ANY: AtomicBool = AtomicBool::new(false);
static SWAPPED: Mutex<Option<(String, Launcher)>> = Mutex::new(None);

/// The launcher that stands in for `op`, if one does.
pub(super) fn launcher(op: &str) -> Option<Launcher> {
    if !ANY.load(Ordering::Acquire) {
        return None;
    }
    let swapped = SWAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    swapped.as_ref().filter(|(name, _)| name == op).map(|&(_, launcher)| launcher)
}

/// A loaded library with a launcher for an op.
pub struct Swap {
    op: String,
    launcher: Launcher,
}

impl Swap {
    /// Loads `library` and finds the launcher of `op` in it. Nothing is swapped yet.
    ///
    /// # Errors
    /// [`Error::Io`] if the library cannot be loaded, or has no such launcher.
    #[allow(unsafe_code)]
    pub fn load(library: &Path, op: &str) -> Result<Swap> {
        let shown = one_line(&library.display().to_string());
        // SAFETY: runs the library's initialisers. It is one the user named to be run, as one names a program.
        let loaded = unsafe { Library::new(library) };
        let loaded =
            loaded.map_err(|e| Error::Io(format!("cannot load {shown}: {}", one_line(&e.to_string()))))?;
        // SAFETY: the type is that of every launcher in cuda/kernels.h; a symbol of that name with another type breaks the contract
        // the user agreed to, which nobody can check.
        let symbol = unsafe { loaded.get::<Launcher>(op.as_bytes()) };
        let launcher = *symbol.map_err(|_| {
            Error::Io(format!(
                "{shown} has no launcher: wanted extern \"C\" int32_t {op}(const ...Params*, const Launch*)"
            ))
        })?;
        // Its kernels stay registered with the CUDA runtime, and may be queued: it is never unloaded.
        std::mem::forget(loaded);
        Ok(Swap { op: op.into(), launcher })
    }

    /// Puts the launcher in place of the built-in one for the rest of the process, or until [`Swap::out`].
    pub fn in_place(&self) {
        *SWAPPED.lock().unwrap_or_else(PoisonError::into_inner) = Some((self.op.clone(), self.launcher));
        ANY.store(true, Ordering::Release);
    }

    /// The built-in launcher again.
    pub fn out(&self) {
        ANY.store(false, Ordering::Release);
        *SWAPPED.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
