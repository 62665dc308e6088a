//! Objects of every size, and where they are: what is larger than host memory, what an eviction
//! takes, what is resident already, and how requests for space and pins meet.
//!
//! Invariant: bytes are compared, and figures are those of `stats`. Run in `it`.

mod held;
mod large;
mod plans;
mod prefetches;
mod refuted_space;
mod refuted_writes;
mod sets;
mod sizes;
