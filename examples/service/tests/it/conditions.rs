//! ETags, dates and ranges.

use axum::http::Method;
use futures::future::join_all;

use crate::support::{Served, expect_error};

#[tokio::test]
async fn reads_obey_their_conditions() {
    let served = Served::start(|_| {}).await;
    let old = served.stored("/objects/a", b"old").await;
    let tag = served.stored("/objects/a", b"new").await;
    let modified = served.get("/objects/a", &[]).await.header("last-modified").to_owned();
    let long_ago = "Sun, 06 Nov 1994 08:49:37 GMT";
    let both = format!("{old}, {tag}");
    let weak = format!("W/{tag}");
    for (headers, status) in [
        (vec![("if-none-match", &*tag)], 304),
        (vec![("if-none-match", &*weak)], 304),
        (vec![("if-none-match", &*both)], 304),
        (vec![("if-none-match", "*")], 304),
        (vec![("if-none-match", &*old)], 200),
        (vec![("if-match", &*tag)], 200),
        (vec![("if-match", &*both)], 200),
        (vec![("if-match", "*")], 200),
        (vec![("if-match", &*old)], 412),
        (vec![("if-match", &*weak)], 412),
        (vec![("if-modified-since", &*modified)], 304),
        (vec![("if-modified-since", long_ago)], 200),
        // The ETag goes before the date.
        (vec![("if-none-match", &*old), ("if-modified-since", &*modified)], 200),
        (vec![("if-unmodified-since", &*modified)], 200),
        (vec![("if-unmodified-since", long_ago)], 412),
        (vec![("if-match", &*tag), ("if-unmodified-since", long_ago)], 200),
    ] {
        for method in [Method::GET, Method::HEAD] {
            let answer = served.ask(method.clone(), "/objects/a", &headers).await;
            assert_eq!(answer.status.as_u16(), status, "{method} {headers:?}");
            if status < 400 {
                assert_eq!(answer.header("etag"), tag);
            }
            let is_whole = status == 200 && method == Method::GET;
            assert_eq!(&answer.body[..] == b"new", is_whole, "{method} {headers:?}");
        }
    }
    let get = served.get("/objects/a", &[("if-match", &*old)]).await;
    expect_error(&get, 412, "precondition_failed");
    served.stop().await;
}

#[tokio::test]
async fn ranges_are_parts_of_one_version() {
    let served = Served::start(|_| {}).await;
    let bytes: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    let tag = served.stored("/objects/a", &bytes).await;
    for (range, part) in [
        ("bytes=0-0", 0..1),
        ("bytes=5-70000", 5..70_001),
        ("bytes=299999-", 299_999..300_000),
        ("bytes=-7", 299_993..300_000),
        ("bytes=-999999", 0..300_000),
        ("bytes=100-999999", 100..300_000),
    ] {
        let get = served.get("/objects/a", &[("range", range), ("if-range", &*tag)]).await;
        assert_eq!(get.status, 206, "{range}");
        let told = format!("bytes {}-{}/300000", part.start, part.end - 1);
        assert_eq!(get.header("content-range"), told);
        assert_eq!(get.header("content-length"), part.len().to_string());
        assert!(get.body == bytes[part], "{range}");
    }
    for range in ["bytes=300000-", "bytes=400000-500000", "bytes=-0"] {
        let get = served.get("/objects/a", &[("range", range)]).await;
        expect_error(&get, 416, "range_not_satisfiable");
        assert_eq!(get.header("content-range"), "bytes */300000");
    }
    let other = served.stored("/objects/b", b"b").await;
    for headers in [
        [("range", "bytes=2-1"), ("accept", "*/*")],
        [("range", "bytes=0-1,5-6"), ("accept", "*/*")],
        [("range", "lines=0-1"), ("accept", "*/*")],
        [("range", "bytes=0-1"), ("if-range", &*other)],
        [("range", "bytes=0-1"), ("if-range", "Sun, 06 Nov 1994 08:49:37 GMT")],
    ] {
        let get = served.get("/objects/a", &headers).await;
        assert_eq!((get.status.as_u16(), get.body.len()), (200, 300_000), "{headers:?}");
    }
    served.stop().await;
}

#[tokio::test]
async fn writes_obey_their_conditions() {
    let served = Served::start(|_| {}).await;
    let any = [("if-none-match", "*")];
    assert_eq!(served.put("/objects/a", &[("if-match", "*")], b"0").await.status, 412);
    assert_eq!(served.put("/objects/a", &any, b"1").await.status, 201);
    expect_error(&served.put("/objects/a", &any, b"2").await, 412, "precondition_failed");
    let tag = served.get("/objects/a", &[]).await.header("etag").to_owned();
    let updated = served.put("/objects/a", &[("if-match", &*tag)], b"3").await;
    assert_eq!(updated.status, 200);
    assert_eq!(served.put("/objects/a", &[("if-match", &*tag)], b"4").await.status, 412);
    let own = [("if-none-match", updated.header("etag"))];
    assert_eq!(served.put("/objects/a", &own, b"5").await.status, 412);
    // What is no ETag is nobody's.
    assert_eq!(served.put("/objects/a", &[("if-match", "nonsense")], b"6").await.status, 412);
    assert_eq!(&served.get("/objects/a", &[]).await.body[..], b"3");

    let stale = [("if-match", &*tag)];
    assert_eq!(served.ask(Method::DELETE, "/objects/a", &stale).await.status, 412);
    let current = [("if-match", updated.header("etag"))];
    assert_eq!(served.ask(Method::DELETE, "/objects/a", &current).await.status, 204);
    assert_eq!(served.ask(Method::DELETE, "/objects/a", &current).await.status, 412);
    served.stop().await;
}

#[tokio::test]
async fn concurrent_updates_of_one_version_succeed_once() {
    let served = Served::start(|_| {}).await;
    for round in 0..10 {
        let tag = served.stored("/objects/a", b"base").await;
        let headers = [("if-match", &*tag)];
        let puts = join_all((0..8).map(|n| {
            let body = format!("{round} {n}");
            let served = &served;
            async move { served.put("/objects/a", &headers, body.as_bytes()).await }
        }));
        let deletes = join_all((0..2).map(|_| served.ask(Method::DELETE, "/objects/a", &headers)));
        let (puts, deletes) = futures::join!(puts, deletes);
        let won: Vec<_> = puts.iter().chain(&deletes).filter(|a| a.status.is_success()).collect();
        assert_eq!(won.len(), 1, "{puts:?} {deletes:?}");
        let lost = puts.iter().chain(&deletes).filter(|answer| answer.status == 412).count();
        assert_eq!(lost, 9);
    }
    served.stop().await;
}
