//! An emulated CUDA driver: the symbols of `libcuda` over heap memory, as asynchronous as a real
//! driver. It checks every rule of CUDA that is easily broken and whose breach is seldom noticed.
//!
//! It is a test tool. It runs no PTX: it implements a few kernels, which it recognises by name.
//! Times measured with it say nothing about a GPU.
//!
//! # Layout
//!
//! - `control`: the part that tests link. It loads the shared library and sends it commands, one
//!   line of text each.
//! - `symbols`: the functions of the driver, with their C signatures; each is thin.
//! - `world`: everything that the driver knows, under one lock: devices, contexts, memory, streams,
//!   events. Each device has one context, its primary one, and fails by itself.
//! - `stream`: the operations and the thread of each stream.
//! - `races`: which operations are ordered before which; pure.
//! - `pages`: the pages behind registered memory, as a device sees them.
//! - `raw`: reads and writes host memory.
//! - `commands`: the part of the shared library that executes what `control` sends.
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
