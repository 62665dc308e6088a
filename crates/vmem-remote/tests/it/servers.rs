//! The tier, the names and whole stores over a server that speaks the protocol of S3.
//!
//! Invariant: each test works below a prefix of its own, and removes what it has left there: the
//! bucket may be anybody's. `scripts/with-moto.sh` has a server, and any other is given by the same
//! variables: `VMEM_S3_ENDPOINT`, `VMEM_S3_BUCKET`, and what AWS's programs take. Of servers that
//! are none, which need no more than a socket, the tests always run.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, RetryConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmem::MemoryTier;
use vmem_remote::{OpenError, RemoteOptions, RemoteTier, RequestError, Uuid};
use vmem_testkit::conformance::{catalog, disk};

use super::catalog::{Table, open_over};
use super::faulty::Faulty;
use super::named::{one_after_the_other, open_to_collect, open_with, survive_faults};
use super::{bytes, impatient, read, seed, write};

/// What no answer of the tests contains.
const SECRET: &str = "wrong-and-not-to-be-shown";

/// A client that leaves all further tries to the tier.
fn client(endpoint: &str, bucket: &str) -> AmazonS3Builder {
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    AmazonS3Builder::from_env()
        .with_endpoint(endpoint)
        .with_allow_http(true)
        .with_bucket_name(bucket)
        .with_retry(retry)
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} says where: scripts/with-moto.sh"))
}

/// The server that the variables name.
fn server() -> AmazonS3 {
    client(&variable("VMEM_S3_ENDPOINT"), &variable("VMEM_S3_BUCKET")).build().unwrap()
}

/// Runs a test over folders that nobody else uses.
async fn in_a_folder<F: Future<Output = ()>>(test: impl FnOnce(Arc<PrefixStore<AmazonS3>>) -> F) {
    let folder = format!("vmem-tests/{}", Uuid::new_v4());
    let store = Arc::new(PrefixStore::new(server(), folder));
    test(store.clone()).await;
    let left = store.list(None).map_ok(|meta| meta.location).boxed();
    let removed: Vec<_> = store.delete_stream(left).try_collect().await.unwrap();
    println!("{} objects were left", removed.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a server: scripts/with-moto.sh"]
async fn suite_of_tiers_passes_over_a_server() {
    in_a_folder(async |store| {
        disk::all(seed(), async || {
            let options = RemoteOptions { capacity: Some(disk::LEAST_CAPACITY), ..impatient() };
            RemoteTier::open(store.clone(), options).await.unwrap()
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a server: scripts/with-moto.sh"]
async fn suite_of_catalogs_passes_over_a_server() {
    in_a_folder(async |store| {
        let table: Arc<Table> = Arc::default();
        catalog::all(seed(), async || {
            let prefix = Uuid::new_v4().to_string();
            open_over(store.clone(), RemoteOptions { prefix, ..impatient() }, &table).await
        })
        .await;
        let first = open_over(store.clone(), impatient(), &table).await;
        let again = async || open_over(store.clone(), impatient(), &table).await;
        catalog::survives_a_restart(first, again).await;
    })
    .await;
}

/// In parts of 5 MiB, which S3 wants at least.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a server: scripts/with-moto.sh"]
async fn segments_in_parts_are_read_in_ranges() {
    in_a_folder(async |store| {
        let options = RemoteOptions { part_bytes: 5 << 20, ..RemoteOptions::default() };
        let tier = RemoteTier::open(store.clone(), options).await.unwrap();
        let payloads: Vec<_> = (0..200).map(|n| bytes(n, 60_000)).collect();
        let written = write(&*tier, &payloads).await.unwrap();
        for (extent, payload) in written.iter().zip(&payloads) {
            assert!(read(&*tier, std::slice::from_ref(extent)).await.unwrap() == *payload);
        }
        assert!(read(&*tier, &written).await.unwrap() == payloads.concat());
        drop(written);
        vmem_core::backend::Tier::close(&*tier).await.unwrap();
        let left: Vec<_> = store.list(None).try_collect().await.unwrap();
        assert!(left.is_empty(), "{left:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a server: scripts/with-moto.sh"]
async fn names_on_a_server_are_found_by_stores_with_an_empty_disk() {
    in_a_folder(async |store| one_after_the_other(store).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a server: scripts/with-moto.sh"]
async fn names_on_a_server_survive_faults_and_the_loss_of_the_disk() {
    in_a_folder(async |store| survive_faults(Faulty::new(store)).await).await;
}

/// Segments that the bucket has.
async fn segments(store: &dyn ObjectStore) -> usize {
    let all: Vec<_> = store.list(None).try_collect().await.unwrap();
    let is_segment = |meta: &&object_store::ObjectMeta| {
        let folder = meta.location.parts().nth(1);
        folder.is_some_and(|folder| folder.as_ref().len() == 36)
    };
    all.iter().filter(is_segment).count()
}

/// With a grace of seconds, which is what a server's clock can tell apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a server: scripts/with-moto.sh"]
async fn segments_on_a_server_go_once_nobody_uses_them() {
    in_a_folder(async |store| {
        let options = RemoteOptions {
            request_timeout: Duration::from_secs(1),
            total_timeout: Duration::from_secs(1),
            grace: Duration::from_secs(5),
            ..impatient()
        };
        let (one, names) = open_to_collect(store.clone(), 8 << 20, options.clone()).await;
        let handle = one.put_named("n", bytes(0, 100_000), MemoryTier::Host).await.unwrap();
        let reader = open_with(store.clone(), 8 << 20, options).await;
        let old = reader.open_named("n").await.unwrap();
        for version in 1..5 {
            one.write(&handle, bytes(version, 100_000)).await.unwrap();
            one.flush(&handle).await.unwrap();
        }
        assert_eq!(segments(&*store).await, 5);
        let began = Instant::now();
        let collected = async |left: usize| {
            while segments(&*store).await > left {
                assert!(began.elapsed() < Duration::from_secs(120), "{left} are not left");
                // What a busy machine delays is asked again.
                let outcomes = (names.collect().await, names.collect_segments().await);
                println!("after {:?}: {outcomes:?}", began.elapsed());
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        collected(2).await;
        assert!(reader.read(&old).await.unwrap() == bytes(0, 100_000), "it was not read before");
        drop(old);
        reader.close().await.unwrap();
        collected(1).await;
        assert!(one.read(&handle).await.unwrap() == bytes(4, 100_000));
        drop(handle);
        one.close().await.unwrap();
    })
    .await;
}

/// Why a tier is not opened, which is found out within the timeout of a request.
async fn refusal(client: AmazonS3Builder) -> RequestError {
    let store = Arc::new(client.build().unwrap());
    let began = Instant::now();
    let error = RemoteTier::open(store, impatient()).await.unwrap_err();
    println!("after {:?}: {error}", began.elapsed());
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains(SECRET), "{shown}");
    let OpenError::Unavailable { source, .. } = error else { panic!("{error:?}") };
    source
}

#[tokio::test]
#[ignore = "needs a server: scripts/with-moto.sh"]
async fn wrong_bucket_and_wrong_credentials_are_named() {
    let endpoint = variable("VMEM_S3_ENDPOINT");
    let missing = format!("vmem-{}", Uuid::new_v4());
    let error = refusal(client(&endpoint, &missing)).await;
    let expected = RequestError::NotFound { code: Some("NoSuchBucket".into()) };
    assert_eq!(error, expected);
    let bucket = variable("VMEM_S3_BUCKET");
    for (key, code) in [(None, "SignatureDoesNotMatch"), (Some("nobody's"), "InvalidAccessKeyId")] {
        let mut client = client(&endpoint, &bucket).with_secret_access_key(SECRET);
        if let Some(key) = key {
            client = client.with_access_key_id(key);
        }
        let error = refusal(client).await;
        assert_eq!(error, RequestError::Denied { code: Some(code.into()) });
    }
}

/// What answers each connection in this way, until it is dropped.
async fn fake(answer: Option<&'static str>) -> (String, tokio::task::JoinHandle<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let serves = tokio::spawn(async move {
        let mut connections = Vec::new();
        loop {
            let (mut connection, _) = listener.accept().await.unwrap();
            connections.push(tokio::spawn(async move {
                let mut request = [0; 4096];
                while connection.read(&mut request).await.is_ok_and(|len| len > 0) {
                    let Some(answer) = answer else { continue };
                    if connection.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            }));
        }
    });
    (endpoint, serves)
}

#[tokio::test]
async fn endpoints_that_are_no_object_store_are_refused_in_time() {
    let proxies = ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
    if let Some(proxy) = proxies.into_iter().find(|name| std::env::var_os(name).is_some()) {
        println!("SKIPPED: {proxy} is set, so what is asked is the proxy");
        return;
    }
    let made = |endpoint: &str| {
        client(endpoint, "bucket")
            .with_region("us-east-1")
            .with_access_key_id("key")
            .with_secret_access_key(SECRET)
    };
    let page = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
    let missing = "HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot found";
    for answer in [Some(page), Some(missing), Some("SSH-2.0-OpenSSH_9.6\r\n"), None] {
        let (endpoint, serves) = fake(answer).await;
        let limit = impatient().request_timeout * 4;
        let error = tokio::time::timeout(limit, refusal(made(&endpoint))).await;
        let error = error.unwrap_or_else(|_| panic!("{answer:?} is waited for"));
        let is_late = matches!(error, RequestError::TimedOut { .. });
        assert_eq!(is_late, answer.is_none(), "{answer:?}: {error:?}");
        serves.abort();
    }
    // Nobody listens there any more.
    let (endpoint, serves) = fake(None).await;
    serves.abort();
    assert!(serves.await.unwrap_err().is_cancelled());
    let error = refusal(made(&endpoint)).await;
    assert!(matches!(error, RequestError::Failed { .. }), "{error:?}");
}
