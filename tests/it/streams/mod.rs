//! Objects as streams: readers and writers, for peers that go at their own pace.
//!
//! Invariant: a reader gives one version from start to end, a writer makes an object at its commit
//! or leaves nothing, and neither keeps from others what they need.

mod readers;
mod refuted;
mod writers;

use std::io;
use std::path::Path;

use vmem::{VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};
use vmem_testkit::driver_under_test;

/// A store on a real disk.
async fn open_in(directory: &Path, host: usize, disk: usize) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .disk_path(directory)
        .host_capacity(host as u64)
        .disk_capacity(disk as u64)
        .io_driver(driver_under_test());
    vmem::open(config.build().unwrap()).await.unwrap()
}

/// What a stream says went wrong.
fn cause(error: &io::Error) -> &VirtualMemoryError {
    error.get_ref().and_then(|source| source.downcast_ref()).expect("an error of the store")
}
