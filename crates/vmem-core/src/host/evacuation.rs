//! A span that is emptied by moving its slots to other spans of its class: pages without I/O.
//!
//! Invariant: a span that is being emptied gives no slot, and its slots fit into spans that have
//! others when it is chosen; so each move needs no page, and the last one frees the span. An
//! evacuation that is dropped half way opens its span again. Begun by the evictor where free bytes
//! lie in partly used spans; the moves are those of the objects' gates.

use std::fmt;
use std::sync::Arc;

use super::arena::{HostArena, HostSlot};
use super::classes::{CLASSES, class_of, slot_bytes};

/// Spans that cannot be emptied, for each class, before the search gives up.
const TRIES: usize = 8;

/// One span that is being emptied.
#[must_use = "dropping it opens the span again"]
pub(crate) struct Evacuation {
    arena: Arc<HostArena>,
    class: usize,
    span: u32,
    ticket: u64,
    owners: Vec<u64>,
    pages: u64,
}

impl HostArena {
    /// Begins to empty the span that gives the most pages for the fewest bytes moved, of those
    /// whose slots fit elsewhere and none of whose owners is one to `skip`; `skip` is called with
    /// no lock held.
    pub(crate) fn evacuation(self: &Arc<Self>, skip: &dyn Fn(u64) -> bool) -> Option<Evacuation> {
        let per_class = (0..CLASSES).filter_map(|class| self.evacuation_of(class, skip));
        per_class.min_by_key(|evacuation| evacuation.live_bytes() / evacuation.pages)
    }

    fn evacuation_of(
        self: &Arc<Self>,
        class: usize,
        skip: &dyn Fn(u64) -> bool,
    ) -> Option<Evacuation> {
        let mut fixed = Vec::new();
        for _ in 0..TRIES {
            let leaving = self.spans(class).begin_evacuation(&fixed)?;
            let arena = self.clone();
            let owners = leaving.sparse.owners;
            let span = leaving.span;
            let ticket = leaving.ticket;
            let pages = leaving.sparse.pages;
            assert!(pages > 0, "a span has pages");
            let evacuation = Evacuation { arena, class, span, ticket, owners, pages };
            if !evacuation.owners.iter().any(|&owner| skip(owner)) {
                return Some(evacuation);
            }
            fixed.push(evacuation.owners.clone());
        }
        None
    }
}

impl Evacuation {
    /// The owners of its live slots when it began; one that has left since has nothing to move.
    pub(crate) fn owners(&self) -> &[u64] {
        &self.owners
    }

    /// Pages that the last move frees.
    #[cfg(test)]
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of its live slots when it began.
    pub(crate) fn live_bytes(&self) -> u64 {
        self.owners.len() as u64 * slot_bytes(self.class) as u64
    }

    /// Whether this slot is in the span.
    pub(crate) fn holds(&self, slot: &HostSlot) -> bool {
        slot.is_in(self.class, self.span)
    }

    /// A slot of `len` bytes for `owner`, in another span that has live slots. None if those have
    /// been filled by others meanwhile, or `len` is of another class: the move is given up.
    pub(crate) fn take(&self, len: usize, owner: u64) -> Option<HostSlot> {
        let is_of_class =
            len > 0 && len <= super::classes::SMALL_MAX && class_of(len) == self.class;
        let place = is_of_class.then(|| self.arena.spans(self.class).take_beside(owner))??;
        assert!(place.span != self.span, "a span that is being emptied gives no slot");
        Some(self.arena.charged(len, place.at, place.span, place.slot))
    }
}

impl Drop for Evacuation {
    fn drop(&mut self) {
        let spans = self.arena.spans(self.class);
        if spans.end_evacuation(self.span, self.ticket, self.owners.len()) {
            // A slot that was freed in it meanwhile becomes available to waiters only now.
            self.arena.tell_freed();
        }
    }
}

impl fmt::Debug for Evacuation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Evacuation")
            .field("class_bytes", &slot_bytes(self.class))
            .field("owners", &self.owners.len())
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}
