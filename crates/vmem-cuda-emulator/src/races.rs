//! Which operations are ordered before which.
//!
//! Invariant: an operation is ordered before another one if its stream's count for it is in the
//! other's clock: by the order of one stream, by an event that the other stream waited for, or
//! because the host saw it end before the other was submitted. Pure; called under the world's lock.

use std::collections::HashMap;
use std::ops::Range;

/// For each stream, how many of its operations come before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Clock(HashMap<u64, u64>);

impl Clock {
    pub(crate) fn get(&self, stream: u64) -> u64 {
        self.0.get(&stream).copied().unwrap_or(0)
    }

    pub(crate) fn set(&mut self, stream: u64, count: u64) {
        self.0.insert(stream, count);
    }

    /// Everything that comes before `other` comes before this too.
    pub(crate) fn join(&mut self, other: &Clock) {
        for (&stream, &count) in &other.0 {
            let mine = self.0.entry(stream).or_default();
            *mine = (*mine).max(count);
        }
    }
}

/// What an operation does to device memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) range: Range<u64>,
    pub(crate) writes: bool,
}

#[derive(Debug)]
struct Past {
    stream: u64,
    count: u64,
    name: &'static str,
    access: Access,
}

/// The operations of which the host does not know yet that they have ended.
#[derive(Debug, Default)]
pub(crate) struct Races {
    past: Vec<Past>,
}

impl Races {
    /// Operation `count` of `stream` has these accesses and comes after what `clock` says. Returns
    /// what it races with, in words.
    pub(crate) fn submit(
        &mut self,
        stream: u64,
        count: u64,
        name: &'static str,
        accesses: &[Access],
        clock: &Clock,
        seen: &Clock,
    ) -> Vec<String> {
        self.past.retain(|past| past.count > seen.get(past.stream));
        let mut races = Vec::new();
        for access in accesses {
            let conflicts = |past: &&Past| {
                let overlap = past.access.range.start < access.range.end
                    && access.range.start < past.access.range.end;
                let ordered = past.stream == stream || past.count <= clock.get(past.stream);
                overlap && (past.access.writes || access.writes) && !ordered
            };
            races.extend(self.past.iter().filter(conflicts).map(|past| {
                format!(
                    "race: {name} on stream {stream:x} over {:x?} is not ordered after {} on \
                     stream {:x} over {:x?}",
                    access.range, past.name, past.stream, past.access.range
                )
            }));
        }
        let past = |access: &Access| Past { stream, count, name, access: access.clone() };
        self.past.extend(accesses.iter().map(past));
        races
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(range: Range<u64>) -> [Access; 1] {
        [Access { range, writes: true }]
    }

    #[test]
    fn unordered_operations_are_a_race() {
        let mut races = Races::default();
        let nothing = Clock::default();
        assert!(races.submit(1, 1, "copy", &write(0..10), &nothing, &nothing).is_empty());
        // The same stream is in order, other memory is no matter, two reads are none either.
        assert!(races.submit(1, 2, "copy", &write(5..15), &nothing, &nothing).is_empty());
        assert!(races.submit(2, 1, "copy", &write(15..20), &nothing, &nothing).is_empty());
        let read = [Access { range: 30..40, writes: false }];
        assert!(races.submit(1, 3, "copy", &read, &nothing, &nothing).is_empty());
        assert!(races.submit(2, 2, "copy", &read, &nothing, &nothing).is_empty());
        // After an event behind the first write only.
        let mut clock = Clock::default();
        clock.set(1, 1);
        let found = races.submit(2, 3, "kernel", &write(0..8), &clock, &nothing);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("kernel") && found[0].contains("copy"));
        clock.set(1, 2);
        assert!(races.submit(3, 1, "kernel", &write(12..14), &clock, &nothing).is_empty());
    }

    #[test]
    fn operation_that_the_host_saw_end_is_past() {
        let mut races = Races::default();
        let nothing = Clock::default();
        assert!(races.submit(1, 1, "copy", &write(0..10), &nothing, &nothing).is_empty());
        let mut seen = Clock::default();
        seen.set(1, 1);
        assert!(races.submit(2, 1, "copy", &write(0..10), &seen, &seen).is_empty());
        assert_eq!(races.past.len(), 1);
    }

    #[test]
    fn joined_clock_has_the_later_of_each() {
        let mut a = Clock::default();
        let mut b = Clock::default();
        a.set(1, 5);
        b.set(1, 3);
        b.set(2, 7);
        a.join(&b);
        assert_eq!((a.get(1), a.get(2), a.get(3)), (5, 7, 0));
    }
}
