//! The suite that every catalog passes, over two object stores.

use std::sync::Arc;

use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use tempfile::TempDir;
use vmem_remote::RemoteOptions;
use vmem_testkit::conformance::catalog;

use super::super::seed;
use super::{Table, open_over, options};

fn directory() -> (TempDir, Arc<dyn ObjectStore>) {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(LocalFileSystem::new_with_prefix(directory.path()).unwrap());
    (directory, store)
}

#[tokio::test(start_paused = true)]
async fn suite_passes_over_memory() {
    catalog::all(seed(), async || {
        open_over(Arc::new(InMemory::new()), options(), &Arc::default()).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn suite_passes_over_a_directory() {
    let (_directory, store) = directory();
    let table: Arc<Table> = Arc::default();
    let mut nth = 0;
    let mut next = || {
        nth += 1;
        RemoteOptions { prefix: format!("vmem/{nth}"), ..options() }
    };
    let nexts: Vec<_> = (0..6).map(|_| next()).collect();
    let nexts = parking_lot::Mutex::new(nexts);
    catalog::all(seed(), async || {
        let options = nexts.lock().pop().unwrap();
        open_over(store.clone(), options, &table).await
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn names_survive_a_restart_over_memory() {
    let store = Arc::new(InMemory::new());
    let table: Arc<Table> = Arc::default();
    let first = open_over(store.clone(), options(), &table).await;
    catalog::survives_a_restart(first, async || open_over(store, options(), &table).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_survive_a_restart_over_a_directory() {
    let (_directory, store) = directory();
    let table: Arc<Table> = Arc::default();
    let first = open_over(store.clone(), options(), &table).await;
    catalog::survives_a_restart(first, async || open_over(store, options(), &table).await).await;
}
