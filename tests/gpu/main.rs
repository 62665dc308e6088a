//! What needs the CUDA driver, over the emulated one: stores with a VRAM tier as a user opens them.
//!
//! Invariant: a process that has loaded the emulated driver keeps it, and each store that it opens
//! takes the device. So these tests have a binary of their own, in which the driver serves one
//! test at a time; what a simulated device can show is in `tests/it/vram`.
//!
//! Reading order: [`support`] has stores, streams and kernels of a user; [`open`] is what `open`
//! finds; then leases and what is made of them, and at last what once went wrong.
#![cfg(target_os = "linux")]
#![allow(
    missing_docs,
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests call the driver, and may panic"
)]

mod support;

mod adopted;
mod behind;
mod devices;
mod dirty;
mod dlpack;
mod faults;
mod gather;
mod gathered;
mod graphs;
mod kernels;
mod leaked;
mod leases;
mod loss;
mod open;
mod pages;
mod pressure;
mod refuted;
mod resize;
mod scenario_46;
mod scenario_47;
mod scratch;
mod separate;
mod sets;
mod slabs;
mod small;
mod taken;
mod tensors;
mod unused;
