//! One look over all entries, with all its interruptions.
//!
//! Invariant: a pass belongs to its caller, so that passes of different callers, and with different
//! wishes, do not disturb each other. What a policy keeps of it is the policy's own. Made by the
//! evictor of a tier; read and written by the policies.

use std::any::Any;
use std::fmt;

/// A look over all entries of a policy, from its first call to [`Pick::Empty`](super::Pick::Empty).
///
/// Dropping one that was begun costs nothing. A pass is used with one policy: with another one of
/// the same kind it would find what that one passed over.
#[derive(Default)]
pub struct Pass {
    colder_than: Option<u64>,
    state: Option<Box<dyn Any + Send>>,
}

impl Pass {
    /// A pass that wants nothing that was used at `stamp` or later.
    ///
    /// The caller answers [`Probe::Unfit`](super::Probe::Unfit) for such entries; this lets a
    /// policy that knows better end its look before it has asked all of them.
    pub fn colder_than(stamp: u64) -> Self {
        Pass { colder_than: Some(stamp), state: None }
    }

    /// The stamp from which on nothing is wanted, if there is one.
    pub fn limit(&self) -> Option<u64> {
        self.colder_than
    }

    /// What the policy keeps of this pass; the default before the first call.
    pub fn state<T: Any + Default + Send>(&mut self) -> &mut T {
        if !self.state.as_ref().is_some_and(|state| state.is::<T>()) {
            self.state = Some(Box::<T>::default());
        }
        let state = self.state.as_mut().and_then(|state| state.downcast_mut());
        state.expect("invariant: the state is a T by now")
    }
}

impl fmt::Debug for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pass")
            .field("colder_than", &self.colder_than)
            .field("begun", &self.state.is_some())
            .finish()
    }
}
