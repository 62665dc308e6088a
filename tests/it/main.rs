//! What the store does, seen through its public surface: all tests that need no process to
//! themselves.
//!
//! Invariant: tests run beside each other here and share nothing but the machine. One that looks
//! at its whole process, or changes it, runs in a child (`support::process`); one that loads the
//! emulated CUDA driver belongs into `tests/gpu`, for that driver stays, and every store that is
//! opened later takes its device.
//!
//! Reading order: [`support`] has stores over a disk that the test commands, and the checks that
//! nothing is left behind. Then by subject:
//!
//! - [`scenario`]: the numbered scenarios of many users on little space.
//! - [`place`]: objects of any size, and where plans of eviction put them.
//! - [`cancel`]: calls that are dropped at any point.
//! - [`chain`]: a tier below the disk.
//! - [`names`]: what is durable, after restarts, kills, power cuts and damage.
//! - [`streams`]: objects as readers and writers.
//! - [`vram`]: the VRAM tier over simulated devices.
//! - [`model`]: random operations against a reference model.
//! - [`env`]: configurations, runtimes, directories and machines that lack something.
//! - [`process`]: what a store takes of its process.
//! - [`real_faults`]: faults that a real kernel reports.
//! - [`documents`]: what the documents say of the tests and examples.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod support;

mod cancel;
mod chain;
mod documents;
mod env;
mod model;
mod names;
mod place;
mod process;
mod real_faults;
mod scenario;
mod streams;
mod vram;
