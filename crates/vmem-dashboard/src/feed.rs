//! The task that takes snapshots, and its listeners.
//!
//! Invariant: the task runs while somebody listens, and only then; there is one, however many
//! listen. A listener that is slow loses snapshots and delays nobody, and there are at most
//! `LISTENERS_MAX`. Called by the routes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{Stream, StreamExt, unfold};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};
use tokio::time::{MissedTickBehavior, interval};
use vmem_core::VirtualMemory;

use crate::LISTENERS_MAX;
use crate::snapshot::{Histograms, Moves, Snapshot, histograms};

/// How often a page is sent a snapshot.
const EVERY: Duration = Duration::from_secs(1);
/// Recent reads are those since this many snapshots ago.
const RECENT: usize = 10;
/// Snapshots by which a listener may lag.
const LAG_MAX: usize = 4;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Feed {
    vmem: VirtualMemory,
    places: Arc<Semaphore>,
    /// None while the task does not run.
    sender: Mutex<Option<broadcast::Sender<Arc<str>>>>,
}

impl Feed {
    pub(crate) fn new(vmem: VirtualMemory) -> Arc<Self> {
        let places = Arc::new(Semaphore::new(LISTENERS_MAX));
        Arc::new(Feed { vmem, places, sender: Mutex::new(None) })
    }

    /// The store now, as JSON.
    pub(crate) fn snapshot(&self) -> String {
        let stats = self.vmem.stats();
        let now = histograms(&self.vmem, &stats);
        json(&Snapshot::of(&self.vmem, &stats, &now, None, Vec::new()))
    }

    /// Snapshots from now on; `None` if too many listen.
    pub(crate) fn listen(self: &Arc<Self>) -> Option<impl Stream<Item = Arc<str>> + use<>> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        let mut sender = self.sender.lock();
        let receiver = match &*sender {
            Some(sender) => sender.subscribe(),
            None => {
                let (new, receiver) = broadcast::channel(LAG_MAX);
                *sender = Some(new);
                tokio::spawn(self.clone().run());
                receiver
            }
        };
        drop(sender);
        let first: Arc<str> = self.snapshot().into();
        let later = unfold((receiver, place), next);
        Some(futures::stream::iter([first]).chain(later))
    }

    /// Takes snapshots until nobody listens, or the store has ended.
    async fn run(self: Arc<Self>) {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before: VecDeque<Histograms> = VecDeque::new();
        let mut moves = Moves::of(&self.vmem.stats());
        while !self.vmem.is_closed() {
            ticks.tick().await;
            let snapshot = self.next_snapshot(&mut moves, &mut before);
            if !self.send(snapshot) {
                return;
            }
        }
        // The store was closed: the streams end, and a page says so.
        *self.sender.lock() = None;
    }

    fn next_snapshot(&self, moves: &mut Moves, before: &mut VecDeque<Histograms>) -> String {
        let stats = self.vmem.stats();
        let now = histograms(&self.vmem, &stats);
        let moved = moves.since(&stats);
        let snapshot = Snapshot::of(&self.vmem, &stats, &now, before.front(), moved);
        before.push_back(now);
        if before.len() > RECENT {
            before.pop_front();
        }
        json(&snapshot)
    }

    /// False once nobody listens; then the next listener starts the task anew.
    fn send(&self, snapshot: String) -> bool {
        let mut sender = self.sender.lock();
        let listened = sender.as_ref().is_some_and(|sender| sender.send(snapshot.into()).is_ok());
        if !listened {
            *sender = None;
        }
        listened
    }
}

type Listener = (broadcast::Receiver<Arc<str>>, OwnedSemaphorePermit);

async fn next((mut receiver, place): Listener) -> Option<(Arc<str>, Listener)> {
    loop {
        match receiver.recv().await {
            Ok(snapshot) => return Some((snapshot, (receiver, place))),
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return None,
        }
    }
}

fn json(snapshot: &Snapshot) -> String {
    serde_json::to_string(snapshot).expect("invariant: its keys are text")
}
