//! Closed names: those that no handle leads to leave memory, the longest closed first.
//!
//! Invariant: a name that may leave stands in the line, and the line is no longer than the catalog
//! asks for plus what was in use when it was looked at. Nothing here waits, so that a handle may be
//! dropped anywhere, also outside of a runtime and after the end of the store. A thread that drops
//! a handle holds no lock of the table of names.
//!
//! Called when the last handle but that of the table is dropped, and when a gate opens or a flush
//! ends after that.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use crate::locks::{self, Lock};

use super::{Commits, Names};
use crate::object::{Leave, Object};

/// How many of the line are looked at for each that comes: more than one, so that it gets shorter.
const LOOKS: usize = 2;

/// The line. It keeps nothing alive.
#[derive(Debug, Default)]
pub(super) struct Closed(Lock<VecDeque<Weak<Object>>, { locks::CLOSED }>);

impl Closed {
    fn push(&self, object: &Arc<Object>) {
        self.0.lock().push_back(Arc::downgrade(object));
    }

    /// The one that came first, if there are more than `max`.
    fn pop_beyond(&self, max: usize) -> Option<Weak<Object>> {
        let mut line = self.0.lock();
        if line.len() > max { line.pop_front() } else { None }
    }

    pub(super) fn clear(&self) {
        let line = std::mem::take(&mut *self.0.lock());
        drop(line);
    }

    pub(super) fn len(&self) -> usize {
        self.0.lock().len()
    }
}

/// Puts an object in line, and lets those leave memory that are too many.
pub(super) fn offer(names: &Names, object: &Arc<Object>) {
    let Some(named) = object.named.get() else { return };
    if names.cleared.load(Ordering::SeqCst) {
        return;
    }
    if named.enter_line() {
        names.closed.push(object);
    }
    for _ in 0..LOOKS {
        let Some(first) = names.closed.pop_beyond(names.closed_max) else { break };
        let Some(first) = first.upgrade() else { continue };
        let Some(named) = first.named.get() else { continue };
        named.leave_line();
        if leave(names, &first) == Leave::InUse && named.enter_line() {
            names.closed.push(&first);
        }
    }
    if names.cleared.load(Ordering::SeqCst) {
        names.closed.clear();
    }
}

/// Takes the object out of the tables if it may leave memory.
fn leave(names: &Names, object: &Arc<Object>) -> Leave {
    let Some(named) = object.named.get() else { return Leave::Stays };
    let Some(name) = named.current() else { return Leave::Stays };
    // What was committed last is not known: memory alone says what the names stand for.
    if names.commits.as_ref().is_none_or(Commits::is_unknown) {
        return Leave::InUse;
    }
    let Some(pass) = object.try_gate_to_leave() else {
        return if object.is_dead() { Leave::Left } else { Leave::InUse };
    };
    let mut outcome = Leave::Stays;
    let entry = names.table.remove_if(&name, |_, handle| {
        let mine = Arc::ptr_eq(handle.object(), object);
        if mine {
            outcome = named.try_leave(object, &pass);
        }
        outcome == Leave::Left
    });
    if let Some((name, handle)) = entry {
        assert!(Arc::ptr_eq(handle.object(), object), "an object takes its own entry along");
        assert!(object.is_dead(), "what has left is not found again");
        names.forget_bytes(&name);
        names.shared.forget(object.id);
        drop(handle);
    }
    outcome
}
