//! Opens every kind of checkpoint that this engine promises to read, and looks at what the views hold.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // in helpers, too

mod forms;
mod hub;
mod kit;
mod stated;
mod synthetic;
#[path = "../common/variants/mod.rs"]
mod variants;
