//! The VRAM tier over simulated devices, and what the emulated driver must do alike.
//!
//! Invariant: this process never loads the emulated driver; tests over it run in a child, or in
//! `tests/gpu`. Run in `it`.

mod devices;
mod dirty;
mod gathered;
mod lease_sets;
mod reads;
mod tiers;
mod waiters;
