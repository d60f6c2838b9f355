//! repack
