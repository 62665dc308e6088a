//! A store as others use it, over a real disk.
//!
//! Invariant: each test has a store of its own, whose files go with it.
#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod bad_input;
mod bodies;
mod names;
mod removals;
mod suite;
mod uploads;

use std::time::Duration;

use tempfile::TempDir;
use vmem::VirtualMemoryConfig;
use vmem_object_store::{RequestError, Store};
use vmem_testkit::driver_under_test;

/// So long that nothing takes as long, in seconds.
const HANG: Duration = Duration::from_secs(120);

/// A store and the directory of its files.
struct TestStore {
    store: Store,
    _directory: TempDir,
}

impl std::ops::Deref for TestStore {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.store
    }
}

async fn open(host_capacity: u64) -> TestStore {
    let directory = tempfile::tempdir().unwrap();
    let config = VirtualMemoryConfig::builder()
        .disk_path(directory.path())
        .host_capacity(host_capacity)
        .disk_capacity(512 << 20)
        .io_driver(driver_under_test());
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    TestStore { store: Store::new(vmem), _directory: directory }
}

/// Bytes that differ from place to place, and from seed to seed.
fn bytes_of(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// What this crate says to be the reason of an error.
fn reason(error: &object_store::Error) -> Option<&RequestError> {
    std::error::Error::source(error)?.downcast_ref()
}

/// Waits until what was dropped is gone.
async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(HANG, waiting).await.is_ok(), "{what}");
}
