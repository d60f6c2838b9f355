//! Where a model's files are: a folder on disk, or bytes compiled into the program.
//!
//! Files on disk are mapped, never read to the heap. A mapped file must not shrink while the program runs: the
//! kernel answers a read beyond its new end with SIGBUS. Lengths are checked when the file is opened; what changes
//! it later is out of reach.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Largest JSON file read (real ones: 2 kB, an index of shards: 0.2 MB). Parsed JSON takes up to some 50 times its
/// text in memory, so this is also what bounds a hostile config's memory.
pub(crate) const MAX_JSON_BYTES: usize = 1 << 20;
/// Largest tokenizer.json taken (Falcon's: 2.7 MB).
pub(crate) const MAX_TOKENIZER_BYTES: usize = 64 << 20;

/// A file's contents.
pub(crate) enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }
}

/// A model's folder.
pub(crate) enum Folder {
    Disk(PathBuf),
    Static { name: String, files: Vec<(&'static str, &'static [u8])> },
}

impl Folder {
    /// The folder's own path, for messages.
    pub(crate) fn root(&self) -> &Path {
        match self {
            Folder::Disk(root) => root,
            Folder::Static { name, .. } => Path::new(name),
        }
    }

    /// Path of `file` in the folder, for messages.
    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.root().join(file)
    }

    /// Contents of `file`; `None` when there is no such file.
    ///
    /// # Errors
    /// [`Error::Model`] when it is not a file, cannot be read, or is longer than `max_bytes`.
    pub(crate) fn open(&self, file: &str, max_bytes: usize) -> Result<Option<Bytes>> {
        let bytes = match self {
            Folder::Disk(root) => map_if_there(&root.join(file))?,
            Folder::Static { files, .. } => files.iter().find(|f| f.0 == file).map(|f| Bytes::Static(f.1)),
        };
        match bytes {
            Some(bytes) if bytes.len() > max_bytes => Err(Error::model(
                self.path(file),
                format_args!("has {} bytes, wanted at most {max_bytes}", bytes.len()),
            )),
            other => Ok(other),
        }
    }

    /// Names of the files that end in `suffix`, sorted.
    pub(crate) fn names_ending_in(&self, suffix: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        match self {
            Folder::Static { files, .. } => {
                names.extend(files.iter().map(|f| f.0).filter(|n| n.ends_with(suffix)).map(str::to_owned));
            }
            Folder::Disk(root) => {
                let fail = |e| Error::model(root, format_args!("cannot list the folder: {e}"));
                for entry in fs::read_dir(root).map_err(fail)? {
                    // A name that is not UTF-8 is none of ours.
                    if let Ok(name) = entry.map_err(fail)?.file_name().into_string()
                        && name.ends_with(suffix)
                    {
                        names.push(name);
                    }
                }
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// The file at `path`, mapped; `None` when there is none.
fn map_if_there(path: &Path) -> Result<Option<Bytes>> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            // A snapshot of the Hugging Face cache is links to blobs; say it when the blob is gone.
            return match fs::symlink_metadata(path) {
                Ok(_) => Err(Error::model(
                    path,
                    "is a link to a file that does not exist; download the model again",
                )),
                Err(_) => Ok(None),
            };
        }
        Err(e) => return Err(Error::model(path, format_args!("cannot be read: {e}"))),
    };
    // Before opening: opening a FIFO would wait for a writer, and a device has no length to check.
    if !metadata.is_file() {
        return Err(Error::model(path, "is not a file"));
    }
    if metadata.len() == 0 {
        return Ok(Some(Bytes::Static(&[])));
    }
    let file = File::open(path).map_err(|e| Error::model(path, format_args!("cannot be opened: {e}")))?;
    let map = map_file(&file).map_err(|e| Error::model(path, format_args!("cannot be mapped: {e}")))?;
    Ok(Some(Bytes::Mapped(map)))
}

#[allow(unsafe_code)]
fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is private and read-only, and it keeps the file alive. What `Mmap::map` asks beyond that, that
    // nobody changes the file meanwhile, no program can promise: the bytes are only ever read as plain bytes, every
    // number taken from them is checked once and copied, and the module's comment states what truncation does.
    unsafe { Mmap::map(file) }
}
