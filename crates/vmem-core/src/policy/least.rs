//! The candidate of one call that may have to do.
//!
//! Invariant: it lives as long as one call, within which nothing is removed. Pure; called by the
//! policies.

/// The least by `R`, the first among equals.
#[derive(Debug)]
pub(super) struct Least<R>(Option<(R, u64)>);

impl<R: Ord + Copy> Least<R> {
    pub(super) fn new() -> Self {
        Least(None)
    }

    pub(super) fn offer(&mut self, rank: R, id: u64) {
        if self.0.is_none_or(|(least, _)| rank < least) {
            self.0 = Some((rank, id));
        }
    }

    pub(super) fn id(&self) -> Option<u64> {
        self.0.map(|(_, id)| id)
    }
}
