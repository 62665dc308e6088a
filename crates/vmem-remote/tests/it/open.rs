//! What opening finds out about options and bucket.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use object_store::memory::InMemory;
use vmem_core::backend::Tier;
use vmem_remote::{OpenError, RemoteOptions, RemoteTier, RequestError};

use super::faulty::{Fault, Faulty, Op};
use super::{emptied, small, stored};

async fn refused(options: RemoteOptions, fault: Option<(Op, Fault)>) -> (OpenError, Arc<Faulty>) {
    let store = Faulty::new(Arc::new(InMemory::new()));
    store.fail(move |op| fault.filter(|(at, _)| *at == op).map(|(_, fault)| fault));
    let error = RemoteTier::open(store.clone(), options).await.unwrap_err();
    (error, store)
}

#[tokio::test(start_paused = true)]
async fn options_that_cannot_work_are_named() {
    let wrong = [
        ("segment_bytes", RemoteOptions { segment_bytes: 1, ..small() }),
        ("capacity", RemoteOptions { capacity: Some(0), ..small() }),
        ("puts", RemoteOptions { puts: 0, ..small() }),
        ("requests", RemoteOptions { requests: 0, ..small() }),
        ("tries", RemoteOptions { tries: 0, ..small() }),
        ("total_timeout", RemoteOptions { total_timeout: Duration::ZERO, ..small() }),
        ("compact_below", RemoteOptions { compact_below: f64::NAN, ..small() }),
        ("prefix", RemoteOptions { prefix: "a//b".into(), ..small() }),
        ("prefix", RemoteOptions { prefix: "../a".into(), ..small() }),
    ];
    for (expected, options) in wrong {
        let (error, store) = refused(options, None).await;
        let OpenError::InvalidOption { field, .. } = &error else { panic!("{error:?}") };
        assert_eq!(*field, expected);
        assert!(store.take_seen().is_empty(), "nothing was asked");
    }
}

#[tokio::test(start_paused = true)]
async fn cause_is_named_and_no_secret() {
    let (error, _) = refused(small(), Some((Op::Put, Fault::Denied))).await;
    let shown = format!("{error} {error:?}");
    assert!(shown.contains("ExpiredToken") && !shown.contains("SECRET"), "{shown}");
    let denied = RequestError::Denied { code: Some("ExpiredToken".into()) };
    assert!(
        matches!(&error, OpenError::Unavailable { request: "put", source } if *source == denied),
        "{error:?}"
    );
    let (error, _) = refused(small(), Some((Op::Put, Fault::Refused))).await;
    let OpenError::Unavailable { source: RequestError::Failed { kind, .. }, .. } = error else {
        panic!("{error:?}")
    };
    assert_eq!(kind, ErrorKind::ConnectionReset);
}

#[tokio::test(start_paused = true)]
async fn silent_store_is_refused_within_the_timeout() {
    let began = tokio::time::Instant::now();
    let (error, _) = refused(small(), Some((Op::Get, Fault::Silent))).await;
    let silent = matches!(
        &error,
        OpenError::Unavailable { request: "get", source: RequestError::TimedOut { .. } }
    );
    assert!(silent, "{error:?}");
    assert_eq!(began.elapsed(), small().request_timeout);
}

#[tokio::test(start_paused = true)]
async fn store_that_returns_other_bytes_is_refused() {
    let (error, _) = refused(small(), Some((Op::Get, Fault::Flipped))).await;
    let altered = matches!(
        &error,
        OpenError::Unavailable { request: "get", source: RequestError::Altered { .. } }
    );
    assert!(altered, "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn instances_do_not_touch_each_other() {
    let store = Arc::new(InMemory::new());
    let one = RemoteTier::open(store.clone(), small()).await.unwrap();
    let other = RemoteTier::open(store.clone(), small()).await.unwrap();
    assert_eq!(stored(&*store).await, (0, 0), "a probe leaves nothing");
    let payloads = [super::bytes(1, 5000)];
    let kept = super::write(&*one, &payloads).await.unwrap();
    let gone = super::write(&*other, &payloads).await.unwrap();
    assert_eq!(stored(&*store).await.0, 2);
    other.close().await.unwrap();
    drop(gone);
    assert_eq!(super::read(&*one, &kept).await.unwrap(), payloads[0]);
    let all: Vec<_> = futures::TryStreamExt::try_collect(store.list(None)).await.unwrap();
    let all: Vec<object_store::ObjectMeta> = all;
    assert!(all.iter().all(|meta| meta.location.as_ref().starts_with("vmem/")), "{all:?}");
    one.close().await.unwrap();
    emptied(&*store).await;
}

#[test]
fn open_needs_a_runtime_with_a_timer() {
    let open = || RemoteTier::open(Arc::new(InMemory::new()), small());
    let error = futures::executor::block_on(open()).unwrap_err();
    assert!(matches!(error, OpenError::UnsuitableRuntime), "{error:?}");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let error = runtime.block_on(open()).unwrap_err();
    assert!(matches!(error, OpenError::UnsuitableRuntime), "{error:?}");
}
