//! What a store takes of its process: memory and processor time.
//!
//! Invariant: each test measures a process in which nothing else runs. Run in `it`, by children.

mod budget;
mod idle;
mod streams;
