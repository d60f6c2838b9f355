//! The program as its users meet it: exit statuses, messages of one line, clean stdout, pipes and Ctrl-C.
//! Everything runs on the CPU with the small model.

#![cfg(feature = "cli")]
// A helper that panics fails its test, as it should.
#![allow(clippy::unwrap_used, clippy::panic)]

mod bench;
mod files;
mod processes;
mod program;
mod text;
mod usage;
