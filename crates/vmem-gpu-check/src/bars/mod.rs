//! The figures of the GPU tier, each beside what it is compared with, in one run.
//!
//! Invariant: what is timed is compared byte for byte, and a figure is taken on a card only. Called by `parts`.

mod timing;

use crate::parts::Part;

pub(crate) fn parts() -> Vec<Part> {
    Vec::new()
}
