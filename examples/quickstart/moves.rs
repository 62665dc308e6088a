//! Listens to the store's migrations and counts them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use tokio::task::JoinHandle;
use vmem::{MemoryTier, MigrationCause, VirtualMemory};

use crate::tally::{Counter, lock};

/// Why, from where and to where.
type Kind = (MigrationCause, MemoryTier, MemoryTier);

/// Migrations so far.
#[derive(Debug, Default)]
pub(crate) struct Moves {
    pub(crate) up: Counter,
    pub(crate) down: Counter,
    /// Events that came faster than we listened.
    pub(crate) missed: Counter,
    by_kind: Mutex<HashMap<Kind, Sum>>,
}

/// Migrations of one kind.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    pub(crate) count: u64,
    pub(crate) bytes: u64,
    pub(crate) failed: u64,
}

impl Moves {
    /// Listens until the store is closed, in a task of its own.
    pub(crate) fn listen(vmem: &VirtualMemory) -> (Arc<Moves>, JoinHandle<()>) {
        let moves = Arc::new(Moves::default());
        let events = vmem.migrations();
        let ours = moves.clone();
        let task = tokio::spawn(async move {
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                ours.missed.add(event.missed);
                let counter =
                    if event.to.is_faster_than(event.from) { &ours.up } else { &ours.down };
                counter.add(1);
                let mut by_kind = lock(&ours.by_kind);
                let sum = by_kind.entry((event.cause, event.from, event.to)).or_default();
                sum.count += 1;
                sum.bytes += event.bytes;
                sum.failed += u64::from(event.error.is_some());
            }
        });
        (moves, task)
    }

    /// The kinds that occurred, the most frequent first.
    pub(crate) fn by_kind(&self) -> Vec<(Kind, Sum)> {
        let mut kinds: Vec<_> =
            lock(&self.by_kind).iter().map(|(kind, sum)| (*kind, *sum)).collect();
        kinds.sort_by_key(|((cause, ..), sum)| (std::cmp::Reverse(sum.count), cause.to_string()));
        kinds
    }
}
