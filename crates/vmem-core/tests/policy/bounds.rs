//! Looks and background work end, whatever the objects answer.

use vmem_core::PolicyKind;
use vmem_core::policy::{Entry, Pass, Pick, Policy, Probe, STEPS_MAX, Token, build};

use crate::KINDS;

fn filled(kind: PolicyKind, count: u64) -> (Box<dyn Policy>, Vec<Token>) {
    let mut policy = build(kind);
    let tokens = (0..count).map(|id| policy.insert(Entry::new(id, id, 64))).collect();
    (policy, tokens)
}

/// What is busy goes to the warm end, so that a look does not meet it for ever; also where the
/// busy ones say a time that is long past.
#[test]
fn busy_objects_do_not_hide_the_others() {
    for (kind, now) in KINDS.into_iter().flat_map(|kind| [(kind, 0), (kind, 10_000)]) {
        let (mut policy, _) = filled(kind, 1_000);
        let mut looks = 0;
        let mut pass = Pass::default();
        let found = loop {
            looks += 1;
            let pick = policy.victim(&mut pass, &mut |id| match id {
                900.. => Probe::Evictable { stamp: id, touches: 0 },
                _ => Probe::Busy { stamp: now + looks },
            });
            match pick {
                Pick::Victim { id, .. } => break id,
                Pick::Retry => assert!(looks <= 1_000 / STEPS_MAX as u64 + 1, "{kind}"),
                Pick::Empty => panic!("{kind}: there are evictable ones"),
            }
        };
        assert_eq!(found, 900, "{kind}");
    }
}

/// If all entries are busy a look says so after asking each once, and later finds those that are
/// free again.
#[test]
fn all_busy_is_empty_not_retry() {
    for kind in KINDS {
        for count in [1, 2, 64, 65, 1_000] {
            let (mut policy, _) = filled(kind, count);
            let mut asked = 0;
            let mut busy = |_| {
                asked += 1;
                Probe::Busy { stamp: 5_000 }
            };
            let mut pass = Pass::default();
            while policy.victim(&mut pass, &mut busy) == Pick::Retry {}
            assert_eq!(policy.victim(&mut pass, &mut busy), Pick::Empty, "{kind}: it stays over");
            assert_eq!(asked, count, "{kind}: each once");
            let mut one = |id| match id {
                0 => Probe::Evictable { stamp: 0, touches: 0 },
                _ => Probe::Busy { stamp: 5_000 },
            };
            let mut pass = Pass::default();
            let pick = loop {
                match policy.victim(&mut pass, &mut one) {
                    Pick::Retry => {}
                    other => break other,
                }
            };
            assert_eq!(pick, Pick::Victim { id: 0, hurried: false }, "{kind} of {count}");
        }
    }
}

/// However much is used at every step of every look, there is a victim within a bounded number.
#[test]
fn a_load_that_never_rests_does_not_starve_the_evictor() {
    for kind in KINDS {
        for count in [1, 10, 500, 5_000] {
            let (mut policy, tokens) = filled(kind, count);
            let mut now = count;
            let mut hot = |_| {
                now += 1;
                Probe::Evictable { stamp: now, touches: 3 }
            };
            let mut looks = 0;
            let mut pass = Pass::default();
            let id = loop {
                looks += 1;
                assert!(looks <= 16, "{kind} of {count}: no victim in {looks} looks");
                if let Pick::Victim { id, .. } = policy.victim(&mut pass, &mut hot) {
                    break id;
                }
            };
            policy.remove(tokens[id as usize]);
            assert_eq!(policy.len() as u64, count - 1);
        }
    }
}

/// Background work ends after one lap, though every object is busy, or used, all the time.
#[test]
fn settling_ends_under_any_load() {
    for count in [1, 10, 5_000] {
        for is_busy in [true, false] {
            let (mut policy, _) = filled(PolicyKind::Lru, count);
            let mut now = count;
            let mut steps = 0;
            let mut load = |_| {
                (now, steps) = (now + 1, steps + 1);
                match is_busy {
                    true => Probe::Busy { stamp: now },
                    false => Probe::Evictable { stamp: now, touches: 1 },
                }
            };
            while policy.settle(7, &mut load) {}
            assert_eq!(steps, count, "busy: {is_busy}");
        }
    }
}

/// What is pinned is asked once, then not again before it was unpinned.
#[test]
fn a_pinned_object_is_asked_once() {
    for kind in KINDS {
        let (mut policy, tokens) = filled(kind, 500);
        let mut asked = 0;
        for _ in 0..100 {
            let pick = policy.victim(&mut Pass::default(), &mut |id| match id {
                499 => Probe::Evictable { stamp: 499, touches: 0 },
                _ => {
                    asked += 1;
                    Probe::Pinned
                }
            });
            assert!(matches!(pick, Pick::Retry | Pick::Victim { id: 499, .. }), "{kind}: {pick:?}");
        }
        assert_eq!(asked, 499, "{kind}");
        policy.unpark(tokens[7]);
        policy.unpark(tokens[7]);
        policy.remove(tokens[499]);
        let pick = policy
            .victim(&mut Pass::default(), &mut |id| Probe::Evictable { stamp: id, touches: 0 });
        assert_eq!(pick, Pick::Victim { id: 7, hurried: false }, "{kind}");
        tokens[..499].iter().for_each(|&token| policy.remove(token));
        assert!(policy.is_empty(), "{kind}: parked ones can be removed");
        assert_eq!(policy.victim(&mut Pass::default(), &mut |_| Probe::Gone), Pick::Empty);
    }
}

/// The largest stamps and counts there are overflow nothing.
#[test]
fn extreme_answers_are_harmless() {
    for kind in KINDS {
        let mut policy = build(kind);
        let tokens = [0, 1, 2].map(|id| policy.insert(Entry::new(id, u64::MAX, u64::MAX)));
        let mut turn = 0;
        for _ in 0..100 {
            policy.victim(&mut Pass::default(), &mut |_| {
                turn += 1;
                match turn % 3 {
                    0 => Probe::Busy { stamp: u64::MAX },
                    1 => Probe::Evictable { stamp: u64::MAX, touches: u32::MAX },
                    _ => Probe::Evictable { stamp: 0, touches: u32::MAX },
                }
            });
        }
        tokens.into_iter().for_each(|token| policy.remove(token));
        assert!(policy.is_empty());
    }
}
