//! The policies against references that see every access, and at their cost.
//!
//! `world` is the objects as the store would have them, `reference` the same policies written
//! naively from their descriptions. `VMEM_SEED` runs one seed alone.

#![allow(missing_docs, clippy::unwrap_used)]

mod bounds;
mod contract;
mod cost;
mod hit_ratio;
mod passes;
mod protected;
mod reference;
mod victims;
mod world;

const KINDS: [vmem_core::PolicyKind; 3] =
    [vmem_core::PolicyKind::Lru, vmem_core::PolicyKind::Sieve, vmem_core::PolicyKind::S3Fifo];

/// The seeds of a randomised test.
fn seeds(count: u64) -> std::ops::Range<u64> {
    let given: Option<u64> = std::env::var("VMEM_SEED").ok().and_then(|seed| seed.parse().ok());
    given.map_or(0..count, |seed| seed..seed + 1)
}
