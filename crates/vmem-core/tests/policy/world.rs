//! The objects of a store, as far as a policy asks about them.

use std::collections::HashMap;

use vmem_core::policy::{Entry, PROTECTED_STEPS, Pass, Pick, Policy, Probe, STEPS_MAX, Token};

/// Between two operations, in nanoseconds: entries that are busy are filed a few apart.
const TICK_NS: u64 = 1_000_000;

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) marks: HashMap<u64, Mark>,
    pub(crate) policy: Box<dyn Policy>,
    /// The entries that were busy, in this order, since this was last taken.
    pub(crate) met_busy: Vec<u64>,
    /// How often each entry was asked, since this was last taken.
    pub(crate) asked: HashMap<u64, u32>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    pub(crate) stamp: u64,
    pub(crate) touches: u32,
    pub(crate) pinned: bool,
    pub(crate) busy: bool,
    pub(crate) unfit: bool,
    token: Token,
}

fn answer(marks: &mut HashMap<u64, Mark>, now: u64, met_busy: &mut Vec<u64>, id: u64) -> Probe {
    let Some(mark) = marks.get_mut(&id) else { return Probe::Gone };
    if mark.pinned {
        return Probe::Pinned;
    }
    if mark.busy {
        met_busy.push(id);
        return Probe::Busy { stamp: now };
    }
    if mark.unfit {
        return Probe::Unfit;
    }
    let touches = std::mem::take(&mut mark.touches);
    Probe::Evictable { stamp: mark.stamp, touches }
}

impl World {
    pub(crate) fn new(policy: Box<dyn Policy>) -> Self {
        World { now: 0, marks: HashMap::new(), policy, met_busy: Vec::new(), asked: HashMap::new() }
    }

    fn tick(&mut self) -> u64 {
        self.now += TICK_NS;
        self.now
    }

    pub(crate) fn insert(&mut self, id: u64, footprint: u64) {
        let stamp = self.tick();
        self.enter(Entry::new(id, stamp, footprint));
    }

    /// Adds an entry that was prefetched.
    pub(crate) fn prefetch(&mut self, id: u64, footprint: u64) {
        let stamp = self.tick();
        self.enter(Entry { prefetched: true, ..Entry::new(id, stamp, footprint) });
    }

    pub(crate) fn enter(&mut self, entry: Entry) {
        let token = self.policy.insert(entry);
        let stamp = entry.stamp;
        let mark = Mark { stamp, touches: 0, pinned: false, busy: false, unfit: false, token };
        assert!(self.marks.insert(entry.id, mark).is_none());
    }

    /// Marks an access, without a call to the policy.
    pub(crate) fn touch(&mut self, id: u64) {
        let now = self.tick();
        let mark = self.marks.get_mut(&id).unwrap();
        (mark.stamp, mark.touches) = (now, (mark.touches + 1).min(5));
    }

    pub(crate) fn remove(&mut self, id: u64) {
        let mark = self.marks.remove(&id).unwrap();
        self.policy.remove(mark.token);
    }

    pub(crate) fn pin(&mut self, id: u64) {
        self.marks.get_mut(&id).unwrap().pinned = true;
    }

    pub(crate) fn unpin(&mut self, id: u64) {
        let mark = self.marks.get_mut(&id).unwrap();
        mark.pinned = false;
        self.policy.unpark(mark.token);
    }

    pub(crate) fn set_busy(&mut self, id: u64, busy: bool) {
        self.marks.get_mut(&id).unwrap().busy = busy;
    }

    /// One slice; true if more is left.
    pub(crate) fn settle(&mut self, steps: usize) -> bool {
        let now = self.tick();
        let marks = &mut self.marks;
        let met = &mut self.met_busy;
        self.policy.settle(steps, &mut |id| answer(marks, now, met, id))
    }

    pub(crate) fn set_unfit(&mut self, id: u64, unfit: bool) {
        self.marks.get_mut(&id).unwrap().unfit = unfit;
    }

    /// One call of a pass.
    pub(crate) fn look(&mut self, pass: &mut Pass) -> Pick {
        let now = self.tick();
        let marks = &mut self.marks;
        let met = &mut self.met_busy;
        let asked = &mut self.asked;
        let mut steps = 0;
        let pick = self.policy.victim(pass, &mut |id| {
            steps += 1;
            *asked.entry(id).or_default() += 1;
            answer(marks, now, met, id)
        });
        assert!(steps <= STEPS_MAX + 2 * PROTECTED_STEPS);
        pick
    }

    /// The next victim of a pass, and whether it was found in a hurry.
    pub(crate) fn victim_of(&mut self, pass: &mut Pass) -> Option<(u64, bool)> {
        loop {
            match self.look(pass) {
                Pick::Victim { id, hurried } => return Some((id, hurried)),
                Pick::Retry => {}
                Pick::Empty => return None,
            }
        }
    }

    /// The first victim of a new pass.
    pub(crate) fn victim(&mut self) -> Option<(u64, bool)> {
        self.victim_of(&mut Pass::default())
    }

    /// All entries in the order in which they are likely to go.
    pub(crate) fn order(&self) -> Vec<u64> {
        let mut order = Vec::new();
        self.policy.coldest(usize::MAX, &mut |id| order.push(id));
        order
    }
}
