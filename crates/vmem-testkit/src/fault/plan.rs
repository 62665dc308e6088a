//! Which operations go wrong, and how.
//!
//! Invariant: a rule that could never apply is refused when the plan is made, since a test whose
//! fault is never injected proves nothing. Called by tests, through the fault driver.

use rand::Rng;
use rand::rngs::SmallRng;
use rustix::io::Errno;

use crate::decorate::OpKind;

/// What goes wrong with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Any kind: nothing is done, and this error is reported.
    Error(Errno),
    /// Any kind: the operation is done, and this error is reported.
    ErrorAfter(Errno),
    /// Read: the buffer is filled with garbage, and this error is reported.
    Garbage(Errno),
    /// Read: one bit of what was read is inverted, and success reported.
    BitFlip,
    /// Read: the last part of the buffer is left as it was, and success reported.
    ShortRead,
    /// Read: the bytes come from another offset, and success is reported.
    MisdirectedRead,
    /// Write: nothing is done and success reported; later reads get the old contents.
    LostWrite,
    /// Write: the bytes go to another offset, and success is reported.
    MisdirectedWrite,
    /// Write: a prefix is written, and this error is reported.
    TornWrite(Errno),
}

impl Fault {
    /// Whether an operation of this kind can go wrong in this way.
    pub fn applies_to(self, kind: OpKind) -> bool {
        match self {
            Fault::Error(_) | Fault::ErrorAfter(_) => true,
            Fault::Garbage(_) | Fault::BitFlip | Fault::ShortRead | Fault::MisdirectedRead => {
                kind == OpKind::Read
            }
            Fault::LostWrite | Fault::MisdirectedWrite | Fault::TornWrite(_) => {
                kind == OpKind::Write
            }
        }
    }
}

/// Which operations of a kind a rule applies to, counted from 1 since the plan was set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum When {
    /// Only the n-th.
    Nth(u64),
    /// The n-th and all that follow.
    From(u64),
    /// Each with this probability, between 0 and 1.
    Chance(f64),
}

impl When {
    /// Every operation.
    pub const ALWAYS: When = When::From(1);
}

/// Rules for what goes wrong. Of those that apply to an operation the first is used.
///
/// ```
/// use vmem_testkit::{Errno, Fault, FaultPlan, OpKind, When};
///
/// let plan = FaultPlan::new()
///     .on(OpKind::Write, When::Nth(3), Fault::Error(Errno::NOSPC))
///     .on(OpKind::Read, When::Chance(0.01), Fault::BitFlip);
/// ```
#[derive(Clone, Debug, Default)]
pub struct FaultPlan {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    kind: OpKind,
    when: When,
    fault: Fault,
    seen: u64,
}

impl FaultPlan {
    /// A plan without rules: nothing goes wrong.
    pub fn new() -> Self {
        FaultPlan::default()
    }

    /// Adds a rule.
    ///
    /// # Panics
    ///
    /// When the rule could never apply: the fault does not occur in this kind of operation, the
    /// operation is number 0, or the probability is not above 0 and at most 1.
    #[must_use]
    pub fn on(mut self, kind: OpKind, when: When, fault: Fault) -> Self {
        assert!(fault.applies_to(kind), "{fault:?} cannot happen to a {kind:?}");
        match when {
            When::Nth(n) | When::From(n) => assert!(n > 0, "operations are counted from 1"),
            When::Chance(p) => assert!(p > 0.0 && p <= 1.0, "{p} is not a probability above 0"),
        }
        self.rules.push(Rule { kind, when, fault, seen: 0 });
        self
    }

    /// The fault for the next operation, which is of this kind.
    pub(super) fn next(&mut self, kind: OpKind, rng: &mut SmallRng) -> Option<Fault> {
        let mut chosen = None;
        for rule in self.rules.iter_mut().filter(|rule| rule.kind == kind) {
            rule.seen += 1;
            let meets = match rule.when {
                When::Nth(n) => rule.seen == n,
                When::From(n) => rule.seen >= n,
                When::Chance(p) => rng.random_bool(p),
            };
            if meets {
                chosen = chosen.or(Some(rule.fault));
            }
        }
        chosen
    }
}
