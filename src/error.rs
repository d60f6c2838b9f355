//! The one error type, and the exit status each kind of error means for the program.
//!
//! A message names the operation, the operand, what was found, what was wanted and, where there is one, the
//! remedy. It is one line: hostile text from a file is escaped before it is put into a message.

use std::fmt;
use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. [`Error::exit_code`] gives the exit status the program ends with.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// An argument of a function or an option of the program is wrong. Exit status 2.
    Usage(String),
    /// There is no CUDA driver, no GPU, or none that this build has kernels for. Exit status 3.
    NoGpu(String),
    /// A model's file is missing, damaged, or of a kind this engine does not run. Exit status 4.
    Model {
        /// The file or folder the complaint is about.
        file: PathBuf,
        /// What was found and what was wanted.
        what: String,
    },
    /// The GPU has too little free memory. Exit status 5.
    OutOfGpuMemory {
        /// What the memory was for.
        what: String,
        /// Bytes asked for.
        needed_bytes: u64,
        /// Bytes the driver says are free, if it says.
        free_bytes: Option<u64>,
    },
    /// The driver or a kernel refused or failed. Exit status 1.
    Cuda {
        /// The operation: an op's name (`gptq_gemv`) or the driver call.
        op: String,
        /// The driver's or launcher's code and its meaning.
        what: String,
    },
    /// Reading or writing failed while running. Exit status 1.
    Io(String),
    /// The caller asked to stop (Ctrl-C). Exit status 130.
    Interrupted,
}

impl Error {
    /// The exit status of the program: 1 failure while running, 2 wrong usage, 3 no driver or GPU, 4 bad model
    /// or file, 5 out of GPU memory, 130 interrupted.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Cuda { .. } | Error::Io(_) => 1,
            Error::Usage(_) => 2,
            Error::NoGpu(_) => 3,
            Error::Model { .. } => 4,
            Error::OutOfGpuMemory { .. } => 5,
            Error::Interrupted => 130,
        }
    }

    /// A [`Error::Model`] about `file`. Control characters in `what` are escaped, so that the message stays one
    /// line whatever the file holds.
    pub fn model(file: impl Into<PathBuf>, what: impl fmt::Display) -> Error {
        Error::Model { file: file.into(), what: one_line(&what.to_string()) }
    }
}

/// `text` on one line: control characters escaped, at most 400 characters.
#[must_use]
pub fn one_line(text: &str) -> String {
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == 400 {
            out.push_str(" ...");
            break;
        }
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(what) | Error::NoGpu(what) | Error::Io(what) => f.write_str(what),
            Error::Model { file, what } => write!(f, "{}: {what}", one_line(&file.display().to_string())),
            Error::OutOfGpuMemory { what, needed_bytes, free_bytes } => {
                write!(f, "out of GPU memory: {what}")?;
                if *needed_bytes > 0 {
                    write!(f, ": {} MiB wanted", needed_bytes.div_ceil(1 << 20))?;
                }
                match free_bytes {
                    Some(free) => {
                        write!(f, ", {} MiB are free; close other programs on this GPU", free >> 20)
                    }
                    None => Ok(()),
                }
            }
            Error::Cuda { op, what } => write!(f, "{op}: {what}"),
            Error::Interrupted => f.write_str("interrupted"),
        }
    }
}

impl std::error::Error for Error {}
