//! The console is not compiled in.
//!
//! Invariant: as `console/mod.rs` says. Called as `shown.rs` is.

use std::future::Future;

use tokio::runtime::Handle;

use super::{Moved, Now};
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;

#[derive(Debug)]
pub(crate) struct Migration;

impl Migration {
    pub(crate) fn start(
        _: (MemoryTier, MemoryTier),
        _: MigrationCause,
        _: impl FnOnce() -> Moved,
    ) -> Self {
        Migration
    }
}

#[derive(Debug)]
pub(crate) struct Reads;

impl Reads {
    pub(crate) fn new() -> Self {
        Reads
    }
}

#[derive(Debug)]
pub(crate) struct Read;

impl Read {
    pub(crate) fn start(_: &Reads, _: impl FnOnce() -> String) -> Self {
        Read
    }

    pub(crate) fn waits_for(&self, _: &'static str) {}

    pub(crate) fn ended(&self, _: impl Fn() -> &'static str) {}

    pub(crate) fn watch<F: Future>(&self, work: F) -> F {
        work
    }
}

pub(crate) fn show(_: &Handle, _: &Reads, _: impl Fn() -> Option<Now> + Send + 'static) {}
