//! Which slabs of object space a device has registered.
//!
//! Invariant: a slab that is not plain may be known to the device: none of its pages is given back
//! to the system; and one that copies use is never unregistered. Each copy counts, by the detour
//! too: the driver decides which way it goes when it is handed in, by what is registered then. It
//! becomes registered once as many bytes as it has were copied by the detour, so that registering
//! never costs more than what it spares. Pure; called by `pages`, under its lock.

use std::collections::BTreeMap;
use std::ops::Range;

/// Registrations that a store of any size makes do with, about.
const REGISTRATIONS_WANTED: u64 = 4096;
/// The smallest slab of a large store and the largest of any, in pages: 2 MiB and 1 GiB.
const SLAB_PAGES: (u64, u64) = (512, 262_144);
/// The fewest slabs of a small store.
const SLABS_MIN: u64 = 16;

/// All slabs of object space.
#[derive(Debug)]
pub(super) struct Slabs {
    pages_each: u64,
    /// Those that a copy has touched.
    known: BTreeMap<u64, Slab>,
}

#[derive(Clone, Copy, Debug)]
struct Slab {
    phase: Phase,
    /// Copies that touch it now.
    users: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The device does not know it. `copied` of its bytes went by the detour.
    Plain { copied: u64 },
    /// The device reaches it.
    Registered,
    /// A thread is registering or unregistering it: no copy may begin.
    Changing,
    /// The device may know it for ever.
    Stuck,
}

const UNKNOWN: Slab = Slab { phase: Phase::Plain { copied: 0 }, users: 0 };

/// How a copy reaches a part of a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Directly.
    Direct,
    /// By the detour.
    Detour,
    /// By the detour, unless it can be registered now.
    Due,
}

impl Slabs {
    /// For a budget of `capacity` pages.
    pub(super) fn new(capacity: u64) -> Self {
        let wanted = (capacity / REGISTRATIONS_WANTED).max(1).next_power_of_two();
        let pages = wanted.clamp(SLAB_PAGES.0, SLAB_PAGES.1);
        let small = (capacity / SLABS_MIN).max(1).next_power_of_two();
        Slabs { pages_each: pages.min(small), known: BTreeMap::new() }
    }

    /// The length of a slab, in pages.
    pub(super) fn pages_each(&self) -> u64 {
        self.pages_each
    }

    /// The pages of a slab.
    pub(super) fn pages(&self, slab: u64) -> Range<u64> {
        slab * self.pages_each..(slab + 1) * self.pages_each
    }

    /// A run of pages by slabs.
    pub(super) fn split(&self, run: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> + use<> {
        let each = self.pages_each;
        (run.start / each..run.end.div_ceil(each)).map(move |slab| {
            let start = slab * each;
            let end = (slab + 1) * each;
            (slab, start.max(run.start)..end.min(run.end))
        })
    }

    /// Begins a copy of `bytes` that touches a slab of `slab_bytes`, which is not changing. The
    /// copy is counted until it leaves.
    pub(super) fn enter(&mut self, slab: u64, bytes: u64, slab_bytes: u64) -> Way {
        let slab = self.known.entry(slab).or_insert(UNKNOWN);
        slab.users += 1;
        match &mut slab.phase {
            Phase::Registered => Way::Direct,
            Phase::Plain { copied } => {
                *copied = copied.saturating_add(bytes);
                if *copied >= slab_bytes { Way::Due } else { Way::Detour }
            }
            Phase::Changing | Phase::Stuck => Way::Detour,
        }
    }

    /// A copy has ended.
    pub(super) fn leave(&mut self, slab: u64) {
        // Of one that the device was made to forget meanwhile nothing is known any more.
        if let Some(slab) = self.known.get_mut(&slab) {
            assert!(slab.users > 0, "more copies leave a slab than entered it");
            slab.users -= 1;
        }
    }

    /// Whether its pages may be given back as they are.
    pub(super) fn is_plain(&self, slab: u64) -> bool {
        self.known.get(&slab).is_none_or(|slab| matches!(slab.phase, Phase::Plain { .. }))
    }

    /// Whether it may be unregistered now.
    pub(super) fn is_idle(&self, slab: u64) -> bool {
        let registered = self.known.get(&slab).filter(|slab| slab.phase == Phase::Registered);
        registered.is_some_and(|slab| slab.users == 0 || crate::planted!("slab-in-use"))
    }

    /// Whether the device knows all slabs of these pages.
    pub(super) fn are_registered(&self, pages: Range<u64>) -> bool {
        let is_registered = |slab: &Slab| slab.phase == Phase::Registered;
        let slabs = pages.start / self.pages_each..pages.end.div_ceil(self.pages_each);
        slabs.into_iter().all(|slab| self.known.get(&slab).is_some_and(is_registered))
    }

    /// Whether a thread is registering or unregistering it.
    pub(super) fn is_changing(&self, slab: u64) -> bool {
        self.known.get(&slab).is_some_and(|slab| slab.phase == Phase::Changing)
    }

    /// The caller is about to register it, or to unregister it.
    pub(super) fn change(&mut self, slab: u64) {
        self.set(slab, Phase::Changing);
    }

    /// The device knows it.
    pub(super) fn registered(&mut self, slab: u64) {
        self.set(slab, Phase::Registered);
    }

    /// The device does not know it.
    pub(super) fn plain(&mut self, slab: u64) {
        self.set(slab, UNKNOWN.phase);
        if self.known.get(&slab).is_some_and(|slab| slab.users == 0) {
            self.known.remove(&slab);
        }
    }

    /// The device may know it for ever.
    pub(super) fn stuck(&mut self, slab: u64) {
        self.set(slab, Phase::Stuck);
    }

    fn set(&mut self, slab: u64, phase: Phase) {
        self.known.entry(slab).or_insert(UNKNOWN).phase = phase;
    }

    /// Slabs that the device knows, or may know.
    pub(super) fn all_registered(&self) -> Vec<u64> {
        let registered =
            self.known.iter().filter(|(_, slab)| !matches!(slab.phase, Phase::Plain { .. }));
        registered.map(|(&slab, _)| slab).collect()
    }

    /// How many the device knows.
    pub(super) fn count_registered(&self) -> u64 {
        let registered = self.known.values().filter(|slab| slab.phase == Phase::Registered);
        registered.count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slab_is_due_once_it_was_copied() {
        let mut slabs = Slabs::new(1 << 20);
        assert_eq!(slabs.pages_each(), 512);
        assert_eq!(slabs.enter(3, 60, 100), Way::Detour);
        assert_eq!(slabs.enter(4, 60, 100), Way::Detour);
        assert_eq!(slabs.enter(3, 40, 100), Way::Due);
        slabs.change(3);
        assert!(slabs.is_changing(3) && !slabs.is_plain(3) && !slabs.is_idle(3));
        slabs.registered(3);
        assert_eq!(slabs.enter(3, 1, 100), Way::Direct);
        (0..2).for_each(|_| slabs.leave(3));
        assert!(!slabs.is_idle(3), "a copy uses it, by the detour or not");
        slabs.leave(3);
        assert!(slabs.is_idle(3));
        slabs.plain(3);
        assert_eq!(slabs.enter(3, 60, 100), Way::Detour, "it begins again");
    }

    #[test]
    fn slabs_cover_a_run() {
        let slabs = Slabs::new(1 << 20);
        let parts: Vec<_> = slabs.split(500..1030).collect();
        assert_eq!(parts, [(0, 500..512), (1, 512..1024), (2, 1024..1030)]);
        assert_eq!(Slabs::new(64).pages_each(), 4);
        assert_eq!(Slabs::new(1 << 40).pages_each(), 262_144);
    }
}
