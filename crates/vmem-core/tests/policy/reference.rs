//! The policies once more, written from their descriptions and notified of everything when it
//! happens: arrays, no laziness, no bound on anything.

use std::collections::{HashMap, HashSet};

use vmem_core::PolicyKind;

/// How an object stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Free,
    Busy,
    Unfit,
    Pinned,
}

pub(crate) trait Reference {
    fn insert(&mut self, id: u64, footprint: u64);
    fn touch(&mut self, id: u64);
    fn remove(&mut self, id: u64);
    fn unpin(&mut self, id: u64);
    fn victim(&mut self, state: &dyn Fn(u64) -> State) -> Option<u64>;
    fn len(&self) -> usize;

    /// These were found busy in a look that learns of accesses late: a use of each, in this order.
    fn found_busy(&mut self, _ids: &[u64]) {}

    /// Those that such a look must have asked before it came to this victim; none if this policy
    /// learns of nothing late.
    fn colder_than(&self, _victim: Option<u64>) -> Option<Vec<u64>> {
        None
    }
}

pub(crate) fn reference(kind: PolicyKind) -> Box<dyn Reference> {
    match kind {
        PolicyKind::Lru => Box::<RefLru>::default(),
        PolicyKind::Sieve => Box::<RefSieve>::default(),
        PolicyKind::S3Fifo => Box::<RefS3Fifo>::default(),
        other => panic!("no reference for {other}"),
    }
}

fn drop_from(queue: &mut Vec<u64>, id: u64) -> bool {
    let at = queue.iter().rposition(|&other| other == id);
    at.map(|at| queue.remove(at)).is_some()
}

/// The coldest is at index 0. What is pinned keeps its place and is passed over.
#[derive(Default)]
struct RefLru {
    order: Vec<u64>,
}

impl Reference for RefLru {
    fn insert(&mut self, id: u64, _footprint: u64) {
        self.order.push(id);
    }

    fn touch(&mut self, id: u64) {
        assert!(drop_from(&mut self.order, id));
        self.order.push(id);
    }

    fn remove(&mut self, id: u64) {
        assert!(drop_from(&mut self.order, id));
    }

    fn unpin(&mut self, _id: u64) {}

    fn victim(&mut self, state: &dyn Fn(u64) -> State) -> Option<u64> {
        self.order.iter().copied().find(|&id| state(id) == State::Free)
    }

    fn len(&self) -> usize {
        self.order.len()
    }

    fn found_busy(&mut self, ids: &[u64]) {
        ids.iter().for_each(|&id| self.touch(id));
    }

    fn colder_than(&self, victim: Option<u64>) -> Option<Vec<u64>> {
        Some(self.order.iter().copied().take_while(|&id| Some(id) != victim).collect())
    }
}

/// The oldest is at index 0; the hand moves up.
#[derive(Default)]
struct RefSieve {
    queue: Vec<u64>,
    parked: HashSet<u64>,
    visited: HashSet<u64>,
    /// The object under the hand; none: it is before the oldest.
    hand: Option<u64>,
}

impl RefSieve {
    fn at_hand(&self) -> Option<usize> {
        let at = self.hand.map_or(0, |hand| self.queue.iter().position(|&id| id == hand).unwrap());
        (at < self.queue.len()).then_some(at)
    }

    fn take_out(&mut self, id: u64) {
        let at = self.queue.iter().position(|&other| other == id).unwrap();
        if self.hand == Some(id) {
            self.hand = self.queue.get(at + 1).copied();
        }
        self.queue.remove(at);
    }
}

impl Reference for RefSieve {
    fn insert(&mut self, id: u64, _footprint: u64) {
        self.queue.push(id);
        self.visited.remove(&id);
    }

    fn touch(&mut self, id: u64) {
        self.visited.insert(id);
    }

    fn remove(&mut self, id: u64) {
        if !self.parked.remove(&id) {
            self.take_out(id);
        }
    }

    fn unpin(&mut self, id: u64) {
        if self.parked.remove(&id) {
            self.queue.push(id);
        }
    }

    /// A lap from the hand on; where it spares all that could go, the first of those. The hand
    /// comes along until something is passed over.
    fn victim(&mut self, state: &dyn Fn(u64) -> State) -> Option<u64> {
        let start = self.at_hand().unwrap_or(0);
        let lap = [&self.queue[start..], &self.queue[..start]].concat();
        let mut spared = None;
        let mut found = None;
        let mut comes_along = true;
        for id in lap {
            match state(id) {
                State::Pinned => {
                    self.take_out(id);
                    self.parked.insert(id);
                    continue;
                }
                State::Busy => {}
                State::Unfit => comes_along = false,
                State::Free if self.visited.contains(&id) => {
                    spared = spared.or(Some(id));
                    if comes_along {
                        self.visited.remove(&id);
                    }
                }
                State::Free => found = Some(id),
            }
            if comes_along {
                let next = self.queue.iter().position(|&other| other == id).unwrap() + 1;
                self.hand = found.or(self.queue.get(next).copied());
            }
            if found.is_some() {
                return found;
            }
        }
        if comes_along && spared.is_some() {
            self.hand = spared;
        }
        spared
    }

    fn len(&self) -> usize {
        self.queue.len() + self.parked.len()
    }
}

/// The oldest of each queue is at index 0.
#[derive(Default)]
struct RefS3Fifo {
    small: Vec<u64>,
    main: Vec<u64>,
    ghosts: Vec<u64>,
    /// The parked ones, and whether they were in the main queue.
    parked: HashMap<u64, bool>,
    freq: HashMap<u64, u32>,
    bytes: HashMap<u64, u64>,
    named: HashSet<u64>,
}

impl RefS3Fifo {
    fn bytes_of(&self, queue: &[u64]) -> u64 {
        queue.iter().map(|id| self.bytes[id]).sum()
    }

    fn is_turn_of_small(&self) -> bool {
        let small = self.bytes_of(&self.small);
        let main = self.bytes_of(&self.main);
        !self.small.is_empty() && (self.main.is_empty() || 10 * small >= small + main)
    }
}

impl Reference for RefS3Fifo {
    fn insert(&mut self, id: u64, footprint: u64) {
        self.freq.insert(id, 0);
        self.bytes.insert(id, footprint);
        let queue = if drop_from(&mut self.ghosts, id) { &mut self.main } else { &mut self.small };
        queue.push(id);
    }

    fn touch(&mut self, id: u64) {
        let freq = self.freq.get_mut(&id).unwrap();
        *freq = (*freq + 1).min(3);
    }

    fn remove(&mut self, id: u64) {
        let entries = self.len();
        let was_parked_in_small = self.parked.remove(&id) == Some(false);
        let was_in_small = drop_from(&mut self.small, id) || was_parked_in_small;
        drop_from(&mut self.main, id);
        self.freq.remove(&id);
        if self.named.remove(&id) && was_in_small {
            self.ghosts.push(id);
            let most = entries - entries / 10;
            self.ghosts.drain(..self.ghosts.len().saturating_sub(most));
        }
    }

    fn unpin(&mut self, id: u64) {
        match self.parked.remove(&id) {
            Some(true) => self.main.push(id),
            Some(false) => self.small.push(id),
            None => {}
        }
    }

    /// Each entry is asked once, and once more after each time that it was spared.
    fn victim(&mut self, state: &dyn Fn(u64) -> State) -> Option<u64> {
        let mut small = self.small.clone();
        let mut main = self.main.clone();
        let mut behind = Vec::new();
        let mut spared = false;
        loop {
            if main.is_empty() && std::mem::take(&mut spared) {
                main = std::mem::take(&mut behind);
            }
            let is_small = !small.is_empty() && (main.is_empty() || self.is_turn_of_small());
            let next = if is_small { &mut small } else { &mut main };
            if next.is_empty() {
                return None;
            }
            let id = next.remove(0);
            let own = if is_small { &mut self.small } else { &mut self.main };
            let freq = self.freq.get_mut(&id).unwrap();
            match state(id) {
                State::Unfit => {}
                State::Pinned => {
                    drop_from(own, id);
                    self.parked.insert(id, !is_small);
                }
                State::Busy => {
                    drop_from(own, id);
                    own.push(id);
                    behind.extend((!is_small).then_some(id));
                }
                State::Free if *freq > u32::from(is_small) => {
                    *freq = if is_small { 0 } else { *freq - 1 };
                    self.named.remove(&id);
                    drop_from(own, id);
                    self.main.push(id);
                    behind.push(id);
                    spared = true;
                }
                State::Free => {
                    self.named.insert(id);
                    return Some(id);
                }
            }
        }
    }

    fn len(&self) -> usize {
        self.small.len() + self.main.len() + self.parked.len()
    }
}
