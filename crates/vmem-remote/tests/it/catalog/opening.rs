//! What opening finds out, and names and chunks that no bucket can have.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use vmem_core::VirtualMemoryError;
use vmem_core::backend::{Catalog, CatalogChange, Run};
use vmem_remote::{BucketCatalog, OpenError, RemoteOptions, RequestError};

use super::super::faulty::{Fault, Faulty, Op};
use super::super::stored;
use super::{Table, World, object, options, put, version};

async fn refused(store: Arc<dyn ObjectStore>, options: RemoteOptions) -> OpenError {
    BucketCatalog::open(store, options, Arc::new(Table::default())).await.unwrap_err()
}

async fn refused_with(op: Op, fault: Fault) -> (OpenError, Arc<Faulty>) {
    let store = Faulty::new(Arc::new(InMemory::new()));
    store.fail(move |it| (it == op).then_some(fault));
    (refused(store.clone(), options()).await, store)
}

/// A store that overwrites what it is asked to create.
#[derive(Debug)]
struct Overwriting(InMemory);

impl std::fmt::Display for Overwriting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Overwriting")
    }
}

#[async_trait]
impl ObjectStore for Overwriting {
    async fn put_opts(&self, to: &Path, body: PutPayload, _: PutOptions) -> Result<PutResult> {
        self.0.put_opts(to, body, PutMode::Overwrite.into()).await
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> Result<GetResult> {
        self.0.get_opts(from, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.0.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

#[tokio::test(start_paused = true)]
async fn store_without_conditional_creates_is_refused() {
    let store = Arc::new(Overwriting(InMemory::new()));
    let error = refused(store.clone(), options()).await;
    assert!(matches!(error, OpenError::NoConditionalCreate), "{error:?}");
    assert_eq!(stored(&*store).await, (0, 0), "the probe is deleted again");
}

#[tokio::test(start_paused = true)]
async fn probe_leaves_nothing_even_if_its_answer_was_lost() {
    let world = World::new();
    let mut is_first = true;
    world
        .store
        .fail(move |op| (op == Op::Put && std::mem::take(&mut is_first)).then_some(Fault::Lost));
    world.open().await;
    assert_eq!(stored(&*world.store).await, (0, 0));
}

#[tokio::test(start_paused = true)]
async fn cause_is_named_within_the_timeout_and_no_secret() {
    let began = tokio::time::Instant::now();
    let (error, _) = refused_with(Op::Put, Fault::Denied).await;
    let shown = format!("{error} {error:?}");
    assert!(shown.contains("ExpiredToken") && !shown.contains("SECRET"), "{shown}");
    let is_named = matches!(&error, OpenError::Unavailable { request: "create", .. });
    assert!(is_named, "{error:?}");
    assert_eq!(began.elapsed(), Duration::ZERO);
    for (op, request) in [(Op::Put, "create"), (Op::Get, "get"), (Op::Delete, "delete")] {
        let began = tokio::time::Instant::now();
        let (error, _) = refused_with(op, Fault::Silent).await;
        let OpenError::Unavailable { request: at, source } = &error else { panic!("{error:?}") };
        assert_eq!(*at, request);
        assert!(matches!(source, RequestError::TimedOut { .. }), "{error:?}");
        assert_eq!(began.elapsed(), options().request_timeout);
    }
}

#[tokio::test(start_paused = true)]
async fn grace_that_requests_may_outlast_is_refused() {
    for grace in [Duration::ZERO, Duration::from_secs(119)] {
        let store = Faulty::new(Arc::new(InMemory::new()));
        let error = refused(store.clone(), RemoteOptions { grace, ..options() }).await;
        let is_named = matches!(&error, OpenError::InvalidOption { field: "grace", .. });
        assert!(is_named, "{error:?}");
        assert_eq!(store.take_seen(), []);
    }
    World::new().open_with(RemoteOptions { grace: Duration::from_secs(120), ..options() }).await;
}

#[test]
fn catalog_needs_a_runtime_with_a_timer() {
    let open = refused(Arc::new(InMemory::new()), options());
    let error = futures::executor::block_on(open);
    assert!(matches!(error, OpenError::UnsuitableRuntime), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn names_that_no_key_can_hold_are_refused() {
    let world = World::new();
    let catalog = world.open().await;
    world.requests();
    let long = "n".repeat(499);
    let refusals = [
        catalog.commit(put(&long, &object(1, 10, 1))).await.unwrap_err(),
        catalog.find(long.as_str().into()).await.unwrap_err(),
        catalog.record("".into()).await.unwrap_err(),
    ];
    for refusal in &refusals {
        let is_named = matches!(refusal, VirtualMemoryError::InvalidConfig { field: "name", .. });
        assert!(is_named, "{refusal:?}");
    }
    assert_eq!((world.requests(), catalog.attempts()), (vec![], 0));
    let fits = &long[..498];
    catalog.commit(put(fits, &object(1, 10, 1))).await.unwrap();
    assert_eq!(version(&catalog, fits).await, Some(10));
}

#[tokio::test(start_paused = true)]
async fn chunks_without_a_place_are_refused_before_anything_is_put() {
    let world = World::new();
    let catalog = world.open().await;
    let mut elsewhere = object(2, 20, 2);
    let run = Run { offset: 13, footprint: 100 };
    elsewhere.chunks[1].as_mut().unwrap().runs = [run].into();
    let mut short = object(3, 30, 2);
    short.chunks.pop();
    let orphan = CatalogChange::Segment { id: 9, segment: 0, chunks: vec![] };
    let record = object(4, 40, 1).record;
    let bad = [
        put("b", &elsewhere),
        put("b", &short),
        vec![orphan],
        vec![CatalogChange::Put { name: "b".into(), record }],
    ];
    for changes in bad {
        let all = [put("a", &object(1, 10, 1)), changes].concat();
        let refused = catalog.commit(all).await.unwrap_err();
        let VirtualMemoryError::Io { source, .. } = &refused else { panic!("{refused:?}") };
        assert_eq!(source.kind(), std::io::ErrorKind::InvalidInput, "{refused:?}");
    }
    assert_eq!(stored(&*world.store).await, (0, 0));
    assert!(!catalog.is_shut());
}

#[tokio::test(start_paused = true)]
async fn snapshot_to_a_directory_is_refused() {
    let refused = World::new().open().await.snapshot("/nowhere".into()).await;
    let is_named =
        matches!(&refused, Err(VirtualMemoryError::InvalidConfig { field: "directory", .. }));
    assert!(is_named, "{refused:?}");
}
