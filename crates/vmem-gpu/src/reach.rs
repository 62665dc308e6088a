//! What of a copy's host memory the device reaches directly.
//!
//! Invariant: while a copy uses a slab, that stays as it is, registered or not. Called by the lanes
//! and by gathers.

use std::ops::Range;

use vmem_core::backend::{InUse, Part};

use crate::card::Card;

impl Card {
    /// Begins copies of those that the device reaches directly, by one look. `part` gets each part
    /// of them, with the number of its copy.
    pub(crate) fn enter_reached<'a>(
        &self,
        memory: impl Iterator<Item = &'a [u8]>,
        part: impl FnMut(usize, Range<usize>),
    ) -> Option<InUse> {
        let places: Vec<_> = memory.map(|one| (one.as_ptr().addr(), one.len())).collect();
        let siblings = self.siblings().get()?;
        Some(siblings.space().enter_registered(&places, part))
    }

    /// Memory of the host by what the device reaches directly. On a thread that is bound.
    pub(crate) fn parts(&self, memory: &[u8]) -> Vec<Part> {
        let whole = |direct| vec![Part { range: 0..memory.len(), direct, in_use: None }];
        let Some(siblings) = self.siblings().get() else { return whole(false) };
        if siblings.is_staging(memory) {
            return whole(true);
        }
        if vmem_core::planted!("copy-across-slabs") {
            return whole(false);
        }
        siblings.space().enter(memory.as_ptr().addr(), memory.len())
    }
}
