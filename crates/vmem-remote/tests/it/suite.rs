//! The suite that every tier passes, over two object stores.

use std::sync::Arc;

use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use vmem_remote::{RemoteOptions, RemoteTier};
use vmem_testkit::conformance::disk;

use super::{MIB, seed, small};

fn of_the_suite(options: RemoteOptions) -> RemoteOptions {
    RemoteOptions { capacity: Some(disk::LEAST_CAPACITY), ..options }
}

#[tokio::test(start_paused = true)]
async fn suite_passes_over_memory() {
    disk::all(seed(), async || {
        let store = Arc::new(InMemory::new());
        RemoteTier::open(store, of_the_suite(RemoteOptions::default())).await.unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn suite_passes_with_small_segments_on_threads() {
    disk::all(seed(), async || {
        let store = Arc::new(InMemory::new());
        RemoteTier::open(store, of_the_suite(small())).await.unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn suite_passes_over_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(LocalFileSystem::new_with_prefix(directory.path()).unwrap());
    disk::all(seed(), async || {
        let options = of_the_suite(RemoteOptions { segment_bytes: MIB as u64, ..small() });
        RemoteTier::open(store.clone(), options).await.unwrap()
    })
    .await;
}
