//! The small demonstration model inside the program: feature `demo`, never in the library. 10 MB of the binary.

use peregrine::Result;
use peregrine::checkpoint::Checkpoint;

/// Its name in messages.
pub(super) const NAME: &str = "the built-in tiny-falcon-tales";

/// The files of `models/tiny-falcon-tales` that a checkpoint is made of.
#[cfg(feature = "demo")]
const FILES: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../models/tiny-falcon-tales/config.json")),
    ("quantize_config.json", include_bytes!("../../models/tiny-falcon-tales/quantize_config.json")),
    ("model.safetensors", include_bytes!("../../models/tiny-falcon-tales/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../models/tiny-falcon-tales/tokenizer.json")),
];

/// The built-in model.
///
/// # Errors
/// [`peregrine::Error::Usage`] in a build without it.
#[cfg(feature = "demo")]
pub(super) fn checkpoint() -> Result<Checkpoint> {
    Checkpoint::from_static(NAME, &FILES)
}

/// The built-in model.
///
/// # Errors
/// Always: this build has none.
#[cfg(not(feature = "demo"))]
pub(super) fn checkpoint() -> Result<Checkpoint> {
    Err(peregrine::Error::Usage("no model given: use -m MODEL (this build has no built-in one)".to_string()))
}
