//! What a store is opened with and in: configurations, builds, runtimes, directories, control
//! groups, and machines that deny something.
//!
//! Invariant: no environment is a panic. What a test changes of its process it changes in a child.
//! Run in `it`.

mod config_file;
mod features;
mod files;
mod fork;
mod hostile;
mod memory;
mod messages;
mod runtime;
mod snapshot;
