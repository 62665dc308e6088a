//! What each request answers.

use axum::body::Body;
use axum::http::Method;
use bytes::Bytes;
use futures::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::connections::connect_from;
use crate::support::{Served, exchange, expect_error, json};

#[tokio::test]
async fn objects_come_back_as_they_were_stored() {
    let served = Served::start(|_| {}).await;
    let headers = [
        ("content-type", "text/plain"),
        ("content-encoding", "gzip"),
        ("cache-control", "max-age=60"),
        ("x-object-meta-colour", "green"),
    ];
    let put = served.put("/objects/a/b%20c", &headers, b"hello").await;
    assert_eq!(put.status, 201);
    assert_eq!(json(&put)["name"], "a/b c");
    assert_eq!(json(&put)["etag"], put.header("etag"));

    let get = served.get("/objects/a%2Fb%20c", &[]).await;
    assert_eq!((get.status.as_u16(), &get.body[..]), (200, &b"hello"[..]));
    for (name, value) in [
        ("content-type", "text/plain"),
        ("content-encoding", "gzip"),
        ("cache-control", "max-age=60"),
        ("content-length", "5"),
        ("x-object-meta-colour", "green"),
        ("accept-ranges", "bytes"),
        ("etag", put.header("etag")),
    ] {
        assert_eq!(get.header(name), value, "{name}");
    }
    let head = served.ask(Method::HEAD, "/objects/a/b%20c", &[]).await;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
    for name in [
        "content-type",
        "content-encoding",
        "content-length",
        "x-object-meta-colour",
        "etag",
        "last-modified",
    ] {
        assert!(!head.header(name).is_empty());
        assert_eq!(head.header(name), get.header(name), "{name}");
    }

    let etag = put.header("etag");
    let same = served.get("/objects/a/b%20c", &[("if-none-match", etag)]).await;
    assert_eq!((same.status.as_u16(), same.header("cache-control")), (304, "max-age=60"));

    let again = served.put("/objects/a/b%20c", &[], b"").await;
    assert_eq!(again.status, 200);
    assert_ne!(again.header("etag"), put.header("etag"));
    let get = served.get("/objects/a/b%20c", &[]).await;
    assert_eq!((get.status.as_u16(), get.body.len()), (200, 0));
    assert_eq!(get.header("content-type"), "application/octet-stream");
    assert_eq!((get.header("x-object-meta-colour"), get.header("content-encoding")), ("", ""));

    let deleted = served.ask(Method::DELETE, "/objects/a/b%20c", &[]).await;
    assert_eq!(deleted.status, 204);
    for method in [Method::GET, Method::DELETE] {
        expect_error(&served.ask(method, "/objects/a/b%20c", &[]).await, 404, "not_found");
    }
    let head = served.ask(Method::HEAD, "/objects/a/b%20c", &[]).await;
    assert_eq!((head.status.as_u16(), head.body.len()), (404, 0));
    served.stop().await;
}

#[tokio::test]
async fn bodies_in_chunks_are_stored_whole() {
    let served = Served::start(|_| {}).await;
    // More than host memory has.
    let pieces: Vec<Bytes> = (0..200_u32).map(|n| vec![n as u8; 60_000].into()).collect();
    let whole = pieces.concat();
    let stream = futures::stream::iter(pieces.into_iter().map(Ok::<_, std::io::Error>));
    let body = Body::from_stream(stream);
    let put = served.http.send(Method::PUT, "/objects/large", &[], body).await.unwrap();
    assert_eq!(put.status, 201, "{put:?}");
    assert_eq!(json(&put)["size"], whole.len());
    let get = served.get("/objects/large", &[]).await;
    assert!(get.body == whole, "{} bytes", get.body.len());
    served.stop().await;
}

#[tokio::test]
async fn body_that_breaks_off_leaves_nothing() {
    let served = Served::start(|_| {}).await;
    let before = served.stored("/objects/a", b"before").await;
    let pieces = [Ok(Bytes::from_static(b"half")), Err(std::io::Error::other("gone"))];
    let body = Body::from_stream(futures::stream::iter(pieces));
    served.http.send(Method::PUT, "/objects/a", &[], body).await.unwrap_err();
    // With a length, and by a closed connection.
    let mut raw = TcpStream::connect(served.service.local_addr()).await.unwrap();
    raw.write_all(b"PUT /objects/a HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nhalf")
        .await
        .unwrap();
    raw.shutdown().await.unwrap();
    let mut answer = Vec::new();
    let _ = raw.read_to_end(&mut answer).await;
    let get = served.get("/objects/a", &[]).await;
    assert_eq!((get.header("etag"), &get.body[..]), (&*before, &b"before"[..]));
    served.stop().await;
}

#[tokio::test]
async fn put_without_a_length_is_refused() {
    let served = Served::start(|_| {}).await;
    let put = "PUT /objects/a HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n";
    let answer = exchange(&served, &format!("{put}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 411 ") && answer.contains("length_required"), "{answer}");
    // Nothing else needs one.
    let answer = exchange(&served, &format!("{put}content-length: 0\r\n\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
    served.stop().await;
}

#[tokio::test]
async fn names_that_lead_elsewhere_are_refused() {
    let served = Served::start(|_| {}).await;
    for path in [
        "/objects/",
        "/objects/a//b",
        "/objects/..%2f..%2fetc%2fpasswd",
        "/objects/a/%2e%2e/b",
        "/objects/a%00b",
        "/objects/%ff",
        "/objects/a%5cb",
        "/objects/a%zz",
    ] {
        for method in [Method::GET, Method::PUT, Method::DELETE] {
            let answer = served.ask(method, path, &[]).await;
            expect_error(&answer, 400, "invalid_name");
        }
    }
    let dots = "GET /objects/../healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    assert!(exchange(&served, dots).await.starts_with("HTTP/1.1 400 "));
    let long = format!("/objects/{}", "a".repeat(1025));
    expect_error(&served.get(&long, &[]).await, 400, "invalid_name");
    expect_error(&served.get("/elsewhere", &[]).await, 404, "unknown_path");
    expect_error(&served.ask(Method::PATCH, "/objects/a", &[]).await, 405, "method_not_allowed");
    let put = served.put("/objects/a", &[("content-type", "nonsense")], b"").await;
    expect_error(&put, 400, "invalid_content_type");
    served.stop().await;
}

#[tokio::test]
async fn listings_go_on_behind_their_pages() {
    let served = Served::start(|config| config.limits.max_listed = 3).await;
    for name in ["a/1", "a/2", "a/b/3", "a/b/4", "a/c/5", "b/6"] {
        served.stored(&format!("/objects/{name}"), name.as_bytes()).await;
    }
    let mut names = Vec::new();
    let mut after = String::new();
    loop {
        let page = json(&served.get(&format!("/objects?prefix=a/&start_after={after}"), &[]).await);
        let objects = page["objects"].as_array().unwrap();
        assert!(objects.len() <= 3);
        names.extend(objects.iter().map(|object| object["name"].as_str().unwrap().to_owned()));
        match page["next"].as_str() {
            Some(next) => after = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(names, ["a/1", "a/2", "a/b/3", "a/b/4", "a/c/5"]);
    let top = json(&served.get("/objects?prefix=a/&delimiter=/&limit=3", &[]).await);
    assert_eq!(top["objects"].as_array().unwrap().len(), 2);
    assert_eq!((&top["prefixes"], &top["next"]), (&serde_json::json!(["a/b/"]), &"a/b/".into()));
    let rest = json(&served.get("/objects?prefix=a/&delimiter=/&start_after=a/b/", &[]).await);
    assert_eq!((&rest["prefixes"], &rest["next"]), (&serde_json::json!(["a/c/"]), &().into()));
    for query in ["limit=0", "limit=x", "delimiter=", "prefixes=a"] {
        let answer = served.get(&format!("/objects?{query}"), &[]).await;
        expect_error(&answer, 400, "invalid_query");
    }
    served.stop().await;
}

/// A thousand items of 5 KiB each were one answer, in memory as a whole for each client.
#[tokio::test]
async fn listings_have_a_budget_in_bytes() {
    const COUNT: usize = 300;
    let served = Served::start(|_| {}).await;
    let long = "m".repeat(3990);
    let put = |n: usize| {
        let served = &served;
        let long = &long;
        async move {
            let path = format!("/objects/{n:03}");
            let answer = served.put(&path, &[("x-object-meta-long", long)], b"").await;
            assert_eq!(answer.status, 201, "{answer:?}");
        }
    };
    futures::stream::iter((0..COUNT).map(put)).buffer_unordered(16).collect::<Vec<_>>().await;
    let mut names = Vec::new();
    let mut after = String::new();
    let mut pages = 0;
    loop {
        let answer = served.get(&format!("/objects?start_after={after}"), &[]).await;
        assert_eq!(answer.header("content-type"), "application/json");
        assert!(answer.body.len() < (1 << 20) + 2048, "{}", answer.body.len());
        let page = json(&answer);
        let objects = page["objects"].as_array().unwrap();
        assert!(!objects.is_empty());
        names.extend(objects.iter().map(|object| object["name"].as_str().unwrap().to_owned()));
        assert!(objects.iter().all(|object| object["metadata"]["long"] == *long));
        pages += 1;
        match page["next"].as_str() {
            Some(next) => after = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(names, (0..COUNT).map(|n| format!("{n:03}")).collect::<Vec<_>>());
    assert_eq!(pages, 2);

    // Clients that do not read theirs keep what they take, and no more is made. One of them cannot
    // take it all.
    let mut stalled = Vec::new();
    let full = async {
        for (address, end) in [(2, b"HTTP/1.1 429"), (3, b"HTTP/1.1 429"), (4, b"HTTP/1.1 503")] {
            loop {
                let (status, raw) = list_from(&served, address).await;
                if &status == end {
                    break;
                }
                assert_eq!(&status, b"HTTP/1.1 200", "127.0.0.{address}, {}", stalled.len());
                stalled.push(raw);
            }
        }
    };
    tokio::time::timeout(crate::limits::BOUND, full).await.expect("there is a budget");
    assert!((8..=9).contains(&stalled.len()), "{} pages of 1 MiB", stalled.len());
    expect_error(&served.get("/objects", &[]).await, 503, "busy");
    drop(stalled);
    let free = async { while served.get("/objects", &[]).await.status != 200 {} };
    tokio::time::timeout(crate::limits::BOUND, free).await.expect("it is given back");
    served.stop().await;
}

/// The status line of a listing for 127.0.0.`address`, which reads no further.
async fn list_from(served: &Served, address: u8) -> ([u8; 12], TcpStream) {
    let mut raw = connect_from(served, address).await;
    raw.write_all(b"GET /objects HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut status = [0; 12];
    raw.read_exact(&mut status).await.unwrap();
    (status, raw)
}

#[tokio::test]
async fn health_and_ids_are_answered() {
    let served = Served::start(|_| {}).await;
    assert_eq!(served.get("/healthz", &[]).await.status, 200);
    assert_eq!(served.get("/readyz", &[]).await.status, 200);
    let kept = served.get("/healthz", &[("x-request-id", "mine-1")]).await;
    assert_eq!(kept.header("x-request-id"), "mine-1");
    let other = served.get("/healthz", &[("x-request-id", "a b")]).await;
    assert_eq!(other.header("x-request-id").len(), 36, "{other:?}");
    served.service.store().clone().close().await.unwrap();
    expect_error(&served.get("/readyz", &[]).await, 503, "not_ready");
    assert_eq!(served.get("/healthz", &[]).await.status, 200);
    let put = served.put("/objects/a", &[], b"late").await;
    expect_error(&put, 503, "closing");
    assert_eq!(put.header("retry-after"), "1");
}
