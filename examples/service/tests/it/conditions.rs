//! ETags, dates and ranges.

use axum::http::Method;
use futures::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

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

/// The date was ignored, and a client with nothing else overwrote what it had not seen.
#[tokio::test]
async fn writes_obey_the_date_that_they_expect() {
    let served = Served::start(|_| {}).await;
    let long_ago = "Sun, 06 Nov 1994 08:49:37 GMT";
    let stale = [("if-unmodified-since", long_ago)];
    // Where there is no object there is no date to compare with.
    assert_eq!(served.put("/objects/a", &stale, b"1").await.status, 201);
    let got = served.get("/objects/a", &[]).await;
    let tag = got.header("etag");
    let modified = got.header("last-modified");
    expect_error(&served.put("/objects/a", &stale, b"2").await, 412, "precondition_failed");
    let delete = served.ask(Method::DELETE, "/objects/a", &stale).await;
    expect_error(&delete, 412, "precondition_failed");
    assert_eq!(&served.get("/objects/a", &[]).await.body[..], b"1");
    // With If-None-Match both have to hold.
    let both = [stale[0], ("if-none-match", "\"1-other\"")];
    assert_eq!(served.put("/objects/a", &both, b"3").await.status, 412);
    // An ETag goes before it, and what is no date is none.
    let with_tag = [stale[0], ("if-match", tag)];
    let current = [("if-unmodified-since", modified)];
    assert_eq!(served.put("/objects/a", &current, b"4").await.status, 200);
    assert_eq!(served.put("/objects/a", &with_tag, b"5").await.status, 412);
    let tag = served.get("/objects/a", &[]).await.header("etag").to_owned();
    let with_tag = [stale[0], ("if-match", &*tag)];
    assert_eq!(served.put("/objects/a", &with_tag, b"6").await.status, 200);
    let no_date = [("if-unmodified-since", "yesterday")];
    assert_eq!(served.put("/objects/a", &no_date, b"7").await.status, 200);
    let late = [("if-unmodified-since", "Fri, 31 Dec 2100 00:00:00 GMT")];
    assert_eq!(served.ask(Method::DELETE, "/objects/a", &late).await.status, 204);
    served.stop().await;
}

#[tokio::test]
async fn put_of_a_part_is_refused() {
    let served = Served::start(|_| {}).await;
    served.stored("/objects/a", b"whole").await;
    let part = served.put("/objects/a", &[("content-range", "bytes 0-0/5")], b"W").await;
    expect_error(&part, 400, "partial_put");
    assert_eq!(&served.get("/objects/a", &[]).await.body[..], b"whole");
    served.stop().await;
}

/// All begin from one version, which the date allows to each: it is the version that decides.
#[tokio::test]
async fn concurrent_updates_with_one_date_succeed_once() {
    let served = Served::start(|_| {}).await;
    let late = [("if-unmodified-since", "Fri, 31 Dec 2100 00:00:00 GMT"), ("content-length", "4")];
    let mut lost = 0;
    for round in 0..10 {
        served.stored("/objects/a", b"base").await;
        // Each has looked at the object once it lets its client send.
        let begun = join_all((0..4).map(|_| served.unfinished_put_to("/objects/a", &late))).await;
        let answers = join_all(begun.into_iter().map(|mut raw| async move {
            raw.write_all(b"next").await.unwrap();
            let mut answer = [0; 12];
            raw.read_exact(&mut answer).await.unwrap();
            String::from_utf8_lossy(&answer).into_owned()
        }))
        .await;
        let won = answers.iter().filter(|answer| *answer == "HTTP/1.1 200").count();
        lost += answers.iter().filter(|answer| *answer == "HTTP/1.1 412").count();
        assert_eq!(won, 1, "{round}: {answers:?}");
    }
    assert_eq!(lost, 30);
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
