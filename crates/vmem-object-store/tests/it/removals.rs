//! Deletions, one and many.
//!
//! Invariant: outcomes come in the order of the paths, and one that fails keeps no other.

use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use vmem_object_store::RequestError;

use crate::{open, reason};

const HOST: u64 = 8 << 20;

async fn put_all(store: &dyn ObjectStore, names: impl Iterator<Item = String>) -> Vec<Path> {
    let put = |name: String| async move {
        let path = Path::from(name);
        store.put(&path, "x".into()).await.unwrap();
        path
    };
    stream::iter(names).map(put).buffered(64).collect().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_deletion_shares_commits_and_keeps_the_order() {
    const COUNT: usize = 1000;
    let store = open(HOST).await;
    let paths = put_all(&store.store, (0..COUNT).map(|n| format!("bulk/{n:04}"))).await;
    put_all(&store.store, ["kept".to_owned()].into_iter()).await;
    let commits_before = store.vmem().stats().commits;
    let listed = store.list(Some(&Path::from("bulk"))).map_ok(|meta| meta.location).boxed();
    let removed: Vec<_> = store.delete_stream(listed).try_collect().await.unwrap();
    assert_eq!(removed, paths);
    let commits = store.vmem().stats().commits - commits_before;
    assert!(commits * 4 < COUNT as u64, "{commits} commits for {COUNT} deletions");
    let left: Vec<_> = store.list(None).map_ok(|meta| meta.location).try_collect().await.unwrap();
    assert_eq!(left, [Path::from("kept")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn path_that_is_no_name_fails_alone_in_a_bulk_deletion() {
    let store = open(HOST).await;
    let paths = put_all(&store.store, ["a", "b"].into_iter().map(str::to_owned)).await;
    let long = Path::from("x".repeat(2000));
    let refused = object_store::Error::NotSupported { source: "from the caller".into() };
    let asked = [
        Ok(paths[0].clone()),
        Ok(long),
        Ok(Path::from("not there")),
        Err(refused),
        Ok(Path::ROOT),
        Ok(paths[1].clone()),
    ];
    let removed: Vec<_> = store.delete_stream(stream::iter(asked).boxed()).collect().await;
    let [Ok(first), Err(long), Ok(absent), Err(refused), Err(root), Ok(last)] = &removed[..] else {
        panic!("{removed:?}");
    };
    assert_eq!((first, last), (&paths[0], &paths[1]));
    assert_eq!(absent.as_ref(), "not there");
    assert!(matches!(reason(long), Some(RequestError::NameTooLong { len: 2000, max: 1024 })));
    assert!(matches!(refused, object_store::Error::NotSupported { .. }));
    assert!(matches!(root, object_store::Error::InvalidPath { .. }));
    assert_eq!(store.list(None).count().await, 0);
}
