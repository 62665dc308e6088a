//! Turns: one change of a name at a time, first come first served.
//!
//! Invariant: there is an entry for a name exactly while a change has its turn or waits for it.
//! Called by `vmem/named.rs`.

use std::sync::Arc;

use dashmap::DashMap;
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::Names;
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;

/// The names that are being changed.
#[derive(Debug, Default)]
pub(super) struct Turns(DashMap<Arc<str>, Arc<Mutex<()>>>);

/// The right to change what a name stands for.
pub(crate) struct Turn {
    names: Arc<Names>,
    name: Arc<str>,
    /// Empty while it waits.
    guard: Option<OwnedMutexGuard<()>>,
    /// When the change is given up if it still waits.
    deadline: Deadline,
}

impl Turn {
    /// Waits for the turn of one name.
    ///
    /// # Errors
    ///
    /// `TimedOut` at the deadline, which also counts for what the change waits for later.
    pub(crate) async fn of(
        names: &Arc<Names>,
        name: Arc<str>,
        deadline: &Deadline,
    ) -> Result<Turn, VirtualMemoryError> {
        // A waiter that is cancelled drops this, which removes the entry if it is not needed.
        let mut turn =
            Turn { names: names.clone(), name: name.clone(), guard: None, deadline: *deadline };
        let mutex = names.turns.0.entry(name).or_default().clone();
        match deadline.bound(mutex.lock_owned()).await {
            Ok(guard) => turn.guard = Some(guard),
            Err(Late) => return Err(deadline.error("another change of the name")),
        }
        Ok(turn)
    }

    /// Waits for the turns of two names that differ, in an order that all keep.
    ///
    /// # Errors
    ///
    /// As `of`.
    pub(crate) async fn of_both(
        names: &Arc<Names>,
        one: Arc<str>,
        other: Arc<str>,
        deadline: &Deadline,
    ) -> Result<(Turn, Turn), VirtualMemoryError> {
        assert!(one != other, "a change waits for its own turn");
        if one < other {
            let first = Turn::of(names, one, deadline).await?;
            Ok((first, Turn::of(names, other, deadline).await?))
        } else {
            let first = Turn::of(names, other, deadline).await?;
            Ok((Turn::of(names, one, deadline).await?, first))
        }
    }

    pub(crate) fn deadline(&self) -> &Deadline {
        &self.deadline
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let turns = &self.names.turns.0;
        let has_entry = self.guard.is_none() || turns.contains_key(&self.name);
        assert!(has_entry, "a name whose turn is taken has an entry");
        self.guard = None;
        // Under the lock of the entry no other task can get a share of it.
        turns.remove_if(&self.name, |_, mutex| Arc::strong_count(mutex) == 1);
    }
}
