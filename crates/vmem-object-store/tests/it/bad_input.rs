//! What cannot be, and what must not be.
//!
//! Invariant: each is an error that says what is wrong, and no existing object is lost.

use object_store::path::Path;
use object_store::{
    Attribute, Attributes, GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    UpdateVersion,
};
use vmem::{VirtualMemoryConfig, VirtualMemoryError};
use vmem_object_store::{RequestError, Store};

use crate::{open, reason};

const HOST: u64 = 8 << 20;

fn vmem_reason(error: &object_store::Error) -> Option<&VirtualMemoryError> {
    std::error::Error::source(error)?.downcast_ref()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_beyond_the_limit_are_refused_by_every_call() {
    let store = open(HOST).await;
    let long = Path::from("x".repeat(1025));
    let there = Path::from("there");
    store.put(&there, "kept".into()).await.unwrap();
    let outcomes = [
        store.put(&long, "y".into()).await.map(drop),
        store.put_multipart(&long).await.map(drop),
        store.get(&long).await.map(drop),
        store.head(&long).await.map(drop),
        store.get_ranges(&long, &[0..1, 2..3]).await.map(drop),
        store.delete(&long).await,
        store.copy(&there, &long).await,
        store.copy(&long, &there).await,
        store.rename(&there, &long).await,
        store.rename(&long, &there).await,
    ];
    for (call, outcome) in outcomes.into_iter().enumerate() {
        let error = outcome.unwrap_err();
        let expected = Some(&RequestError::NameTooLong { len: 1025, max: 1024 });
        assert_eq!(format!("{:?}", reason(&error)), format!("{expected:?}"), "call {call}");
    }
    let longest = Path::from("x".repeat(1024));
    store.rename(&there, &longest).await.unwrap();
    assert_eq!(store.get(&longest).await.unwrap().bytes().await.unwrap(), "kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_is_no_object() {
    let store = open(HOST).await;
    for store in [store.store.clone(), store.store.clone().with_prefix("below")] {
        let root = Path::ROOT;
        for outcome in [
            store.put(&root, "y".into()).await.map(drop),
            store.get(&root).await.map(drop),
            store.head(&root).await.map(drop),
            store.delete(&root).await,
        ] {
            let error = outcome.unwrap_err();
            assert!(matches!(error, object_store::Error::InvalidPath { .. }), "{error}");
        }
    }
}

/// Paths are strings of Rust; what is none is refused by `object_store` itself.
#[test]
fn paths_that_are_not_utf8_are_typed_errors() {
    let error: object_store::Error = Path::from_url_path("a/%ff%fe").unwrap_err().into();
    assert!(matches!(error, object_store::Error::InvalidPath { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attributes_beyond_the_limit_keep_what_was_there() {
    let store = open(HOST).await;
    let path = Path::from("described");
    let describe =
        |len: usize| Attributes::from_iter([(Attribute::Metadata("k".into()), "v".repeat(len))]);
    store.put_opts(&path, "one".into(), describe(4000).into()).await.unwrap();
    let objects = store.vmem().stats().disk.objects;
    let put = store.put_opts(&path, "two".into(), describe(4096).into()).await.map(drop);
    let upload = store.put_multipart_opts(&path, describe(4096).into()).await.map(drop);
    for outcome in [put, upload] {
        let error = outcome.unwrap_err();
        let refused = reason(&error);
        assert!(
            matches!(refused, Some(RequestError::AttributesTooLong { max: 4096, .. })),
            "{error}"
        );
    }
    let got = store.get(&path).await.unwrap();
    assert_eq!(got.attributes, describe(4000));
    assert_eq!(got.bytes().await.unwrap(), "one");
    assert_eq!(store.vmem().stats().disk.objects, objects);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_of_what_is_no_version_fail_and_change_nothing() {
    let store = open(HOST).await;
    let path = Path::from("updated");
    let tag = store.put(&path, "one".into()).await.unwrap().e_tag.unwrap();
    let update = |e_tag: Option<&str>, version: Option<&str>| {
        let e_tag = e_tag.map(str::to_owned);
        let version = version.map(str::to_owned);
        PutOptions::from(PutMode::Update(UpdateVersion { e_tag, version }))
    };
    let error = store.put_opts(&path, "x".into(), update(None, None)).await.unwrap_err();
    assert!(matches!(reason(&error), Some(RequestError::NoVersion)), "{error}");
    for (e_tag, version) in [
        (Some("no number"), None),
        (Some(&*format!("0{tag}")), None),
        (Some(&*format!("+{tag}")), None),
        (Some("18446744073709551616"), None),
        (Some(&*tag), Some("7777")),
        (None, Some("7777")),
    ] {
        let outcome = store.put_opts(&path, "x".into(), update(e_tag, version)).await;
        let error = outcome.unwrap_err();
        assert!(matches!(error, object_store::Error::Precondition { .. }), "{error}");
    }
    assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "one");
    store.put_opts(&path, "two".into(), update(None, Some(&tag))).await.unwrap();
    assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "two");
}

/// What no kind of `object_store` says, the error of the store says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_of_the_store_are_the_sources_of_its_errors() {
    let directory = tempfile::tempdir().unwrap();
    let config = VirtualMemoryConfig::builder()
        .disk_path(directory.path())
        .host_capacity(4 << 20)
        .disk_capacity(4 << 20);
    let store = Store::new(vmem::open(config.build().unwrap()).await.unwrap());
    let path = Path::from("kept");
    store.put(&path, "kept".into()).await.unwrap();
    let error = store.put(&path, vec![0; 5 << 20].into()).await.unwrap_err();
    let too_large = vmem_reason(&error);
    assert!(matches!(too_large, Some(VirtualMemoryError::ExceedsCapacity { .. })), "{error}");
    let update = UpdateVersion { e_tag: Some("7777".into()), version: None };
    let error = store.put_opts(&path, "x".into(), PutMode::Update(update).into()).await;
    let changed = error.unwrap_err();
    let changed = vmem_reason(&changed);
    assert!(matches!(changed, Some(VirtualMemoryError::VersionChanged { .. })), "{changed:?}");
    let homeless = store.clone().with_home(vmem::MemoryTier::Vram);
    let error = homeless.put(&Path::from("up"), "x".into()).await.unwrap_err();
    assert!(matches!(error, object_store::Error::NotSupported { .. }), "{error}");
    assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "kept");

    let body = store.get(&path).await.unwrap();
    store.vmem().clone().close().await.unwrap();
    for outcome in [
        body.bytes().await.map(drop),
        store.get(&path).await.map(drop),
        store.put(&path, "x".into()).await.map(drop),
        store.delete(&path).await,
        store.list_with_delimiter(None).await.map(drop),
        store.get_opts(&path, GetOptions::new().with_head(true)).await.map(drop),
    ] {
        let error = outcome.unwrap_err();
        let closed = vmem_reason(&error);
        assert!(matches!(closed, Some(VirtualMemoryError::Closed)), "{error}");
    }
}
