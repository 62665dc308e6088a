//! What this instance knows of each name.
//!
//! Invariant: the newest generation that is known of a name never goes back, and what the caller
//! was last shown changes only by what the caller is shown: a commit is refused while the two
//! differ, unless what differs is of this instance's own making. No request is made here.
//! Called by look-ups and commits.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::Instant;
use vmem_core::{VirtualMemoryError, planted};

use super::body::Token;

/// A generation, and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Generation {
    /// 0 if there is none.
    pub(super) number: u64,
    /// The attempt that made it.
    pub(super) token: Token,
    /// Number and version of the object; none for a tombstone.
    pub(super) object: Option<(u64, u64)>,
}

/// What is known of a name.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) newest: Generation,
    /// What the caller was last shown: segments that a commit does not give are those of this.
    pub(super) base: Generation,
    /// The generation up to which the caller knows what happened.
    caught_up: u64,
    /// The newest generation was the newest at this time, or later.
    pub(super) confirmed: Instant,
    /// Attempts that were not refused: what they made may appear until there is a newer one.
    tried: Vec<(u64, Token)>,
    /// Since when the outcome of one of them is unknown.
    unknown_since: Option<Instant>,
}

/// All names that were looked up or committed.
#[derive(Debug, Default)]
pub(super) struct Generations {
    names: HashMap<Arc<str>, Known>,
    /// How many have an attempt whose outcome is unknown.
    unknown: usize,
}

impl Generation {
    /// Before any.
    pub(super) const NONE: Generation = Generation { number: 0, token: [0; 16], object: None };
}

impl Known {
    fn new(newest: Generation, confirmed: Instant) -> Self {
        Known {
            newest,
            base: newest,
            caught_up: newest.number,
            confirmed,
            tried: Vec::new(),
            unknown_since: None,
        }
    }

    /// Takes in what was the newest generation at this time.
    fn advance(&mut self, newest: Generation, confirmed: Instant) {
        if newest.number < self.newest.number {
            return;
        }
        self.newest = newest;
        self.confirmed = self.confirmed.max(confirmed);
        self.tried.retain(|&(number, _)| number >= newest.number);
    }

    fn is_own(&self, generation: Generation) -> bool {
        self.tried.contains(&(generation.number, generation.token))
    }

    pub(super) fn is_unknown(&self) -> bool {
        self.unknown_since.is_some()
    }

    /// Whether somebody else has won since the caller was shown `base` of the name, as the error of
    /// a commit that did not know it.
    ///
    /// # Errors
    ///
    /// `NameExists` if the caller knew of no object, `NameNotFound` if there is none any more,
    /// `VersionChanged` otherwise.
    pub(super) fn check(
        &self,
        name: &Arc<str>,
        base: Generation,
    ) -> Result<(), VirtualMemoryError> {
        let name = || name.clone();
        let is_caught_up = self.base == base && self.newest.number == self.caught_up;
        match (base.object, self.newest.object) {
            _ if is_caught_up => Ok(()),
            (None, None) => Ok(()),
            (None, Some(_)) => Err(VirtualMemoryError::NameExists { name: name() }),
            (Some(_), None) => Err(VirtualMemoryError::NameNotFound { name: name() }),
            (Some((_, expected)), Some((_, current))) => {
                Err(VirtualMemoryError::VersionChanged { name: name(), expected, current })
            }
        }
    }
}

impl Generations {
    pub(super) fn get(&self, name: &str) -> Option<&Known> {
        self.names.get(name)
    }

    /// The newest generation that is known of a name; 0 if there is none.
    pub(super) fn newest(&self, name: &str) -> u64 {
        self.names.get(name).map_or(0, |known| known.newest.number)
    }

    /// Whether the outcome of any attempt is unknown.
    pub(super) fn has_unknown(&self) -> bool {
        self.unknown > 0
    }

    /// A look-up that began at `confirmed` has found this, and a caller is shown it.
    pub(super) fn show(&mut self, name: &Arc<str>, newest: Generation, confirmed: Instant) {
        let known = self.advance(name, newest, confirmed);
        if known.newest == newest {
            known.base = newest;
            known.caught_up = newest.number;
        }
    }

    /// A look-up that began at `confirmed` has found this; no caller is shown it. What an attempt
    /// of this instance has made the caller knows nevertheless.
    pub(super) fn confirm(&mut self, name: &Arc<str>, newest: Generation, confirmed: Instant) {
        let known = self.advance(name, newest, confirmed);
        if known.is_own(known.newest) || planted!("bucket-unseen") {
            known.caught_up = known.newest.number;
        }
    }

    fn advance(&mut self, name: &Arc<str>, newest: Generation, confirmed: Instant) -> &mut Known {
        let known = self.names.entry(name.clone()).or_insert_with(|| Known::new(newest, confirmed));
        known.advance(newest, confirmed);
        // What was found out before says nothing of it.
        if known.unknown_since.is_some_and(|since| confirmed >= since) {
            known.unknown_since = None;
            self.unknown -= 1;
        }
        known
    }

    /// An attempt begins.
    pub(super) fn begin(&mut self, name: &str, number: u64, token: Token) {
        if let Some(known) = self.names.get_mut(name) {
            known.tried.push((number, token));
        }
    }

    /// An attempt has certainly made nothing, and never will.
    pub(super) fn refuse(&mut self, name: &str, token: Token) {
        if let Some(known) = self.names.get_mut(name) {
            known.tried.retain(|&(_, tried)| tried != token);
        }
    }

    /// The outcome of an attempt, or what became of its commit, is unknown from now on.
    pub(super) fn lose_sight(&mut self, name: &str) {
        let Some(known) = self.names.get_mut(name) else { return };
        self.unknown += usize::from(known.unknown_since.is_none());
        known.unknown_since = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation(number: u64, version: Option<u64>) -> Generation {
        Generation { number, token: [number as u8; 16], object: version.map(|it| (1, it)) }
    }

    fn check(generations: &Generations) -> Result<(), VirtualMemoryError> {
        let known = generations.get("n").unwrap();
        known.check(&"n".into(), known.base)
    }

    #[test]
    fn generations_of_others_are_refused_until_shown() {
        let now = Instant::now();
        let name: Arc<str> = "n".into();
        let mut generations = Generations::default();
        generations.show(&name, Generation::NONE, now);
        generations.confirm(&name, generation(1, Some(10)), now);
        assert!(matches!(check(&generations), Err(VirtualMemoryError::NameExists { .. })));
        generations.show(&name, generation(1, Some(10)), now);
        assert!(check(&generations).is_ok());
        generations.confirm(&name, generation(3, Some(30)), now);
        let changed = check(&generations);
        assert!(
            matches!(
                changed,
                Err(VirtualMemoryError::VersionChanged { expected: 10, current: 30, .. })
            ),
            "{changed:?}"
        );
        generations.confirm(&name, generation(4, None), now);
        assert!(matches!(check(&generations), Err(VirtualMemoryError::NameNotFound { .. })));
        // Late news: nothing goes back.
        generations.show(&name, generation(2, Some(20)), now);
        assert_eq!(generations.newest("n"), 4);
        assert!(check(&generations).is_err());
        // A commit that began before the caller was shown more.
        generations.show(&name, generation(5, Some(50)), now);
        assert!(check(&generations).is_ok());
        let known = generations.get("n").unwrap();
        assert!(known.check(&name, generation(3, Some(30))).is_err());
    }

    #[test]
    fn name_that_was_made_and_removed_by_others_is_free() {
        let now = Instant::now();
        let name: Arc<str> = "n".into();
        let mut generations = Generations::default();
        generations.show(&name, Generation::NONE, now);
        generations.confirm(&name, generation(2, None), now);
        assert!(check(&generations).is_ok());
    }

    #[test]
    fn own_attempt_that_appears_late_is_no_other_writer() {
        let now = Instant::now();
        let name: Arc<str> = "n".into();
        let mut generations = Generations::default();
        generations.show(&name, generation(1, Some(10)), now);
        generations.begin("n", 2, [2; 16]);
        generations.lose_sight("n");
        assert!(generations.has_unknown());
        generations.confirm(&name, generation(1, Some(10)), Instant::now());
        assert!(!generations.has_unknown(), "it was not made so far");
        generations.confirm(&name, generation(2, Some(20)), Instant::now());
        assert!(check(&generations).is_ok());
        let known = generations.get("n").unwrap();
        assert_eq!(known.base, generation(1, Some(10)), "the caller was not shown it");
        generations.confirm(&name, generation(3, Some(30)), Instant::now());
        assert!(check(&generations).is_err());
    }
}
