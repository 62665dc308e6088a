//! The space of the tier and what of it is being punched, and the punches themselves.
//!
//! Invariant: a range is punched only while no extent that was written owns it. A reservation may
//! take a range that is being punched, so that it never fails for that; its write starts when
//! the punch has ended. Called by the disk tier.
//!
//! No task and no timer does this: the release of an extent starts a batch once enough is stale,
//! and the end of a batch starts the next.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};

use futures::FutureExt;
use futures::future::{BoxFuture, ready};
use vmem_core::backend::{Run, Runs, TierError};

use crate::driver::{Keep, WriteRun};
use crate::plan;
use crate::space::Space;
use crate::stale::{Batch, Stale};
use crate::tier::Inner;

/// What is under the lock of the tier.
pub(crate) struct Ledger {
    pub(crate) space: Space,
    pub(crate) stale: Stale,
    /// What the punch in flight covers, in the order of the file.
    punching: Option<Vec<Range<u64>>>,
    /// Whether a caller is handing a batch to the driver.
    pumping: bool,
}

impl Ledger {
    /// The gaps between the taken extents are stale: they had an owner, or were never used.
    pub(crate) fn new(space: Space, taken: &[(u64, u32)]) -> Self {
        let mut stale = Stale::new();
        let mut end = 0;
        for &(offset, footprint) in taken {
            assert!(end <= offset, "extents are in the order of the file");
            stale.add(end..offset);
            end = offset + u64::from(footprint);
        }
        Ledger { space, stale, punching: None, pumping: false }
    }

    pub(crate) fn reserve(&mut self, lens: &[u32]) -> Result<Vec<Runs>, TierError> {
        let placed = self.space.reserve(lens).map_err(|no_space| TierError::Full {
            requested_bytes: no_space.requested_bytes,
            free_bytes: no_space.free_bytes,
            source: None,
        })?;
        for &Run { offset, footprint } in placed.iter().flatten() {
            self.stale.remove(offset..offset + u64::from(footprint));
        }
        Ok(placed)
    }

    /// Whether the punch in flight touches any of `ranges`.
    fn is_punching(&self, ranges: &[Range<u64>]) -> bool {
        let punching = self.punching.as_deref().unwrap_or_default();
        ranges.iter().any(|range| {
            let first = punching.partition_point(|punched| punched.end <= range.start);
            punching.get(first).is_some_and(|punched| punched.start < range.end)
        })
    }
}

impl Inner {
    /// Starts a write at once, or when the punch that it overlaps has ended.
    pub(crate) fn submit_write(
        self: Arc<Self>,
        runs: Vec<WriteRun>,
        keep: Keep,
    ) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        if runs.is_empty() {
            return ready((keep, Ok(()))).boxed();
        }
        let ranges = plan::run_ranges(&runs);
        if !self.ledger.lock().is_punching(&ranges) {
            return self.driver.write(runs, keep);
        }
        async move {
            self.while_punching(|ledger| ledger.is_punching(&ranges)).await;
            self.driver.write(runs, keep).await
        }
        .boxed()
    }

    /// Gives all that is stale back to a file system that is full, so that what was freed here is
    /// free there when the error arrives.
    pub(crate) async fn reclaim(&self) {
        self.while_punching(|ledger| ledger.punching.is_some()).await;
        self.ledger.lock().stale.hurry();
        self.pump();
        self.while_punching(|ledger| ledger.punching.is_some()).await;
    }

    /// Gives back all that is stale, but for what is less than a page.
    pub(crate) async fn reclaim_all(&self) {
        loop {
            self.while_punching(|ledger| ledger.punching.is_some()).await;
            self.ledger.lock().stale.hurry();
            self.pump();
            if self.ledger.lock().punching.is_none() {
                return;
            }
        }
    }

    /// Waits for ends of punches until there is nothing to wait for.
    async fn while_punching(&self, waits: impl Fn(&Ledger) -> bool + Send) {
        loop {
            let punched = self.punched.notified();
            tokio::pin!(punched);
            punched.as_mut().enable();
            if !waits(&self.ledger.lock()) {
                return;
            }
            punched.await;
        }
    }

    /// Hands stale ranges to the driver, one batch after the other, until there is too little left
    /// or a batch is in flight; its end continues here.
    pub(crate) fn pump(&self) {
        loop {
            let batch = {
                let mut ledger = self.ledger.lock();
                if ledger.pumping || ledger.punching.is_some() {
                    return;
                }
                match ledger.stale.take_batch() {
                    Batch::Nothing => return,
                    Batch::Later => continue,
                    Batch::Punch(batch) => {
                        ledger.punching = Some(batch.clone());
                        ledger.pumping = true;
                        batch
                    }
                }
            };
            let keep = Keep::new(Punching(Weak::clone(&self.me)));
            // The operation goes on without its future. Where it failed nothing is lost but space
            // that the file system could have had.
            drop(self.driver.punch(batch, keep));
            let was_pumping = std::mem::take(&mut self.ledger.lock().pumping);
            assert!(was_pumping, "one batch at a time is handed over");
        }
    }
}

/// Travels with a punch; its end is the end of the punch.
struct Punching(Weak<Inner>);

impl Drop for Punching {
    fn drop(&mut self) {
        if let Some(inner) = self.0.upgrade() {
            let ended = inner.ledger.lock().punching.take();
            assert!(ended.is_some(), "a punch ends once");
            inner.punched.notify_waiters();
            inner.pump();
        }
    }
}
