//! The suite that `object_store` has for implementations of its traits.
//!
//! Invariant: every function of it runs, those with a choice in the stricter way.

use object_store::integration as suite;
use object_store::path::Path;

use crate::open;

const HOST: u64 = 32 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn put_get_delete_list() {
    suite::put_get_delete_list(&open(HOST).await.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn put_get_attributes() {
    suite::put_get_attributes(&open(HOST).await.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn get_opts_agree_with_the_suite() {
    suite::get_opts(&open(HOST).await.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn put_opts_with_updates() {
    suite::put_opts(&open(HOST).await.store, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_get_agrees_with_the_suite() {
    suite::stream_get(&open(HOST).await.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn list_uses_directories_correctly() {
    suite::list_uses_directories_correctly(&open(HOST).await.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn list_with_delimiter() {
    suite::list_with_delimiter(&open(HOST).await.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn list_with_offset_exclusivity() {
    suite::list_with_offset_exclusivity(&open(HOST).await.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn list_paginated_agrees_with_the_suite() {
    let store = open(HOST).await;
    suite::list_paginated(&store.store, &store.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn get_nonexistent_object() {
    let store = open(HOST).await;
    for location in [None, Some(Path::from("not/there"))] {
        let error = suite::get_nonexistent_object(&store.store, location).await.unwrap_err();
        assert!(matches!(error, object_store::Error::NotFound { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rename_and_copy() {
    let store = open(HOST).await;
    suite::rename_and_copy(&store.store).await;
    suite::copy_if_not_exists(&store.store).await;
    suite::copy_rename_nonexistent_object(&store.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn multipart_agrees_with_the_suite() {
    let store = open(HOST).await;
    suite::multipart(&store.store, &store.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn multipart_race_condition() {
    suite::multipart_race_condition(&open(HOST).await.store, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn multipart_out_of_order() {
    suite::multipart_out_of_order(&open(HOST).await.store).await;
}

/// The same below a prefix, beside names that are not below it and must not be seen or touched.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn below_a_prefix_beside_foreign_names() {
    let whole = open(HOST).await;
    let foreign = ["a", "in", "in.side", "inside", "in/sidea", "in/sid", "z"];
    for name in foreign {
        whole.vmem().put_named(name, name, vmem::MemoryTier::Disk).await.unwrap();
    }
    let store = whole.store.clone().with_prefix("in/side");
    suite::put_get_delete_list(&store).await;
    suite::list_uses_directories_correctly(&store).await;
    suite::list_with_delimiter(&store).await;
    suite::list_with_offset_exclusivity(&store).await;
    suite::list_paginated(&store, &store).await;
    suite::rename_and_copy(&store).await;
    suite::copy_if_not_exists(&store).await;
    suite::multipart(&store, &store).await;
    for name in foreign {
        let handle = whole.vmem().open_named(name).await.unwrap();
        assert_eq!(whole.vmem().read(&handle).await.unwrap(), name);
    }
}
