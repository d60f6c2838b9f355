//! Files and folders that must not outlive the program, however it ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Those that there are.
static ALL: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A file or folder that is deleted when this is dropped, and when Ctrl-C ends the program. It need not be there.
pub(super) struct Temporary(PathBuf);

impl Temporary {
    pub(super) fn new(path: PathBuf) -> Temporary {
        if let Ok(mut all) = ALL.lock() {
            all.push(path.clone());
        }
        Temporary(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        delete(&self.0);
        if let Ok(mut all) = ALL.lock() {
            all.retain(|path| *path != self.0);
        }
    }
}

/// Deletes all there are: the program is about to end, and nothing will be dropped.
pub(super) fn delete_all() {
    if let Ok(all) = ALL.lock() {
        all.iter().for_each(|path| delete(path));
    }
}

fn delete(path: &Path) {
    // What cannot be deleted is a temporary file more: there is nobody to tell.
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}
