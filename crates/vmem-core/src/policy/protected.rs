//! What was prefetched and not used yet goes last, under every policy.
//!
//! Invariant: a protected entry is in the order of arrivals or parked, and unknown to the policy
//! below; one that was used, or whose protection has ended, is known to that policy and to it
//! alone. Where victims are looked for, at most half of the tier is protected. Wraps what `choice`
//! builds.
//!
//! A policy takes an entry that was never used for the first that can go, and what was prefetched
//! is that until its first use. It is kept from the policy until then, so that the first use is
//! what the policy takes for its entry. Protection ends without a use when as many bytes came in as
//! the tier has. Of more than half of the tier the last that came are not protected: they are the
//! furthest from their use.

use std::fmt;
use std::ops::RangeInclusive;

use super::order::Order;
use super::table::Table;
use super::{Entry, Pass, Pick, Policy, Probe, STEPS_MAX, Token};

/// Protected entries that one call asks, beside those that the policy below asks: as many when a
/// pass begins, and as many where all else cannot go.
pub const PROTECTED_STEPS: usize = 16;

/// Tokens from here on are of this module's own table.
const OWN: u32 = 1 << 31;

/// A policy that lets what was prefetched and not used yet go last.
pub struct Protected {
    inner: Box<dyn Policy>,
    table: Table<Guest>,
    /// Protected entries by arrival.
    order: Order,
    /// Entries that came prefetched, and bytes that came, so far.
    arrivals: u64,
    came_bytes: u64,
    capacity_bytes: u64,
    protected_bytes: u128,
    /// The arrival from which on it is next asked for uses.
    ask_from: u64,
    /// How many were handed to the policy below, so far.
    released: u64,
    /// Guests that the policy below does not know.
    apart: usize,
}

#[derive(Debug)]
struct Guest {
    entry: Entry,
    arrival: u64,
    /// As many bytes had come by then.
    came_at: u64,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Protected,
    Parked,
    Below(Token),
}

/// What a pass remembers.
#[derive(Default)]
struct Begun {
    below: Option<Pass>,
    /// More than half of the tier was protected when it began: these arrivals are still to be
    /// asked whether they were used.
    asks: Option<RangeInclusive<u64>>,
    /// Releases that the pass below knows of, and how often it may still begin anew for others.
    released: u64,
    renewals: usize,
    /// Protected entries from this arrival on were asked.
    before: u64,
}

impl Protected {
    /// Protects what is prefetched into a tier of `capacity_bytes` that `inner` orders.
    pub fn new(inner: Box<dyn Policy>, capacity_bytes: u64) -> Self {
        Protected {
            inner,
            table: Table::default(),
            order: Order::default(),
            arrivals: 0,
            came_bytes: 0,
            capacity_bytes,
            protected_bytes: 0,
            ask_from: 0,
            released: 0,
            apart: 0,
        }
    }

    fn protect(&mut self, at: u32) {
        let guest = &mut self.table[at];
        guest.place = Place::Protected;
        self.order.file(guest.arrival, at);
        self.protected_bytes += u128::from(guest.entry.footprint);
    }

    /// Takes it out of the order of arrivals.
    fn take_out(&mut self, at: u32, place: Place) {
        let guest = &mut self.table[at];
        guest.place = place;
        self.order.remove(guest.arrival, at);
        self.protected_bytes -= u128::from(guest.entry.footprint);
    }

    /// From now on the policy below has it.
    fn release(&mut self, at: u32, stamp: u64) {
        let token = self.inner.insert(Entry { stamp, ..self.table[at].entry });
        self.take_out(at, Place::Below(token));
        self.apart -= 1;
        self.released += 1;
    }

    /// Ends the protection of what came long ago.
    fn release_old(&mut self) {
        while let Some(key) = self.order.next_from(0, u64::MAX)
            && self.came_bytes - self.table[key.entry].came_at > self.capacity_bytes
        {
            self.release(key.entry, self.table[key.entry].entry.stamp);
        }
    }

    /// Asks a protected entry whether it was used.
    fn ask(&mut self, at: u32, probe: &mut dyn FnMut(u64) -> Probe) {
        match probe(self.table[at].entry.id) {
            Probe::Evictable { touches, stamp } if touches > 0 => self.release(at, stamp),
            // Its fetch may be what it is busy with.
            Probe::Evictable { .. } | Probe::Busy { .. } | Probe::Unfit => {}
            Probe::Pinned | Probe::Gone => self.take_out(at, Place::Parked),
        }
    }

    /// Asks some protected entries whether they were used.
    fn release_used(&mut self, probe: &mut dyn FnMut(u64) -> Probe) {
        for _ in 0..PROTECTED_STEPS.min(self.order.len()) {
            let key = self.order.next_from(self.ask_from, u64::MAX);
            let Some(key) = key.or_else(|| self.order.next_from(0, u64::MAX)) else { return };
            self.ask_from = key.rank() + 1;
            self.ask(key.entry, probe);
        }
    }

    /// Reduces what is protected to half of the tier: whatever was used, then the last that
    /// came. False if more is left to do.
    fn release_excess(
        &mut self,
        asks: &mut RangeInclusive<u64>,
        probe: &mut dyn FnMut(u64) -> Probe,
    ) -> bool {
        for _ in 0..STEPS_MAX {
            if !self.is_excessive() {
                return true;
            }
            if let Some(key) = self.order.next_from(*asks.start(), *asks.end()) {
                *asks = key.rank() + 1..=*asks.end();
                self.ask(key.entry, probe);
            } else if let Some(key) = self.order.last_before(u64::MAX) {
                self.release(key.entry, self.table[key.entry].entry.stamp);
            }
        }
        !self.is_excessive()
    }

    fn is_excessive(&self) -> bool {
        self.protected_bytes > u128::from(self.capacity_bytes / 2)
    }

    /// A victim among the protected ones, the last that came first.
    fn last_resort(&mut self, before: &mut u64, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        for _ in 0..PROTECTED_STEPS {
            let Some(key) = self.order.last_before(*before) else { return Pick::Empty };
            *before = key.rank();
            let id = self.table[key.entry].entry.id;
            match probe(id) {
                Probe::Evictable { .. } => return Pick::Victim { id, hurried: false },
                Probe::Busy { .. } | Probe::Unfit => {}
                Probe::Pinned | Probe::Gone => self.take_out(key.entry, Place::Parked),
            }
        }
        Pick::Retry
    }

    fn guest(&self, token: Token) -> Option<u32> {
        (token.0 >= OWN).then(|| token.0 - OWN)
    }

    fn add(&mut self, entry: Entry, place: Place) -> u32 {
        self.arrivals += 1;
        let arrival = self.arrivals;
        let came_at = self.came_bytes;
        let at = self.table.add(Guest { entry, arrival, came_at, place });
        assert!(at < OWN, "more prefetched entries than positions");
        at
    }
}

impl Policy for Protected {
    fn insert(&mut self, entry: Entry) -> Token {
        self.came_bytes = self.came_bytes.saturating_add(entry.footprint);
        self.release_old();
        if !entry.prefetched {
            let token = self.inner.insert(entry);
            // A policy of the user's may use any number.
            return match self.guest(token) {
                Some(_) => Token(OWN + self.add(entry, Place::Below(token))),
                None => token,
            };
        }
        let at = self.add(entry, Place::Parked);
        self.protect(at);
        self.apart += 1;
        Token(OWN + at)
    }

    fn remove(&mut self, token: Token) {
        let Some(at) = self.guest(token) else { return self.inner.remove(token) };
        let place = self.table[at].place;
        if place == Place::Protected {
            self.take_out(at, Place::Parked);
        }
        self.table.take(at);
        match place {
            Place::Below(token) => self.inner.remove(token),
            Place::Protected | Place::Parked => self.apart -= 1,
        }
    }

    fn victim(&mut self, pass: &mut Pass, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        let limit = pass.limit();
        let fresh = || limit.map_or_else(Pass::default, Pass::colder_than);
        let begun: &mut Begun = pass.state();
        if begun.below.is_none() {
            if begun.asks.is_some() || self.is_excessive() {
                let asks = begun.asks.get_or_insert(0..=self.arrivals);
                if !self.release_excess(asks, probe) {
                    return Pick::Retry;
                }
            } else {
                self.release_used(probe);
            }
            let before = self.arrivals + 1;
            *begun = Begun {
                below: Some(fresh()),
                asks: None,
                released: self.released,
                renewals: self.order.len(),
                before,
            };
        }
        match self.inner.victim(begun.below.get_or_insert_with(fresh), probe) {
            // What was protected when it began is below by now, where it came too late for it.
            Pick::Empty if begun.released != self.released && begun.renewals > 0 => {
                begun.released = self.released;
                begun.renewals -= 1;
                begun.below = Some(fresh());
                Pick::Retry
            }
            Pick::Empty => self.last_resort(&mut begun.before, probe),
            found => found,
        }
    }

    fn settle(&mut self, steps: usize, probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        self.inner.settle(steps, probe)
    }

    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64)) {
        let mut left = limit;
        self.inner.coldest(limit, &mut |id| {
            left -= 1;
            visit(id);
        });
        let protected = self.order.entries_from(0).take(left);
        protected.for_each(|at| visit(self.table[at].entry.id));
    }

    fn unpark(&mut self, token: Token) {
        let Some(at) = self.guest(token) else { return self.inner.unpark(token) };
        match self.table[at].place {
            Place::Below(token) => self.inner.unpark(token),
            Place::Protected => {}
            Place::Parked => self.protect(at),
        }
    }

    fn len(&self) -> usize {
        self.inner.len() + self.apart
    }

    fn memory_bytes(&self) -> usize {
        self.inner.memory_bytes() + self.table.memory_bytes() + self.order.memory_bytes()
    }
}

impl fmt::Debug for Protected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Protected")
            .field("inner", &self.inner)
            .field("protected", &self.order.len())
            .field("protected_bytes", &self.protected_bytes)
            .finish_non_exhaustive()
    }
}
