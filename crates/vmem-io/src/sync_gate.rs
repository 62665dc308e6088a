//! One sync for many writes.
//!
//! Invariant: a write is reported as done only if a sync that began after it completed succeeded,
//! and no sync failed between its submission and that. The kernel reports a failed write-back once
//! and then takes the pages for clean, so after a failure a later success proves nothing about
//! the writes before it: they fail too. Called by the disk tier.
//!
//! Writes that complete while a sync runs join the round after it, and that round is one sync.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;

use crate::driver::{Driver, closed_error, is_closed};

/// Ends with the count of failures when its sync had succeeded. Rounds run one after the other, so
/// a failure that is counted later concerns none of its writes.
type Round = Shared<BoxFuture<'static, Result<u64, Arc<io::Error>>>>;

/// Where writes wait for the sync that covers them.
#[derive(Debug)]
pub(crate) struct SyncGate {
    failures: AtomicU64,
    rounds: Mutex<Rounds>,
    me: Weak<SyncGate>,
}

#[derive(Debug)]
struct Rounds {
    /// The newest round. It is kept so that its result is seen even if all its waiters are gone.
    last: Option<Round>,
    /// Whether the newest round has not begun its sync, so that it may still be joined.
    open: bool,
}

/// Drawn before a write is submitted.
#[derive(Debug)]
pub(crate) struct Ticket {
    failures: u64,
}

impl SyncGate {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new_cyclic(|me| SyncGate {
            failures: AtomicU64::new(0),
            rounds: Mutex::new(Rounds { last: None, open: false }),
            me: Weak::clone(me),
        })
    }

    pub(crate) fn ticket(&self) -> Ticket {
        Ticket { failures: self.failures.load(Ordering::Acquire) }
    }

    /// Waits for a sync that covers what completed before the call.
    pub(crate) async fn pass(
        &self,
        ticket: Ticket,
        driver: &Arc<dyn Driver>,
    ) -> Result<(), Arc<io::Error>> {
        let round = self.join(driver);
        if round.await? != ticket.failures {
            let text = "a sync failed while the write was under way";
            return Err(Arc::new(io::Error::other(text)));
        }
        Ok(())
    }

    fn join(&self, driver: &Arc<dyn Driver>) -> Round {
        let mut rounds = self.rounds.lock();
        if rounds.open
            && let Some(open) = &rounds.last
        {
            return open.clone();
        }
        let round = run_round(Weak::clone(&self.me), rounds.last.take(), Arc::clone(driver));
        let round = round.boxed().shared();
        rounds.last = Some(round.clone());
        rounds.open = true;
        round
    }
}

async fn run_round(
    gate: Weak<SyncGate>,
    before: Option<Round>,
    driver: Arc<dyn Driver>,
) -> Result<u64, Arc<io::Error>> {
    if let Some(before) = before {
        // Its failure is counted, and so fails the syncs that it concerns.
        let _ = before.await;
    }
    let Some(gate) = gate.upgrade() else {
        return Err(Arc::new(closed_error()));
    };
    gate.rounds.lock().open = false;
    match driver.sync().await {
        Ok(()) => Ok(gate.failures.load(Ordering::Acquire)),
        // It was not even tried, so it swallowed nothing.
        Err(error) if is_closed(&error) => Err(Arc::new(error)),
        Err(error) => {
            gate.failures.fetch_add(1, Ordering::AcqRel);
            Err(Arc::new(error))
        }
    }
}
