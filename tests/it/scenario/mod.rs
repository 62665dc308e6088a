//! The numbered scenarios: what many users do to a store with little space, a slow or failing disk,
//! and a clock that runs on.
//!
//! Invariant: each test names its scenario and what must not happen. Run in `it`.

mod disk;
mod disk_holes;
mod end;
mod evict;
mod full_disk;
mod hits;
mod life;
mod metrics;
mod migrations;
mod notices;
mod order;
mod pressure;
mod residency;
mod slow_reads;
mod space;
mod spans;
