//! Sizes, times and counts; slow clients.
//!
//! No test asserts how long anything takes: a test that hangs is ended by `BOUND`.

use std::time::Duration;

use axum::body::Body;
use axum::http::Method;
use bytes::Bytes;
use futures::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use vmem::VirtualMemoryConfig;

use crate::support::{Served, expect_error};

pub(crate) const BOUND: Duration = Duration::from_secs(120);

pub(crate) async fn connect(served: &Served, text: &str) -> TcpStream {
    let mut raw = TcpStream::connect(served.service.local_addr()).await.unwrap();
    raw.write_all(text.as_bytes()).await.unwrap();
    raw
}

/// The store that `served` has, with this much space.
fn store_of(config: &mut vmem_service::Config, host: u64, disk: u64) {
    let store = VirtualMemoryConfig::builder()
        .disk_path(config.store.disk_path().unwrap())
        .host_capacity(host)
        .disk_capacity(disk)
        .wait_timeout(Duration::from_millis(500))
        .gpu(vmem::GpuSelection::Off);
    config.store = store.build().unwrap();
}

#[tokio::test]
async fn full_disk_is_answered_with_503_until_there_is_space() {
    let served = Served::start(|config| store_of(config, 8 << 20, 8 << 20)).await;
    let object = vec![1; 1 << 20];
    expect_error(&served.put("/objects/a", &[], &vec![1; 9 << 20]).await, 413, "too_large");
    let mut stored = 0;
    let refused = loop {
        let answer = served.put(&format!("/objects/{stored}"), &[], &object).await;
        if !answer.status.is_success() {
            break answer;
        }
        stored += 1;
        assert!(stored < 9, "{stored} MiB in 8");
    };
    expect_error(&refused, 503, "tier_full");
    assert_eq!(refused.header("retry-after"), "1");
    for n in 0..stored {
        assert!(served.get(&format!("/objects/{n}"), &[]).await.body == object, "{n}");
    }
    for n in 0..2 {
        let path = format!("/objects/{n}");
        assert_eq!(served.ask(Method::DELETE, &path, &[]).await.status, 204);
    }
    // Space comes back a moment after the name has gone.
    let accepted = async { while served.put("/objects/b", &[], &object).await.status != 201 {} };
    timeout(BOUND, accepted).await.expect("there is space again");
    served.stop().await;
}

#[tokio::test]
async fn pins_above_their_budget_are_answered_with_503() {
    let served = Served::start(|config| store_of(config, 8 << 20, 64 << 20)).await;
    let object = vec![1; 2 << 20];
    let mut pinned = 0;
    let refused = loop {
        served.stored(&format!("/objects/{pinned}"), &object).await;
        let answer = served.ask(Method::POST, &format!("/pins/{pinned}"), &[]).await;
        if !answer.status.is_success() {
            break answer;
        }
        pinned += 1;
        assert!(pinned < 4, "{pinned} objects of 2 MiB pinned in 8 MiB");
    };
    assert!(pinned > 0);
    expect_error(&refused, 503, "all_pinned");
    assert_eq!(served.ask(Method::DELETE, "/pins/0", &[]).await.status, 204);
    let again = served.ask(Method::POST, &format!("/pins/{pinned}"), &[]).await;
    assert_eq!(again.status, 200, "{again:?}");
    served.stop().await;
}

/// What comes before the connection ends.
pub(crate) async fn rest(mut raw: TcpStream) -> String {
    let mut answer = Vec::new();
    let read = timeout(BOUND, raw.read_to_end(&mut answer)).await;
    let _ = read.expect("the service ends the connection");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn objects_above_the_limit_are_refused() {
    let served = Served::start(|config| config.limits.max_object = 100_000).await;
    assert_eq!(served.put("/objects/a", &[], &[1; 100_000]).await.status, 201);
    expect_error(&served.put("/objects/b", &[], &[1; 100_001]).await, 413, "too_large");
    let pieces = (0..11).map(|_| Ok::<_, std::io::Error>(Bytes::from(vec![1; 10_000])));
    let body = Body::from_stream(futures::stream::iter(pieces));
    let put = served.http.send(Method::PUT, "/objects/b", &[], body).await.unwrap();
    expect_error(&put, 413, "too_large");
    assert_eq!(served.get("/objects/b", &[]).await.status, 404);
    // It learns so before it sends anything.
    let head = "PUT /objects/b HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n";
    let head = format!("{head}content-length: 999999\r\n\r\n");
    let answer = rest(connect(&served, &head).await).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    served.stop().await;
}

#[tokio::test]
async fn headers_above_the_limits_are_refused() {
    let served = Served::start(|config| config.limits.max_headers = 8192).await;
    let long = "a".repeat(5000);
    let put = served.put("/objects/a", &[("x-object-meta-a", &long)], b"").await;
    expect_error(&put, 431, "metadata_too_large");
    let long = "a".repeat(20_000);
    let get = format!("GET /objects/a HTTP/1.1\r\nhost: localhost\r\nx-long: {long}\r\n\r\n");
    let answer = rest(connect(&served, &get).await).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    served.stop().await;
}

/// The body was not read, so the connection was reset, and a client that sends before it reads
/// never saw the answer.
#[tokio::test]
async fn errors_are_seen_by_clients_that_send_a_large_body() {
    let served = Served::start(|config| config.limits.max_object = 1 << 20).await;
    let body = vec![1; 8 << 20];
    for (request, status) in [
        ("PUT /objects/a//b", 400),
        ("PUT /objects/", 400),
        ("PUT /objects/a", 413),
        ("PUT /elsewhere", 404),
        ("POST /objects/a", 405),
        ("PUT /objects", 405),
        ("PUT /metrics", 405),
        ("PUT /healthz", 405),
        ("PUT /dashboard/snapshot", 405),
        ("POST /pins/absent", 404),
    ] {
        let head = format!("{request} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
        let head = format!("{head}content-length: {}\r\n\r\n", body.len());
        let mut raw = connect(&served, &head).await;
        let sent = timeout(BOUND, raw.write_all(&body)).await.expect("it is read");
        sent.unwrap_or_else(|error| panic!("{request}: {error}"));
        let answer = rest(raw).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
    }
    // One that waits for leave to send gets the answer at once, and no leave.
    let head = "PUT /elsewhere HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n";
    let waits = connect(&served, &format!("{head}content-length: 9\r\n\r\n")).await;
    let answer = rest(waits).await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    served.stop().await;
}

#[tokio::test]
async fn requests_above_the_limits_get_503_and_429() {
    for (per_client, status, code) in [(0, 503, "busy"), (1, 429, "too_many_requests")] {
        let served = Served::start(|config| {
            config.limits.max_requests = if per_client == 0 { 1 } else { 9 };
            config.limits.max_requests_per_client = per_client;
            config.limits.retry_after = Duration::from_secs(7);
        })
        .await;
        let mut slow = served.unfinished_put().await;
        let refused = served.put("/objects/a", &[], b"a").await;
        expect_error(&refused, status, code);
        assert_eq!(refused.header("retry-after"), "7");
        assert_eq!(served.get("/readyz", &[]).await.status, 200);
        slow.write_all(b"nine char").await.unwrap();
        let mut answer = [0; 12];
        slow.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 201");
        drop(slow);
        // Its place comes back with the end of its answer.
        let free = async { while served.get("/objects/slow", &[]).await.status != 200 {} };
        timeout(BOUND, free).await.expect("the place is free again");
        served.stop().await;
    }
}

#[tokio::test]
async fn bodies_without_progress_are_cut_off() {
    let served = Served::start(|config| {
        config.limits.body_timeout = Duration::from_secs(2);
        config.limits.body_progress = 10;
    })
    .await;
    // Ten bytes in a second are enough, however long it takes.
    let steady = async {
        let head = "PUT /objects/a HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n";
        let head = format!("{head}content-length: 60\r\n\r\n");
        let mut raw = connect(&served, &head).await;
        for _ in 0..30 {
            sleep(Duration::from_millis(100)).await;
            raw.write_all(b"ab").await.unwrap();
        }
        rest(raw).await
    };
    // A byte now and then is not.
    let drip = async {
        let head = "PUT /objects/b HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999\r\n\r\n";
        let mut raw = connect(&served, head).await;
        let (mut reading, mut writing) = raw.split();
        let mut answer = [0; 12];
        let drops = async {
            while writing.write_all(b"a").await.is_ok() {
                sleep(Duration::from_millis(400)).await;
            }
        };
        tokio::select! {
            read = timeout(BOUND, reading.read_exact(&mut answer)) => { read.unwrap().unwrap(); }
            () = drops => panic!("it is closed without an answer"),
        }
        String::from_utf8_lossy(&answer).into_owned()
    };
    let (steady, drip) = futures::join!(steady, drip);
    assert!(steady.starts_with("HTTP/1.1 201 "), "{steady}");
    assert_eq!(drip, "HTTP/1.1 408");
    assert_eq!(served.get("/objects/b", &[]).await.status, 404);
    served.stop().await;
}

/// A byte within each `body_timeout` kept a place for as long as its client liked.
#[tokio::test]
async fn bodies_below_the_mean_rate_are_cut_off() {
    let served = Served::start(|config| {
        // Each byte is progress enough.
        config.limits.body_progress = 1;
        config.limits.body_timeout = Duration::from_secs(100_000);
        config.limits.min_rate = 100_000;
        config.limits.rate_grace = Duration::from_secs(2);
    })
    .await;
    let head = "PUT /objects/b HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut raw = connect(&served, head).await;
    let (mut reading, mut writing) = raw.split();
    let mut answer = [0; 12];
    let drops = async {
        // A megabyte at the start is worth nothing later.
        let start = format!("100000\r\n{}\r\n", "a".repeat(1 << 20));
        writing.write_all(start.as_bytes()).await.unwrap();
        while writing.write_all(b"1\r\na\r\n").await.is_ok() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        read = timeout(BOUND, reading.read_exact(&mut answer)) => { read.unwrap().unwrap(); }
        () = drops => panic!("it is closed without an answer"),
    }
    assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 408");
    assert_eq!(served.get("/objects/b", &[]).await.status, 404);
    // One that keeps the rate is served, however long it takes beyond the grace.
    let pieces = (0..40).map(|_| Ok::<_, std::io::Error>(Bytes::from(vec![1; 100_000])));
    let steady = futures::stream::iter(pieces).then(|piece| async {
        sleep(Duration::from_millis(75)).await;
        piece
    });
    let put = served.http.send(Method::PUT, "/objects/b", &[], Body::from_stream(steady)).await;
    assert_eq!(put.unwrap().status, 201);
    served.stop().await;
}

/// So did a client that took a byte of its response within each `write_timeout`.
#[tokio::test]
async fn client_that_reads_below_the_mean_rate_gives_its_place_back() {
    let served = Served::start(|config| {
        config.limits.max_requests = 1;
        config.limits.write_timeout = Duration::from_secs(100_000);
        config.limits.min_rate = 1 << 30;
        // The request that stores the object is under the same limits.
        config.limits.rate_grace = Duration::from_secs(5);
    })
    .await;
    served.stored("/objects/large", &vec![1; 16 << 20]).await;
    let get = "GET /objects/large HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut slow = connect(&served, get).await;
    let mut bytes = vec![0; 64 << 10];
    slow.read_exact(&mut bytes).await.unwrap();
    let reading = async {
        loop {
            sleep(Duration::from_millis(50)).await;
            // Far from what it has asked for, at the end of a test that hangs.
            if slow.read(&mut bytes[..10_000]).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let free = async { while served.get("/objects", &[]).await.status != 200 {} };
    tokio::select! {
        freed = timeout(BOUND, free) => freed.expect("it is cut off"),
        () = reading => unreachable!("it reads on"),
    }
    served.stop().await;
}

#[tokio::test]
async fn client_that_does_not_read_gives_its_place_back() {
    let served = Served::start(|config| {
        config.limits.max_requests = 1;
        config.limits.write_timeout = Duration::from_millis(500);
    })
    .await;
    served.stored("/objects/large", &vec![1; 32 << 20]).await;
    let stalled = connect(&served, "GET /objects/large HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    let taken = async { while served.get("/objects", &[]).await.status != 503 {} };
    timeout(BOUND, taken).await.expect("it has the one place");
    let free = async { while served.get("/objects", &[]).await.status != 200 {} };
    timeout(BOUND, free).await.expect("it is cut off");
    let cut = rest(stalled).await;
    assert!(cut.len() < 32 << 20, "{} bytes", cut.len());
    served.stop().await;
}

/// The HTTP layer takes a short response as a whole, and its place was free while it waited there.
#[tokio::test]
async fn client_that_does_not_read_a_short_response_has_a_place() {
    let served = Served::start(|config| {
        config.limits.max_requests = 1;
        config.limits.send_buffer = 4096;
        config.limits.write_timeout = Duration::from_secs(100_000);
    })
    .await;
    served.stored("/objects/short", &vec![1; 256 << 10]).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stalled = socket.connect(served.service.local_addr()).await.unwrap();
    let get = "GET /objects/short HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stalled.write_all(get.as_bytes()).await.unwrap();
    stalled.read_exact(&mut [0; 12]).await.unwrap();
    for _ in 0..20 {
        expect_error(&served.get("/objects", &[]).await, 503, "busy");
    }
    rest(stalled).await;
    let free = async { while served.get("/objects", &[]).await.status != 200 {} };
    timeout(BOUND, free).await.expect("the place is free again");
    served.stop().await;
}

#[tokio::test]
async fn clients_that_do_not_read_keep_nothing_from_others() {
    let served = Served::start(|_| {}).await;
    served.stored("/objects/large", &vec![1; 16 << 20]).await;
    let get = "GET /objects/large HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let stalled = futures::future::join_all((0..100).map(|_| connect(&served, get))).await;
    // Twice what host memory has.
    let others = async {
        for n in 0..32_u8 {
            let path = format!("/objects/{n}");
            served.stored(&path, &vec![n; 500_000]).await;
        }
        for n in 0..32_u8 {
            let answer = served.get(&format!("/objects/{n}"), &[]).await;
            assert!(answer.status == 200 && answer.body == vec![n; 500_000], "{n}");
        }
    };
    timeout(BOUND, others).await.expect("others are served");
    let stats = served.service.store().stats();
    assert!(stats.held_bytes < 1 << 20, "{} bytes held", stats.held_bytes);
    drop(stalled);
    served.stop().await;
}
