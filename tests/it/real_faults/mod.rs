//! Real faults through real kernels: what a driver gets to see from the system calls, or the ring,
//! and not from a decorator.
//!
//! Invariant: every test shows that its fault was met, by a counter of the injector; and what it
//! mounts lies in a mount namespace of its own, so that nothing is left even after SIGKILL. Each
//! test runs once for every disk driver that the machine has; what cannot run says `SKIPPED`.
//! `VMEM_SEED` replays one seed.

mod errors;
mod ext4;
mod fuse;
mod machine;
mod place;
mod power_cut;
mod slow;
mod transfers;
