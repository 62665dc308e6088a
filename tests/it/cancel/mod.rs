//! Calls that are dropped: at every poll, at random, and together with the runtime and the store.
//!
//! Invariant: nothing stays taken, and nothing is half done. Run in `it`.

mod drop_order;
mod every_poll;
mod late;
mod random;
