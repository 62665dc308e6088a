//! Migrations: each one a task that reserves, copies, verifies, publishes and releases.
//!
//! Invariant: a migration owns what it took (space, extents, the gate) through guards, so that each
//! way out of it, errors and cancellation included, gives it back; nothing is visible to readers
//! before
//! the one step that publishes. Spawned by the actor alone.

mod between;
mod copying;
mod disk_write;
mod edges;
mod from_device;
mod gathered;
mod kernel;
mod load;
mod part;
mod relocate;
mod request;
mod set;
mod settle;
mod stream;
mod timer;
mod to_device;
mod to_disk;
mod to_host;
mod transfer;
mod write;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::Span;

pub(crate) use between::{Demotion, demote_between, promote_between};
pub(crate) use disk_write::{
    DiskWrite, Finished, Turn, begin_disk_write, finish_disk_write, next_turn,
};
pub(crate) use from_device::{
    LeavingDevice, host_space, write_back_from_device, write_back_from_devices,
};
pub(crate) use gathered::request_gathered;
pub(crate) use kernel::{COPY_PAUSE, COPY_TRIES, Changed};
pub(crate) use load::load;
pub(crate) use part::{Copied, Piece, read_part, read_piece};
pub(crate) use relocate::relocate;
pub(crate) use request::{
    Move, PrefetchEnd, refresh_below, request_fetch, request_finish, request_move,
    request_move_behind, request_prefetch,
};
pub(crate) use set::read_set;
pub(crate) use settle::settle;
pub(crate) use stream::{Filled, Sent, Source, fill_window, send_window};
pub(crate) use timer::write_back_after;
pub(crate) use to_device::{fill_device, leave_devices, promote_to_device};
pub(crate) use to_disk::{
    CopyFate, Leaving, demote, demote_unwritten, flush, flush_many, write_back,
};
pub(crate) use to_host::{count_hit, fetch, fetch_into, fetch_with};
pub(crate) use write::{NewVersion, publish_version};

use crate::asker::{self, Asker};
use crate::console;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::{MigrationCause, MigrationEvent};
use crate::latency;
use crate::memory_tier::MemoryTier;
use crate::object::{Object, Shared};
use crate::stats;
use crate::tier::{Class, Need};

/// A request for an object in a faster tier.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) object: Arc<Object>,
    pub(crate) class: Class,
    pub(crate) cause: MigrationCause,
    /// Whether the copy in host memory stays, or is freed with its last reader.
    pub(crate) stay: bool,
    /// Whether the caller can do without host space: it hears at once if eviction cannot make any.
    pub(crate) may_spill: bool,
    /// The job does without space that what was used at this stamp or later has.
    pub(crate) spares_since: Option<u64>,
    /// The bytes of object space that the caller will hold; 0 if they do not count towards
    /// `max_held`.
    pub(crate) to_hold: u64,
    pub(crate) deadline: Deadline,
    /// Notified once the caller has gone: then the job stops waiting for space.
    pub(crate) unwanted: Option<Arc<Notify>>,
}

impl Job {
    /// A demand job, whose copy stays.
    pub(crate) fn new(object: Arc<Object>, cause: MigrationCause, deadline: Deadline) -> Self {
        Job {
            object,
            class: Class::Demand,
            cause,
            stay: true,
            may_spill: false,
            spares_since: None,
            to_hold: 0,
            deadline,
            unwanted: None,
        }
    }

    /// The space that the object takes.
    fn need(&self) -> Need {
        let need = Need::one(self.object.len, self.object.id, self.class);
        match self.spares_since {
            Some(since) => need.sparing(since),
            None => need,
        }
    }

    /// Waits for space until the caller has gone.
    async fn while_wanted<T>(
        &self,
        space: impl Future<Output = Result<T, VirtualMemoryError>>,
    ) -> Result<T, VirtualMemoryError> {
        let Some(unwanted) = &self.unwanted else { return space.await };
        tokio::select! {
            biased;
            space = space => space,
            () = unwanted.notified() => Err(self.deadline.error("a request without a caller")),
        }
    }
}

/// The record of one migration: its span, its event, its place in the gauge of those in flight.
#[derive(Debug)]
pub(crate) struct Record<'a> {
    shared: &'a Shared,
    span: Span,
    event: MigrationEvent,
    asked: Instant,
    started: Instant,
    /// For their drops.
    _row: console::Migration,
    _moving: Option<latency::Moving>,
}

impl<'a> Record<'a> {
    /// Starts the record, just before the first byte is copied.
    pub(crate) fn start(
        shared: &'a Shared,
        object: &Object,
        (from, to): (MemoryTier, MemoryTier),
        cause: MigrationCause,
        deadline: &Deadline,
    ) -> Self {
        stats::add(&shared.counters.in_flight, 1);
        let started = Instant::now();
        let handle = object.id;
        let span_in = |asker: &Span, left_out: Option<u64>| {
            let span = tracing::debug_span!(
                target: "vmem::migration",
                parent: asker,
                "migration",
                handle,
                %from,
                %to,
                %cause,
                left_out,
                bytes = tracing::field::Empty,
                waited_us = tracing::field::Empty,
                copied_us = tracing::field::Empty,
            );
            span.follows_from(asker);
            span
        };
        let own = |asker: &Span| shared.migration_spans.span(|left_out| span_in(asker, left_out));
        // In the trace of its read, whichever task this is, or else of its request.
        let span = match asker::current() {
            Asker::Read(read) => shared.read_spans.part(|| span_in(&read, None)),
            Asker::Prefetch(prefetch) => shared.migration_spans.part(|| span_in(&prefetch, None)),
            Asker::Call(call) => own(&call),
            Asker::Nobody => own(&Span::none()),
            Asker::LeftOut => None,
        };
        let span = span.unwrap_or_else(Span::none);
        let moving = latency::moves_under(handle, &span);
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
        let row = console::Migration::start((from, to), cause, || console::Moved {
            object: object.title(),
            bytes: object.len,
        });
        Record { shared, span, event, asked: deadline.asked(), started, _row: row, _moving: moving }
    }

    /// Ends the record, with the bytes that were copied or the error.
    pub(crate) fn end(mut self, outcome: Result<u64, &VirtualMemoryError>) {
        self.event.waited = self.started - self.asked;
        self.event.copied = self.started.elapsed();
        match outcome {
            Ok(bytes) => self.event.bytes = bytes,
            Err(error) => {
                stats::add(&self.shared.counters.errors, 1);
                // A fault is noted by the transfer that failed.
                self.event.error = Some(error.clone());
            }
        }
        tracing::record_all!(
            self.span,
            bytes = self.event.bytes,
            waited_us = self.event.waited.as_micros() as u64,
            copied_us = self.event.copied.as_micros() as u64,
        );
        let _entered = self.span.enter();
        match &self.event.error {
            None => tracing::trace!(target: "vmem::migration", "published"),
            Some(error) => tracing::debug!(target: "vmem::migration", %error, "failed"),
        }
        self.shared.totals.add(&self.event);
        self.shared.notices(self.event.to).failed_migration(&self.event);
        self.shared.events.send(|| self.event.clone());
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        stats::sub(&self.shared.counters.in_flight, 1);
    }
}
