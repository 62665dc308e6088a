//! What an object takes in each tier, as a black box.
//!
//! Invariant: nothing here knows how the store works; a footprint is measured on a store of its
//! own. Called by the scenarios.

use super::{DISK, HOST, open};

/// What an object of this length takes in host memory, in bytes: measured on a store of its own.
pub(crate) async fn host_footprint(len: usize) -> u64 {
    let (probe, _driver) = open(64 << 20, 64 << 20, |b| b);
    let handle = probe.allocate(len, HOST).await.expect("space");
    let footprint = probe.stats().host.used_bytes;
    assert!(footprint >= len as u64, "{footprint} for {len}");
    assert!(footprint <= (len + len / 4 + 4096) as u64, "{footprint} for {len}");
    drop(handle);
    footprint
}

/// What an object of this length takes on disk, in bytes: measured on a store of its own.
pub(crate) async fn disk_footprint(len: usize) -> u64 {
    let (probe, _driver) = open(1 << 20, 64 << 20, |b| b);
    let handle = probe.allocate(len, DISK).await.expect("space");
    let footprint = probe.stats().disk.used_bytes;
    assert!(footprint >= len as u64 && footprint < len as u64 + 512, "{footprint} for {len}");
    drop(handle);
    footprint
}
