//! What users of the module rely on: names of the policies, and policies of their own.

use std::collections::VecDeque;

use vmem_core::policy::{Pick, Policy, Probe, STEPS_MAX, Token, build};
use vmem_core::{PolicyKind, VirtualMemoryError};

#[test]
fn names_go_there_and_back() {
    assert_eq!(PolicyKind::default(), PolicyKind::Lru);
    for kind in [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo] {
        assert_eq!(kind.to_string().parse::<PolicyKind>().unwrap(), kind);
        assert_eq!(kind.to_string().to_uppercase().parse::<PolicyKind>().unwrap(), kind);
    }
    let error = "mru".parse::<PolicyKind>().unwrap_err();
    assert!(matches!(error, VirtualMemoryError::InvalidConfig { field: "policy", .. }));
    assert!(error.to_string().contains("s3-fifo"), "{error} says what there is");
}

/// First in, first out, by somebody who has the public items only.
#[derive(Debug, Default)]
struct Fifo {
    queue: VecDeque<(u32, u64)>,
    parked: Vec<(u32, u64)>,
    next: u32,
}

impl Policy for Fifo {
    fn insert(&mut self, id: u64, _stamp: u64, _footprint: u64) -> Token {
        self.next += 1;
        self.queue.push_back((self.next, id));
        Token::new(self.next)
    }

    fn remove(&mut self, token: Token) {
        self.queue.retain(|entry| entry.0 != token.position());
        self.parked.retain(|entry| entry.0 != token.position());
    }

    fn victim(&mut self, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        for _ in 0..STEPS_MAX.min(self.queue.len()) {
            let Some(entry) = self.queue.pop_front() else { break };
            match probe(entry.1) {
                Probe::Evictable { .. } => {
                    self.queue.push_front(entry);
                    return Pick::Victim { id: entry.1, hurried: false };
                }
                Probe::Busy { .. } => self.queue.push_back(entry),
                Probe::Pinned | Probe::Gone => self.parked.push(entry),
            }
        }
        if self.queue.is_empty() { Pick::Empty } else { Pick::Retry }
    }

    fn settle(&mut self, _steps: usize, _probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        false
    }

    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64)) {
        self.queue.iter().take(limit).for_each(|entry| visit(entry.1));
    }

    fn unpark(&mut self, token: Token) {
        let at = self.parked.iter().position(|entry| entry.0 == token.position());
        self.queue.extend(at.map(|at| self.parked.swap_remove(at)));
    }

    fn len(&self) -> usize {
        self.queue.len() + self.parked.len()
    }

    fn memory_bytes(&self) -> usize {
        (self.queue.capacity() + self.parked.capacity()) * size_of::<(u32, u64)>()
    }
}

/// A policy of one's own and those that are built in agree where nothing is used twice.
#[test]
fn all_are_first_in_first_out_where_nothing_is_used_twice() {
    let kinds = [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo];
    let own: Box<dyn Policy> = Box::<Fifo>::default();
    for mut policy in kinds.into_iter().map(build).chain([own]) {
        let tokens: Vec<Token> = (0..300).map(|id| policy.insert(id, id, 64)).collect();
        for expected in 0..300 {
            let mut cold = Vec::new();
            policy.coldest(2, &mut |id| cold.push(id));
            assert_eq!(cold[0], expected, "{policy:?}");
            let pick = policy.victim(&mut |id| Probe::Evictable { stamp: id, touches: 0 });
            assert_eq!(pick, Pick::Victim { id: expected, hurried: false }, "{policy:?}");
            policy.remove(tokens[expected as usize]);
        }
        assert!(policy.is_empty());
    }
}

/// A token that is given back twice is a broken ledger, and is not passed over in silence.
#[test]
fn a_token_is_given_back_once() {
    for kind in [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo] {
        let twice = std::panic::catch_unwind(|| {
            let mut policy = build(kind);
            let _other = policy.insert(1, 1, 64);
            let token = policy.insert(2, 2, 64);
            policy.remove(token);
            policy.remove(token);
        });
        assert!(twice.is_err(), "{kind}");
    }
}
