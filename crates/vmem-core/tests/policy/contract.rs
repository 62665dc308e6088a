//! What users of the module rely on: names of the policies, and policies of their own.

use std::collections::BTreeMap;
use std::ops::Range;

use vmem_core::policy::{Entry, Pass, Pick, Policy, Probe, STEPS_MAX, Token, build};
use vmem_core::{PolicyKind, VirtualMemoryError};

use crate::KINDS;

#[test]
fn names_go_there_and_back() {
    assert_eq!(PolicyKind::default(), PolicyKind::Lru);
    for kind in KINDS {
        assert_eq!(kind.to_string().parse::<PolicyKind>().unwrap(), kind);
        assert_eq!(kind.to_string().to_uppercase().parse::<PolicyKind>().unwrap(), kind);
    }
    assert_eq!("S3FIFO".parse::<PolicyKind>().unwrap(), PolicyKind::S3Fifo);
    let error = "mru".parse::<PolicyKind>().unwrap_err();
    assert!(matches!(error, VirtualMemoryError::InvalidConfig { field: "policy", .. }));
    assert!(error.to_string().contains("s3-fifo"), "{error} says what there is");
}

/// First in, first out, written with the public items only.
#[derive(Debug, Default)]
pub(crate) struct Fifo {
    queue: BTreeMap<u32, u64>,
    parked: BTreeMap<u32, u64>,
    next: u32,
}

impl Policy for Fifo {
    fn insert(&mut self, entry: Entry) -> Token {
        self.next += 1;
        self.queue.insert(self.next, entry.id);
        Token::new(self.next)
    }

    fn remove(&mut self, token: Token) {
        self.queue.remove(&token.position());
        self.parked.remove(&token.position());
    }

    fn victim(&mut self, pass: &mut Pass, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        let left = pass.state::<Option<Range<u32>>>();
        let left = left.get_or_insert(0..self.next + 1);
        for _ in 0..STEPS_MAX {
            let Some((&at, &id)) = self.queue.range(left.clone()).next() else {
                return Pick::Empty;
            };
            left.start = at + 1;
            match probe(id) {
                Probe::Evictable { .. } => return Pick::Victim { id, hurried: false },
                Probe::Busy { .. } | Probe::Unfit => {}
                Probe::Pinned | Probe::Gone => self.parked.extend(self.queue.remove_entry(&at)),
            }
        }
        Pick::Retry
    }

    fn settle(&mut self, _steps: usize, _probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        false
    }

    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64)) {
        self.queue.values().take(limit).for_each(|&id| visit(id));
    }

    fn unpark(&mut self, token: Token) {
        self.queue.extend(self.parked.remove_entry(&token.position()));
    }

    fn len(&self) -> usize {
        self.queue.len() + self.parked.len()
    }

    fn memory_bytes(&self) -> usize {
        self.len() * size_of::<(u32, u64)>()
    }
}

/// A user's policy and the built-in ones agree where nothing is used twice.
#[test]
fn all_are_first_in_first_out_where_nothing_is_used_twice() {
    let own: Box<dyn Policy> = Box::<Fifo>::default();
    for mut policy in KINDS.into_iter().map(build).chain([own]) {
        let tokens: Vec<Token> = (0..300).map(|id| policy.insert(Entry::new(id, id, 64))).collect();
        let mut pass = Pass::default();
        for expected in 0..300 {
            let mut cold = Vec::new();
            policy.coldest(2, &mut |id| cold.push(id));
            assert_eq!(cold[0], expected, "{policy:?}");
            let pick =
                policy.victim(&mut pass, &mut |id| Probe::Evictable { stamp: id, touches: 0 });
            assert_eq!(pick, Pick::Victim { id: expected, hurried: false }, "{policy:?}");
            policy.remove(tokens[expected as usize]);
        }
        assert!(policy.is_empty());
    }
}

/// A token that is given back twice is a broken ledger, and is not passed over in silence.
#[test]
fn a_token_is_given_back_once() {
    for kind in KINDS {
        let twice = std::panic::catch_unwind(|| {
            let mut policy = build(kind);
            let _other = policy.insert(Entry::new(1, 1, 64));
            let token = policy.insert(Entry::new(2, 2, 64));
            policy.remove(token);
            policy.remove(token);
        });
        assert!(twice.is_err(), "{kind}");
    }
}
