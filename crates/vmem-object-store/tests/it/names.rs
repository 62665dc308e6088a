//! Names that were given otherwise, and names that move.
//!
//! Invariant: names that no path stands for are left alone; a rename is one step.

use bytes::Bytes;
use futures::{TryStreamExt, future};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::Path;
use object_store::{Attribute, Attributes, ObjectStore, ObjectStoreExt};
use vmem::{MemoryTier, PutOptions};

use crate::{bytes_of, open};

const HOST: u64 = 8 << 20;

async fn paths(store: &dyn ObjectStore) -> Vec<String> {
    let listed = store.list(None).map_ok(|meta| meta.location.to_string());
    listed.try_collect().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_are_no_paths_are_passed_over() {
    let store = open(HOST).await;
    for name in ["/a", "a", "a/", "a//b", "a/../b", "b/c", "b/\u{7}"] {
        store.vmem().put_named(name, name, MemoryTier::Disk).await.unwrap();
    }
    assert_eq!(paths(&store.store).await, ["a", "b/c"]);
    let top = store.list_with_delimiter(None).await.unwrap();
    assert_eq!(top.common_prefixes, [Path::from("a"), Path::from("b")]);
    assert_eq!(top.objects.len(), 1);
    let below = store.list_with_delimiter(Some(&Path::from("a"))).await.unwrap();
    assert!(below.objects.is_empty() && below.common_prefixes.is_empty(), "{below:?}");

    // Pages count what is passed over, and still come to the end.
    let mut options = PaginatedListOptions { max_keys: Some(1), ..Default::default() };
    let mut seen = Vec::new();
    let mut pages = 0;
    loop {
        let page = store.list_paginated(None, options.clone()).await.unwrap();
        seen.extend(page.result.objects.into_iter().map(|meta| meta.location.to_string()));
        pages += 1;
        options.page_token = page.page_token;
        if options.page_token.is_none() {
            break;
        }
    }
    assert_eq!((seen, pages), (vec!["a".to_owned(), "b/c".to_owned()], 7));
    let none = PaginatedListOptions { max_keys: Some(0), ..Default::default() };
    let page = store.list_paginated(None, none).await.unwrap();
    assert!(page.result.objects.is_empty() && page.page_token.is_none(), "{page:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_metadata_survive_a_copy_and_read_as_no_attributes() {
    let store = open(HOST).await;
    let options = PutOptions::new(MemoryTier::Host).metadata(&b"\xff draft"[..]);
    store.vmem().put_named_with("from", b"bytes", options).await.unwrap();
    let got = store.get(&Path::from("from")).await.unwrap();
    assert_eq!(got.attributes, Attributes::new());
    store.copy(&Path::from("from"), &Path::from("to")).await.unwrap();
    let copy = store.vmem().entry("to").await.unwrap();
    assert_eq!((&copy.metadata[..], copy.home), (&b"\xff draft"[..], MemoryTier::Host));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attributes_move_and_are_copied_with_their_object() {
    let store = open(HOST).await;
    let from = Path::from("from");
    let copy = Path::from("copy");
    let moved = Path::from("moved");
    let attributes = Attributes::from_iter([(Attribute::ContentType, "image/png")]);
    let bytes = bytes_of(1, 3 << 20);
    store.put_opts(&from, bytes.clone().into(), attributes.clone().into()).await.unwrap();
    store.copy(&from, &copy).await.unwrap();
    store.rename(&from, &moved).await.unwrap();
    for path in [copy, moved] {
        let got = store.get(&path).await.unwrap();
        assert_eq!(got.attributes, attributes);
        assert!(got.bytes().await.unwrap() == bytes);
    }
    store.head(&from).await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rename_that_must_not_replace_does_not() {
    let store = open(HOST).await;
    let from = Path::from("from");
    let to = Path::from("to");
    store.put(&from, "one".into()).await.unwrap();
    store.put(&to, "two".into()).await.unwrap();
    for target in [&to, &from] {
        let error = store.rename_if_not_exists(&from, target).await.unwrap_err();
        let object_store::Error::AlreadyExists { path, .. } = error else { panic!("{error}") };
        assert_eq!(path, target.as_ref());
    }
    let absent = store.rename_if_not_exists(&Path::from("absent"), &to).await.unwrap_err();
    assert!(matches!(absent, object_store::Error::NotFound { .. }), "{absent}");
    store.rename(&from, &from).await.unwrap();
    assert_eq!(store.get(&from).await.unwrap().bytes().await.unwrap(), "one");
    assert_eq!(store.get(&to).await.unwrap().bytes().await.unwrap(), "two");

    store.delete(&to).await.unwrap();
    store.rename_if_not_exists(&from, &to).await.unwrap();
    assert_eq!(paths(&store.store).await, ["to"]);
}

/// A rename that was a copy and a deletion would let two of them succeed, or lose a put to its
/// source in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_several_renames_to_a_free_name_succeeds() {
    const RIVALS: usize = 6;
    let store = open(HOST).await;
    for round in 0..30 {
        let target = Path::from(format!("target/{round}"));
        let sources = (0..RIVALS).map(|n| Path::from(format!("source/{n}")));
        let sources: Vec<_> = sources.collect();
        for source in &sources {
            store.put(source, Bytes::from(source.to_string()).into()).await.unwrap();
        }
        let renames = sources.iter().map(|source| store.rename_if_not_exists(source, &target));
        let outcomes = future::join_all(renames).await;
        let winners: Vec<_> = (0..RIVALS).filter(|n| outcomes[*n].is_ok()).collect();
        assert_eq!(winners.len(), 1, "{outcomes:?}");
        let got = store.get(&target).await.unwrap().bytes().await.unwrap();
        assert_eq!(got, sources[winners[0]].to_string());
        for (n, source) in sources.iter().enumerate() {
            assert_eq!(store.head(source).await.is_ok(), n != winners[0], "{source}");
        }
    }
}
