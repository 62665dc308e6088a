//! A CUDA driver that is none: the driver's symbols over memory of the heap, truly asynchronous,
//! with a check on every rule that is easily broken and seldom noticed.
//!
//! It is a test tool. It runs no PTX: a few kernels are known by name. No figure from it is
//! performance.
//!
//! # Layout
//!
//! - `control`: what tests link: loads the library beside the test, and commands it with lines of
//!   text.
//! - `symbols`: the driver's functions, in C; thin.
//! - `world`: everything that the driver knows, under one lock: devices, contexts, memory, streams,
//!   events.
//! - `stream`: the operations and the thread of each stream.
//! - `races`: which operations are ordered before which; pure.
//! - `pages`: the pages behind registered memory, as a device sees them.
//! - `raw`: reading and writing memory of the host; all other unsafe code.
//! - `commands`: the other end of the remote control.
//!
//! Two copies of this crate meet in a test: the one that the test links, for `control`, and the
//! shared library. They share no Rust type and no static, only lines of text.

mod codes;
mod commands;
mod control;
mod pages;
mod races;
mod raw;
mod stream;
mod symbols;
mod world;

pub use control::{Emulator, Kind, library};
