//! What few objects have at any moment, behind one pointer, so that the others pay eight bytes.
//!
//! Invariant: the box exists only while one of its fields has something. Changed under the lock of
//! the object's `Inner`, which owns it; nothing else uses it.

use std::sync::Arc;

use smallvec::SmallVec;
use tokio::sync::Notify;

use super::dirty_on_device::DirtyOnDevice;
use super::gate::Line;
use super::on_devices::OnDevice;
use super::on_storage::OnStorages;
use super::successors::Pending;
use crate::copy::OwnedCopy;
use crate::error::VirtualMemoryError;

/// See the module's documentation. Reading an absent one finds every field empty.
#[derive(Default)]
pub(super) struct Rare(Option<Box<Fields>>);

/// The fields, each of which is empty in most objects.
pub(super) struct Fields {
    /// The waiters for the gate.
    pub(super) line: Option<Line>,
    /// Host memory that was taken for an object that was never written.
    pub(super) spare: Option<OwnedCopy>,
    /// What the object has on devices.
    pub(super) devices: SmallVec<[OnDevice; 1]>,
    /// A kernel on this device has written a new version that is not published yet: readers wait
    /// for it.
    pub(super) pending: Option<Pending>,
    /// Only devices have the current version.
    pub(super) dirty: Option<Box<DirtyOnDevice>>,
    /// Wakes the timer that will look whether that is so, if there is one.
    pub(super) timer: Option<Arc<Notify>>,
    /// What it has to do with the evictors of the tiers below host memory.
    pub(super) storage: OnStorages,
    /// The damage that was found, until the next write of the whole object.
    pub(super) corrupt: Option<Box<VirtualMemoryError>>,
}

impl Fields {
    const NONE: Fields = Fields {
        line: None,
        spare: None,
        devices: SmallVec::new_const(),
        pending: None,
        dirty: None,
        timer: None,
        storage: OnStorages::new_const(),
        corrupt: None,
    };

    fn is_empty(&self) -> bool {
        let Fields { line, spare, devices, pending, dirty, timer, storage, corrupt } = self;
        line.is_none()
            && spare.is_none()
            && devices.is_empty()
            && pending.is_none()
            && dirty.is_none()
            && timer.is_none()
            && storage.is_empty()
            && corrupt.is_none()
    }
}

impl std::ops::Deref for Rare {
    type Target = Fields;

    fn deref(&self) -> &Fields {
        static NONE: Fields = Fields::NONE;
        self.0.as_deref().unwrap_or(&NONE)
    }
}

impl Rare {
    /// The fields, for a change that empties none of them.
    pub(super) fn get_mut(&mut self) -> Option<&mut Fields> {
        self.0.as_deref_mut()
    }

    /// Changes the fields, and allocates or frees the box where that asks for it.
    pub(super) fn change<T>(&mut self, change: impl FnOnce(&mut Fields) -> T) -> T {
        let Some(fields) = &mut self.0 else {
            let mut fields = Fields::NONE;
            let outcome = change(&mut fields);
            if !fields.is_empty() {
                self.0 = Some(Box::new(fields));
            }
            return outcome;
        };
        let outcome = change(fields);
        if fields.is_empty() {
            self.0 = None;
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn box_exists_only_while_a_field_has_something() {
        let mut rare = Rare::default();
        rare.change(|fields| assert!(fields.spare.take().is_none()));
        assert!(rare.0.is_none() && rare.get_mut().is_none(), "nothing was put there");
        rare.change(|fields| fields.pending = Some(Pending { device: 3, successors: None }));
        assert_eq!(rare.pending.as_ref().map(|pending| pending.device), Some(3));
        assert!(rare.get_mut().is_some());
        assert!(rare.change(|fields| fields.pending.take()).is_some());
        assert!(rare.0.is_none(), "the last field was emptied");
    }
}
