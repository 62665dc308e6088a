//! Owned buffers that travel with an operation.
//!
//! Invariant: whoever holds an [`IoBuf`] is its only owner. It moves into the driver at submission
//! and comes back with the completion, so no dropped future can free it early. Made by the
//! migrations, filled by drivers.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Exclusive memory for one operation, in bytes.
///
/// ```
/// use vmem_core::backend::IoBuf;
///
/// let mut buf = IoBuf::from_vec(vec![0; 4]);
/// buf[1] = 9;
/// assert_eq!(&buf[..], [0, 9, 0, 0]);
/// ```
pub struct IoBuf {
    backing: Backing,
}

enum Backing {
    Heap(Vec<u8>),
}

impl IoBuf {
    /// A buffer of the ordinary heap, for tools and tests; the runtime uses its own memory.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        IoBuf {
            backing: Backing::Heap(bytes),
        }
    }
}

impl Deref for IoBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.backing {
            Backing::Heap(bytes) => bytes,
        }
    }
}

impl DerefMut for IoBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.backing {
            Backing::Heap(bytes) => bytes,
        }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBuf").field("len", &self.len()).finish()
    }
}
