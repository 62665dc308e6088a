//! The slots of one size class.
//!
//! Invariant: a slot is taken or free, and a span has an owner's number for each taken slot; a
//! span with no taken slot does not exist, so an empty store holds no memory. Each class has a lock
//! of its own, under which no other is taken. Called by `arena`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::locks::{self, Lock};

use super::classes::{slot_bytes, slots, span_pages};
use super::mapping::PAGE_BYTES;
use super::pages::Pages;

/// Spans that are looked at for the sparsest one.
const LOOKED_AT: usize = 64;

/// All spans of one class.
#[derive(Debug)]
pub(super) struct Spans {
    class: usize,
    state: Lock<State, { locks::SPANS }>,
}

#[derive(Debug, Default)]
struct State {
    spans: Vec<Option<Span>>,
    /// Positions in `spans` without a span.
    vacant: Vec<u32>,
    /// Spans with a free slot, lowest first, so that the others run empty.
    partial: BTreeSet<u32>,
    /// Spans that are being emptied, and by which evacuation: they give no slot.
    leaving: BTreeMap<u32, u64>,
    /// Evacuations that were begun.
    evacuations: u64,
}

#[derive(Debug)]
struct Span {
    pages: Range<u64>,
    /// A set bit is a free slot.
    free: Vec<u64>,
    taken: u32,
    owners: Box<[u64]>,
}

/// Where a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) span: u32,
    pub(super) slot: u32,
    /// Byte of the mapping.
    pub(super) at: usize,
}

/// A span that would be worth emptying.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) span: u32,
    pub(super) owners: Vec<u64>,
    pub(super) live_bytes: u64,
    pub(super) pages: u64,
}

/// A span that is being emptied.
#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) span: u32,
    /// The number of the evacuation: that of a span may be another span's later.
    pub(super) ticket: u64,
    pub(super) sparse: Sparse,
}

impl Spans {
    pub(super) fn new(class: usize) -> Self {
        Spans { class, state: Lock::default() }
    }

    /// A free slot, in a new span if need be.
    pub(super) fn take(&self, pages: &Pages, owner: u64) -> Option<Place> {
        let mut state = self.state.lock();
        if state.partial.is_empty() {
            drop(state);
            // Not under the lock: to get pages a device may have to unregister others first.
            let run = pages.take(span_pages(self.class));
            state = self.state.lock();
            match run {
                // Another thread was quicker, and a span must not be without a taken slot.
                Some(run) if !state.partial.is_empty() => {
                    drop(state);
                    pages.put(run);
                    return self.take(pages, owner);
                }
                Some(run) => {
                    state.add_span(run, slots(self.class));
                }
                None => {}
            }
        }
        self.take_partial(&mut state, owner)
    }

    /// A free slot of an existing span; `None` if it would take another page.
    pub(super) fn take_beside(&self, owner: u64) -> Option<Place> {
        self.take_partial(&mut self.state.lock(), owner)
    }

    fn take_partial(&self, state: &mut State, owner: u64) -> Option<Place> {
        let number = *state.partial.first()?;
        let span = state.spans[number as usize].as_mut().expect("invariant: partial spans exist");
        let slot = span.take_slot(owner);
        let at = span.pages.start as usize * PAGE_BYTES + slot as usize * slot_bytes(self.class);
        if span.taken == slots(self.class) {
            state.partial.remove(&number);
        }
        Some(Place { span: number, slot, at })
    }

    /// Closes the span with the fewest live bytes, of those looked at, whose slots fit into other
    /// spans and whose owners are not in `skip`.
    pub(super) fn begin_evacuation(&self, skip: &[Vec<u64>]) -> Option<Leaving> {
        let mut state = self.state.lock();
        let free = |number: &u32| {
            let span = state.spans[*number as usize].as_ref();
            span.map_or(0, |span| u64::from(slots(self.class) - span.taken))
        };
        let free_slots: u64 = state.partial.iter().map(free).sum();
        let candidates = state.partial.iter().rev().take(LOOKED_AT);
        let (number, span) = candidates
            .filter_map(|number| Some((*number, state.spans[*number as usize].as_ref()?)))
            .filter(|(_, span)| !skip.iter().any(|owners| span.has_owners(owners)))
            .min_by_key(|(_, span)| span.taken)?;
        // The other spans have at least as many free slots as it has taken ones.
        if free_slots < u64::from(slots(self.class)) {
            return None;
        }
        let owners = span.live_owners();
        let live_bytes = u64::from(span.taken) * slot_bytes(self.class) as u64;
        let pages = span.pages.end - span.pages.start;
        state.evacuations += 1;
        let ticket = state.evacuations;
        state.partial.remove(&number);
        let before = state.leaving.insert(number, ticket);
        assert!(before.is_none(), "one evacuation at a time empties a span");
        Some(Leaving {
            span: number,
            ticket,
            sparse: Sparse { span: number, owners, live_bytes, pages },
        })
    }

    /// Lets the span give slots again, if it still has live ones. True if fewer than `taken`: some
    /// were freed while it gave none.
    pub(super) fn end_evacuation(&self, number: u32, ticket: u64, taken: usize) -> bool {
        let mut state = self.state.lock();
        if state.leaving.get(&number) != Some(&ticket) {
            return false;
        }
        state.leaving.remove(&number);
        let span = state.spans[number as usize].as_ref();
        let left = span.expect("invariant: a span that is being emptied has live slots").taken;
        let is_new = state.partial.insert(number);
        assert!(is_new, "a span that is being emptied gives no slot");
        (left as usize) < taken
    }

    /// Frees a slot; the last one frees the span.
    pub(super) fn put(&self, pages: &Pages, number: u32, slot: u32) {
        let mut state = self.state.lock();
        let span = state.spans[number as usize].as_mut().expect("invariant: a taken slot's span");
        span.put_slot(slot);
        if span.taken > 0 {
            if !state.leaving.contains_key(&number) {
                state.partial.insert(number);
            }
            return;
        }
        state.leaving.remove(&number);
        let empty = state.spans[number as usize].take();
        state.partial.remove(&number);
        state.vacant.push(number);
        drop(state);
        if let Some(span) = empty {
            pages.put(span.pages);
        }
    }

    /// Whether a slot is free without another page.
    pub(super) fn has_free_slot(&self) -> bool {
        !self.state.lock().partial.is_empty()
    }

    /// The span with the fewest live bytes, of those looked at that have a free slot.
    pub(super) fn sparsest(&self, skip: &[Vec<u64>]) -> Option<Sparse> {
        let state = self.state.lock();
        let numbers = state.partial.iter().rev().take(LOOKED_AT);
        let (&number, span) = numbers
            .filter_map(|number| Some((number, state.spans[*number as usize].as_ref()?)))
            .filter(|(_, span)| !skip.iter().any(|owners| span.has_owners(owners)))
            .min_by_key(|(_, span)| span.taken)?;
        Some(Sparse {
            span: number,
            owners: span.live_owners(),
            live_bytes: u64::from(span.taken) * slot_bytes(self.class) as u64,
            pages: span.pages.end - span.pages.start,
        })
    }
}

impl State {
    fn add_span(&mut self, pages: Range<u64>, slots: u32) -> u32 {
        let words = slots.div_ceil(64) as usize;
        let mut free = vec![u64::MAX; words];
        if !slots.is_multiple_of(64) {
            free[words - 1] = (1 << (slots % 64)) - 1;
        }
        let owners = vec![0; slots as usize].into_boxed_slice();
        let span = Span { pages, free, taken: 0, owners };
        let number = match self.vacant.pop() {
            Some(number) => {
                assert!(self.spans[number as usize].is_none(), "a vacant position has no span");
                self.spans[number as usize] = Some(span);
                number
            }
            None => {
                self.spans.push(Some(span));
                (self.spans.len() - 1) as u32
            }
        };
        self.partial.insert(number);
        number
    }
}

impl Span {
    fn take_slot(&mut self, owner: u64) -> u32 {
        let word = self.free.iter().position(|&word| word != 0);
        let word = word.expect("invariant: a partial span has a free slot");
        let bit = self.free[word].trailing_zeros();
        self.free[word] &= !(1 << bit);
        self.taken += 1;
        let slot = word as u32 * 64 + bit;
        self.owners[slot as usize] = owner;
        slot
    }

    fn put_slot(&mut self, slot: u32) {
        let word = slot as usize / 64;
        let bit = 1_u64 << (slot % 64);
        assert!(self.free[word] & bit == 0, "slot {slot} was free");
        self.free[word] |= bit;
        self.taken -= 1;
    }

    fn is_taken(&self, slot: usize) -> bool {
        self.free[slot / 64] & (1 << (slot % 64)) == 0
    }

    fn live_owners(&self) -> Vec<u64> {
        (0..self.owners.len()).filter(|&s| self.is_taken(s)).map(|s| self.owners[s]).collect()
    }

    fn has_owners(&self, owners: &[u64]) -> bool {
        self.live_owners() == owners
    }
}
