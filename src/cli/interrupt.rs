//! Ctrl-C. While something can be stopped in an orderly way, the first one asks for that and the second ends the
//! program; otherwise the first one ends it. Either way the exit status is 130.

use std::process::exit;
use std::sync::atomic::{AtomicU8, Ordering};

use peregrine::{Error, Result};

use super::{output, temporary};

/// Nothing runs that can be stopped between two steps: Ctrl-C ends the program.
const IDLE: u8 = 0;
/// A loop is running that looks at [`requested`] between its steps.
const WATCHED: u8 = 1;
/// That loop has been asked to stop.
const REQUESTED: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(IDLE);

/// Installs the handler. Called once, before anything long begins.
///
/// # Errors
/// [`Error::Io`] when the system refuses the handler.
pub(super) fn install() -> Result<()> {
    let handler = || {
        if STATE.compare_exchange(WATCHED, REQUESTED, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            output::note(&Error::Interrupted.to_string());
            temporary::delete_all();
            exit(i32::from(Error::Interrupted.exit_code()));
        }
    };
    ctrlc::set_handler(handler).map_err(|error| Error::Io(format!("cannot handle Ctrl-C: {error}")))
}

/// Says that a loop watches for Ctrl-C until the guard is dropped.
pub(super) fn watch() -> Watch {
    STATE.store(WATCHED, Ordering::SeqCst);
    Watch
}

/// See [`watch`].
pub(super) struct Watch;

impl Watch {
    /// Whether Ctrl-C was pressed since [`watch`].
    pub(super) fn requested(&self) -> bool {
        STATE.load(Ordering::SeqCst) == REQUESTED
    }

    /// `Err(Interrupted)` if Ctrl-C was pressed since [`watch`].
    pub(super) fn check(&self) -> Result<()> {
        if self.requested() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        STATE.store(IDLE, Ordering::SeqCst);
    }
}
