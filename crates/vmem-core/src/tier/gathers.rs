//! What gathers have copied of objects that are not on their device, and which of these are being
//! promoted for that.
//!
//! Invariant: at most `COUNTED_MAX` objects are remembered, the first that came are forgotten
//! first; so an object that is never gathered takes no memory, and the others take no more than
//! that many entries do. An object is asked for once at a time, and its count begins anew then.
//! Counted by gathers; one for each device.

use std::collections::{HashMap, VecDeque};

use foldhash::fast::FixedState;

use crate::locks::{self, Lock};

/// Objects that are remembered.
const COUNTED_MAX: usize = 256 * 1024;
/// Objects that are being promoted at once, if there is staging for more; and the bytes of these
/// from which on none is added.
const ASKED_MAX: usize = 32;
const ASKED_BYTES_MAX: u64 = 16 << 20;
/// Each may hold a piece of staging, of which they leave the rest to others.
const STAGING_SHARE: usize = 4;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Gathers(Lock<Counts, { locks::GATHERS }>);

#[derive(Debug, Default)]
struct Counts {
    /// The ids are the store's own numbers: its users cannot make them collide.
    by_object: HashMap<u64, Count, FixedState>,
    /// The objects in the order in which their counts began; some have ended since.
    begun: VecDeque<(u64, u64)>,
    /// What is being promoted, with its bytes.
    asked: Vec<(u64, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Count {
    /// What gathers have copied of the object.
    bytes: u64,
    /// When the first of them did, in nanoseconds of the store's clock.
    since: u64,
}

impl Gathers {
    /// Counts the bytes that a gather copies of an object at the time `now`. Returns how many there
    /// were before; none while the object is being promoted.
    pub(crate) fn count(&self, object: u64, bytes: u64, now: u64) -> Option<u64> {
        let mut counts = self.0.lock();
        if counts.is_asked(object) {
            return None;
        }
        if let Some(count) = counts.by_object.get_mut(&object) {
            let before = count.bytes;
            count.bytes = before.saturating_add(bytes);
            return Some(before);
        }
        counts.begin(object, Count { bytes, since: now });
        Some(0)
    }

    /// The object is going to be promoted, unless it is already or many others are, for this many
    /// pieces of staging. Returns since when it was counted.
    pub(crate) fn ask(&self, object: u64, len: u64, staging_pieces: usize) -> Option<u64> {
        let mut counts = self.0.lock();
        let asked_bytes: u64 = counts.asked.iter().map(|(_, bytes)| bytes).sum();
        let asked_max = (staging_pieces / STAGING_SHARE).clamp(1, ASKED_MAX);
        let are_many = counts.asked.len() >= asked_max || asked_bytes >= ASKED_BYTES_MAX;
        if are_many || counts.is_asked(object) {
            return None;
        }
        let count = counts.by_object.remove(&object)?;
        counts.asked.push((object, len));
        Some(count.since)
    }

    /// The promotion has ended, well or not.
    pub(crate) fn end(&self, object: u64) {
        let mut counts = self.0.lock();
        let before = counts.asked.len();
        counts.asked.retain(|(one, _)| *one != object);
        assert!(before - counts.asked.len() == 1, "a promotion ends once");
    }

    /// What it takes in memory, in bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let counts = self.0.lock();
        let table = counts.by_object.capacity() * (size_of::<(u64, Count)>() + 1);
        (table + counts.begun.capacity() * size_of::<(u64, u64)>()) as u64
    }
}

impl Counts {
    fn is_asked(&self, object: u64) -> bool {
        self.asked.iter().any(|(one, _)| *one == object)
    }

    fn begin(&mut self, object: u64, count: Count) {
        self.by_object.insert(object, count);
        self.begun.push_back((object, count.since));
        if self.begun.len() > COUNTED_MAX
            && let Some((oldest, since)) = self.begun.pop_front()
            && self.by_object.get(&oldest).is_some_and(|count| count.since == since)
        {
            self.by_object.remove(&oldest);
        }
        assert!(self.by_object.len() <= self.begun.len(), "each count has a place in the order");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECES: usize = STAGING_SHARE * ASKED_MAX;

    #[test]
    fn counts_begin_anew_once_the_object_was_asked_for() {
        let gathers = Gathers::default();
        assert_eq!(gathers.ask(7, 100, PIECES), None, "it was never gathered");
        assert_eq!(gathers.count(7, 60, 1000), Some(0));
        assert_eq!(gathers.count(7, 60, 2000), Some(60));
        assert_eq!(gathers.ask(7, 100, PIECES), Some(1000), "since the first gather");
        assert_eq!(gathers.count(7, 60, 3000), None, "it is being promoted");
        assert_eq!(gathers.ask(7, 100, PIECES), None, "once at a time");
        gathers.end(7);
        assert_eq!(gathers.ask(7, 100, PIECES), None, "nothing was counted since");
        assert_eq!(gathers.count(7, 60, 4000), Some(0));
    }

    #[test]
    fn few_are_asked_for_at_once_and_large_ones_in_their_turn() {
        let gathers = Gathers::default();
        let ask = |object, len| {
            gathers.count(object, len, 1);
            gathers.ask(object, len, PIECES).is_some()
        };
        assert!(ask(1, ASKED_BYTES_MAX - 1));
        assert!(ask(2, 1 << 40), "of any length, while the others have few bytes");
        assert!(!ask(3, 1), "they have too many");
        gathers.end(1);
        gathers.end(2);
        assert!((10..100).filter(|&object| ask(object, 1)).count() == ASKED_MAX);
        gathers.end(10);
        assert!(ask(4, 1), "one has ended");
        (11..42).chain([4]).for_each(|object| gathers.end(object));
        gathers.count(5, 1, 1);
        gathers.count(6, 1, 1);
        assert!(gathers.ask(5, 1, 2).is_some(), "one, however little staging there is");
        assert!(gathers.ask(6, 1, 2).is_none());
    }

    #[test]
    fn first_counts_are_forgotten_beyond_the_bound() {
        let gathers = Gathers::default();
        let most = COUNTED_MAX as u64;
        for object in 0..2 * most {
            assert_eq!(gathers.count(object, 1, object), Some(0));
        }
        assert_eq!(gathers.count(most, 1, 0), Some(1), "the last ones are remembered");
        assert_eq!(gathers.count(most - 1, 1, 9 * most), Some(0));
        let bytes = gathers.memory_bytes();
        assert!(bytes < 64 * 2 * most, "{bytes} bytes for {most} objects");
        // Counts that end leave no more behind.
        for round in 0..4 * most {
            gathers.count(5, 1, 10 * most + round);
            assert!(gathers.ask(5, 1, PIECES).is_some());
            gathers.end(5);
        }
        assert!(gathers.memory_bytes() <= bytes);
    }
}
