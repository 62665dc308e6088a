//! Owned buffers that travel with an operation.
//!
//! Invariant: an [`IoBuf`] has one owner. It moves into the driver at submission and comes back
//! with the completion, so no dropped future can free it early. Made by the migrations, filled by
//! drivers.

use std::fmt;
use std::ops::{Deref, DerefMut};

use bytes::Bytes;

use crate::copy::OwnedCopy;
use crate::host::StagingPiece;
use crate::parcel::SetAside;
use crate::windows::Window;

/// Exclusive memory for one operation, in bytes.
///
/// ```
/// use vmem::backend::IoBuf;
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
    /// In object space.
    Copy(OwnedCopy),
    /// A piece of the staging reserve.
    Staging(StagingPiece),
    /// Memory of a stream.
    Window(Window),
}

impl IoBuf {
    /// A buffer of the ordinary heap, for tools and tests; the runtime uses its own memory.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        IoBuf { backing: Backing::Heap(bytes) }
    }

    pub(crate) fn from_copy(copy: OwnedCopy) -> Self {
        IoBuf { backing: Backing::Copy(copy) }
    }

    pub(crate) fn from_staging(piece: StagingPiece) -> Self {
        IoBuf { backing: Backing::Staging(piece) }
    }

    pub(crate) fn from_window(window: Window) -> Self {
        IoBuf { backing: Backing::Window(window) }
    }

    /// Back from `from_window`.
    pub(crate) fn into_window(self) -> Window {
        match self.backing {
            Backing::Window(window) => window,
            Backing::Heap(_) | Backing::Copy(_) | Backing::Staging(_) => {
                unreachable!("a backend returns the buffer that it was given")
            }
        }
    }

    /// Back from `from_copy`.
    pub(crate) fn into_copy(self) -> OwnedCopy {
        match self.backing {
            Backing::Copy(copy) => copy,
            Backing::Heap(_) | Backing::Staging(_) | Backing::Window(_) => {
                unreachable!("a backend returns the buffer that it was given")
            }
        }
    }

    /// As `into_copy`, after an error: a backend that has gone brings no buffer back.
    pub(crate) fn into_copy_if_back(self) -> Option<OwnedCopy> {
        match self.backing {
            Backing::Copy(copy) => Some(copy),
            Backing::Heap(_) | Backing::Staging(_) | Backing::Window(_) => None,
        }
    }

    /// The buffer as bytes that no longer change.
    pub(crate) fn freeze(self) -> Bytes {
        Bytes::from_owner(Frozen(self))
    }
}

impl SetAside for IoBuf {
    fn is_shared(&self) -> bool {
        match self.backing {
            Backing::Heap(_) | Backing::Window(_) => false,
            Backing::Copy(_) | Backing::Staging(_) => true,
        }
    }
}

struct Frozen(IoBuf);

impl AsRef<[u8]> for Frozen {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Deref for IoBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.backing {
            Backing::Heap(bytes) => bytes,
            Backing::Copy(copy) => copy.as_slice(),
            Backing::Staging(piece) => piece.as_slice(),
            Backing::Window(window) => window.as_slice(),
        }
    }
}

impl DerefMut for IoBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.backing {
            Backing::Heap(bytes) => bytes,
            Backing::Copy(copy) => copy.as_mut_slice(),
            Backing::Staging(piece) => piece.as_mut_slice(),
            Backing::Window(window) => window.as_mut_slice(),
        }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBuf").field("len", &self.len()).finish()
    }
}
