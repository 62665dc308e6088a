//! Migrations: each one a task that reserves, copies, verifies, publishes and releases.
//!
//! Invariant: a migration owns what it took (room, extents, the gate) through guards, so that each
//! way out of it, an error or a cancel too, gives it back; nothing is visible to readers before
//! the one step that publishes. Spawned by the actor alone.

mod changed;
mod down;
mod link;
mod load;
mod raise;
mod up;

use std::time::Duration;

use tokio::time::Instant;
use tracing::Span;

pub(crate) use changed::Changed;
pub(crate) use down::{Down, Victim, demote, flush, move_room_down, settle, write_down};
pub(crate) use link::Link;
pub(crate) use load::load;
pub(crate) use raise::{Raise, lower, raise};
pub(crate) use up::{Fetch, count_hit, fetch, fetch_into};

use crate::error::VirtualMemoryError;
use crate::events::{MigrationCause, MigrationEvent};
use crate::shared::Shared;
use crate::stats;
use crate::tier::MemoryTier;

/// The record of one migration: its span, its event, its place in the gauge of those in flight.
#[derive(Debug)]
pub(crate) struct Record<'a> {
    shared: &'a Shared,
    span: Span,
    event: MigrationEvent,
    asked: Instant,
    started: Instant,
}

impl<'a> Record<'a> {
    /// Starts with the first byte; `asked` is when it was requested.
    pub(crate) fn start(
        shared: &'a Shared,
        handle: u64,
        (from, to): (MemoryTier, MemoryTier),
        cause: MigrationCause,
        asked: Instant,
    ) -> Self {
        stats::add(&shared.counters.in_flight, 1);
        let started = Instant::now();
        let span = tracing::debug_span!(
            target: "vmem::migration",
            "migration",
            handle,
            %from,
            %to,
            %cause,
            bytes = tracing::field::Empty,
            waited_us = tracing::field::Empty,
            copied_us = tracing::field::Empty,
        );
        let event = MigrationEvent {
            handle,
            from,
            to,
            bytes: 0,
            cause,
            waited: Duration::ZERO,
            copied: Duration::ZERO,
            error: None,
            missed: 0,
        };
        Record { shared, span, event, asked, started }
    }

    /// Ends it: `bytes` were copied, or this went wrong.
    pub(crate) fn end(mut self, outcome: Result<u64, &VirtualMemoryError>) {
        self.event.waited = self.started - self.asked;
        self.event.copied = self.started.elapsed();
        match outcome {
            Ok(bytes) => self.event.bytes = bytes,
            Err(error) => {
                stats::add(&self.shared.counters.errors, 1);
                self.event.error = Some(error.clone());
            }
        }
        self.span.record("bytes", self.event.bytes);
        self.span.record("waited_us", self.event.waited.as_micros() as u64);
        self.span.record("copied_us", self.event.copied.as_micros() as u64);
        let _entered = self.span.enter();
        match &self.event.error {
            None => tracing::trace!(target: "vmem::migration", "published"),
            Some(error) => tracing::debug!(target: "vmem::migration", %error, "failed"),
        }
        self.shared.events.send(|| self.event.clone());
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        stats::sub(&self.shared.counters.in_flight, 1);
    }
}
