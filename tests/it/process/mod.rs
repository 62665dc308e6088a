//! What a store costs its process: memory and processor time.
//!
//! Invariant: each test measures a process in which nothing else runs. Run by `it`, each in a child
//! process.

mod budget;
mod idle;
mod streams;
