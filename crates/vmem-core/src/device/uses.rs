//! Users of a range that are gone, and whose work on the device is not: where that ends, so that
//! other work can be put behind it without a wait of the host.
//!
//! Invariant: each of them has a share of the range, and stands in the list of it for as long as
//! the share may be counted as one of a user that is gone. Made by holds and changes; asked by
//! claims.

use std::any::Any;
use std::ptr;
use std::sync::Arc;

use super::{DeviceRange, tell};
use crate::locks::{self, Lock};

/// Where the work of a user of a range ends, in terms of the device.
pub type UseEnd = Arc<dyn Any + Send + Sync>;

/// Those of one range.
#[derive(Default)]
pub(super) struct Uses(Lock<Vec<Use>, { locks::USES }>);

struct Use {
    end: UseEnd,
    writes: bool,
    /// A later one has come after it.
    is_followed: bool,
}

impl Use {
    fn is(&self, end: &UseEnd, writes: bool) -> bool {
        ptr::addr_eq(Arc::as_ptr(&self.end), Arc::as_ptr(end)) && self.writes == writes
    }
}

impl DeviceRange {
    /// The user of this share is gone, and what it has queued on the device ends there; `writes`
    /// tells whether that changes the bytes: then it has come after all others. The share is to be
    /// kept until it has ended.
    pub(crate) fn ends_at(self, end: UseEnd, writes: bool) -> EndedUse {
        let mut uses = self.owned().uses.0.lock();
        if writes {
            uses.iter_mut().for_each(|one| one.is_followed = true);
        }
        uses.push(Use { end: end.clone(), writes, is_followed: false });
        drop(uses);
        // What waits for the user to go may go on.
        tell(self.owned().watcher.get());
        EndedUse { range: self, end, writes }
    }

    /// Whether all other users are gone; `own` counts the shares of the caller.
    pub(crate) fn others_are_gone(&self, own: usize) -> bool {
        let uses = self.owned().uses.0.lock();
        Arc::strong_count(self.owned()).saturating_sub(own) == uses.len()
    }

    /// Where the work ends that a user which changes the bytes has to come after; where it only
    /// reads them, `writers` is enough.
    pub(crate) fn ends(&self, writers: bool) -> Vec<UseEnd> {
        let uses = self.owned().uses.0.lock();
        let open = uses.iter().filter(|one| !one.is_followed && (one.writes || !writers));
        open.map(|one| one.end.clone()).collect()
    }
}

/// The share of a user that is gone.
pub(crate) struct EndedUse {
    range: DeviceRange,
    end: UseEnd,
    writes: bool,
}

impl EndedUse {
    pub(crate) fn range(&self) -> &DeviceRange {
        &self.range
    }
}

impl Drop for EndedUse {
    /// Before the share: while both go it counts as one that is in use.
    fn drop(&mut self) {
        let mut uses = self.range.owned().uses.0.lock();
        let place = uses.iter().position(|one| one.is(&self.end, self.writes));
        let one = place.map(|place| uses.swap_remove(place));
        drop(uses);
        drop(one);
    }
}

impl std::fmt::Debug for EndedUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EndedUse").field("range", &self.range).finish_non_exhaustive()
    }
}
