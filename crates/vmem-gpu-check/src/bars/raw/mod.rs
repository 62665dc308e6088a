//! What a user writes by hand on the driver: copies, kernels, and their ends.
//!
//! Invariant: whatever a copy or a kernel touches is owned here, or borrowed until it has ended:
//! the owner of memory waits before it lends it for reading, and before it frees it. Called by the
//! bars.

mod ends;
mod kernels;
mod link;
mod tables;

pub(super) use ends::{Signal, Small, sleeping_event, target, timed_event};
pub(super) use kernels::{Reader, Sink, Source, add};
pub(super) use link::Link;

/// Some bytes of the pinned memory of a link and as many of its device memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) host: usize,
    pub(super) device: usize,
    pub(super) len: usize,
}

impl Piece {
    /// `count` pieces of `len` bytes, one behind the other.
    pub(super) fn row(count: usize, len: usize) -> Vec<Piece> {
        (0..count).map(|at| Piece { host: at * len, device: at * len, len }).collect()
    }
}
