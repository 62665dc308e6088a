//! Handles, by which callers refer to objects.
//!
//! Invariant: an unnamed object lives exactly as long as its handles, unless it is freed before.
//! A handle holds its object's entry, so no operation needs a look-up. Made by `allocate`, `put`
//! and `handle`.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::memory_tier::MemoryTier;
use crate::object::{Object, Shared};

/// A handle of one object of one store. Dropping the last clone of an unnamed object frees it; of a
/// named one it does not.
///
/// Two handles are equal if they refer to the same object of the same store.
pub struct VMemHandle {
    object: Arc<Object>,
}

impl VMemHandle {
    /// Takes over a handle count that `object` carries already.
    pub(crate) fn adopt(object: Arc<Object>) -> Self {
        VMemHandle { object }
    }

    pub(crate) fn object(&self) -> &Arc<Object> {
        &self.object
    }

    pub(crate) fn belongs_to(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.object.shared, shared)
    }

    /// The number of the object, unique within its store and never used again. A named object that
    /// is opened again after its last handle was dropped may have another one.
    pub fn id(&self) -> u64 {
        self.object.id
    }

    /// The length of the object, in bytes.
    pub fn len(&self) -> usize {
        self.object.len
    }

    /// Whether the object has no bytes.
    pub fn is_empty(&self) -> bool {
        self.object.len == 0
    }

    /// The tier where the object stays while it is not in use.
    pub fn home_tier(&self) -> MemoryTier {
        self.object.home
    }

    /// The name that the object had when it was loaded into memory, if any. A handle keeps its
    /// version when the name is given to another object, and this does not follow a rename.
    pub fn name(&self) -> Option<&str> {
        self.object.named.get().and_then(|named| named.first())
    }
}

impl Clone for VMemHandle {
    fn clone(&self) -> Self {
        self.object.add_handle();
        VMemHandle { object: self.object.clone() }
    }
}

impl Drop for VMemHandle {
    fn drop(&mut self) {
        self.object.remove_handle();
    }
}

impl PartialEq for VMemHandle {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.object, &other.object)
    }
}

impl Eq for VMemHandle {}

impl Hash for VMemHandle {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.object).hash(state);
    }
}

impl fmt::Debug for VMemHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VMemHandle")
            .field("id", &self.id())
            .field("len", &self.len())
            .field("home_tier", &self.home_tier())
            .finish()
    }
}
