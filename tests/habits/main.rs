//! Habits of users that the store survives: futures polled and left alone, tiers full of live
//! objects, sets beside small requests, slices that are kept, reads of ranges, bulk calls, foreign
//! runtimes, long maintenance, names that come and go.
//!
//! Invariant: no test asserts a speed. A bound is a fraction of the wait timeout, a count, or a
//! ratio within one run; a hang fails its own test and no other. Run by `cargo test --test habits`.
//!
//! Reading order: [`harness`] runs a test and bounds it, [`stores`] opens the places, [`keep`]
//! keeps futures at a given poll; then a module for each habit.
#![cfg(target_os = "linux")]
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;
mod keep;
mod stores;

mod calls;
mod kept_calls;
mod kept_copies;
mod kept_device;
mod kept_extents;
mod kept_partial;
mod kept_shapes;
mod kept_world;

mod bulk;
mod full;
mod full_calls;
mod maintenance;
mod names;
mod paused;
mod ranges;
mod runtimes;
mod runtimes_foreign;
mod sets;
mod slices;
