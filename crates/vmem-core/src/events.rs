//! The events of a store: one for each migration.
//!
//! Invariant: an event is sent after the migration was published, or failed; a listener that is
//! slow loses events and learns how many, and never slows the runtime. Sent by the migrations.

use std::fmt;
use std::time::Duration;

use futures::Stream;
use parking_lot::RwLock;
use tokio::sync::broadcast;

use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;

/// The most events by which a slow listener may lag.
const BACKLOG_MAX: usize = 1024;

/// Why an object moved.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MigrationCause {
    /// A demand read.
    Read,
    /// `promote` or `pin`.
    Promote,
    /// `prefetch`.
    Prefetch,
    /// Gathers: see [`Promotion::OnNthGather`](crate::Promotion::OnNthGather).
    Gather,
    /// `demote`.
    Demote,
    /// Space was needed.
    Evict,
    /// A kernel has written it.
    Kernel,
    /// Written back early; the faster copy stays.
    WriteBack,
    /// `flush`.
    Flush,
}

impl fmt::Display for MigrationCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MigrationCause::Read => "read",
            MigrationCause::Promote => "promote",
            MigrationCause::Prefetch => "prefetch",
            MigrationCause::Gather => "gather",
            MigrationCause::Demote => "demote",
            MigrationCause::Evict => "evict",
            MigrationCause::Kernel => "kernel",
            MigrationCause::WriteBack => "write-back",
            MigrationCause::Flush => "flush",
        })
    }
}

/// One migration that ended.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct MigrationEvent {
    /// The object.
    pub handle: u64,
    /// The tier that its bytes came from.
    pub from: MemoryTier,
    /// The tier that they went to.
    pub to: MemoryTier,
    /// Bytes that were copied; 0 for a clean copy that was dropped.
    pub bytes: u64,
    /// Why.
    pub cause: MigrationCause,
    /// From the request to the first byte.
    pub waited: Duration,
    /// From the first byte to publication.
    pub copied: Duration,
    /// Why it failed, if it did; the object is then where it was.
    pub error: Option<VirtualMemoryError>,
    /// Events that this listener lost just before this one.
    pub missed: u64,
}

/// The sending end.
#[derive(Debug)]
pub(crate) struct Events {
    /// None once the store has ended: then the streams end too.
    sender: RwLock<Option<broadcast::Sender<MigrationEvent>>>,
}

impl Events {
    pub(crate) fn new() -> Self {
        Events { sender: RwLock::new(Some(broadcast::channel(BACKLOG_MAX).0)) }
    }

    /// Sends an event to every listener; without one it costs a load.
    pub(crate) fn send(&self, event: impl FnOnce() -> MigrationEvent) {
        if let Some(sender) = &*self.sender.read()
            && sender.receiver_count() > 0
        {
            // The last listener may leave in between, which does no harm.
            drop(sender.send(event()));
        }
    }

    /// Ends every stream after the events that it has not delivered yet.
    pub(crate) fn end(&self) {
        *self.sender.write() = None;
    }

    pub(crate) fn listen(&self) -> impl Stream<Item = MigrationEvent> + Send + 'static + use<> {
        let events = self.sender.read().as_ref().map(broadcast::Sender::subscribe);
        futures::stream::unfold((events, 0), |(events, mut missed)| async move {
            let mut events = events?;
            loop {
                match events.recv().await {
                    Ok(mut event) => {
                        event.missed = missed;
                        return Some((event, (Some(events), 0)));
                    }
                    Err(broadcast::error::RecvError::Lagged(lost)) => missed += lost,
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        })
    }
}
