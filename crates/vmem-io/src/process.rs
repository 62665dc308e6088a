//! The process in which something was made.
//!
//! Invariant: a forked child has a copy of the memory, and shares the files, the rings and the
//! reactor with its parent, whose they are: what is dropped there gives nothing back. It leaks,
//! which in a child is free. Asked by whatever gives something back when it is dropped.

/// Where something was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin(u32);

impl Origin {
    /// This process.
    pub(crate) fn here() -> Self {
        Origin(std::process::id())
    }

    /// Whether this is a forked child of the process in which it was made.
    pub(crate) fn is_inherited(self) -> bool {
        self != Self::here()
    }
}
