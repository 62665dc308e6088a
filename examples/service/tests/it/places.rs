//! Pins and prefetches.

use std::time::Duration;

use axum::http::Method;
use vmem::MemoryTier;

use crate::support::{Served, expect_error, json};

#[tokio::test]
async fn pins_end_by_delete_by_time_and_by_replacement() {
    let served = Served::start(|_| {}).await;
    let store = served.service.store().clone();
    served.stored("/objects/a", &[1; 300_000]).await;
    let pinned = served.ask(Method::POST, "/pins/a?seconds=3600", &[]).await;
    assert_eq!(pinned.status, 200, "{pinned:?}");
    let listed = json(&served.get("/pins", &[]).await);
    assert_eq!((&listed[0]["name"], &listed[0]["tier"]), (&"a".into(), &"host".into()));
    assert!(store.stats().pinned_bytes > 0);
    assert_eq!(served.ask(Method::DELETE, "/pins/a", &[]).await.status, 204);
    assert_eq!(store.stats().pinned_bytes, 0);
    expect_error(&served.ask(Method::DELETE, "/pins/a", &[]).await, 404, "not_pinned");

    served.ask(Method::POST, "/pins/a?seconds=1", &[]).await;
    while json(&served.get("/pins", &[]).await) != serde_json::json!([]) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(store.stats().pinned_bytes, 0);

    served.ask(Method::POST, "/pins/a", &[]).await;
    served.stored("/objects/a", b"other").await;
    assert_eq!(json(&served.get("/pins", &[]).await), serde_json::json!([]));
    served.ask(Method::POST, "/pins/a", &[]).await;
    served.ask(Method::DELETE, "/objects/a", &[]).await;
    assert_eq!(json(&served.get("/pins", &[]).await), serde_json::json!([]));
    served.stop().await;
}

#[tokio::test]
async fn bad_pins_and_prefetches_are_refused() {
    let served = Served::start(|config| config.limits.max_pins = 1).await;
    served.stored("/objects/a", b"a").await;
    served.stored("/objects/b", b"b").await;
    for path in ["/pins/a", "/prefetch/a"] {
        for query in ["seconds=0", "seconds=99999999", "tier=tape", "seconds=x", "second=1"] {
            let answer = served.ask(Method::POST, &format!("{path}?{query}"), &[]).await;
            expect_error(&answer, 400, "invalid_query");
        }
        let answer = served.ask(Method::POST, &format!("{path}?tier=vram"), &[]).await;
        let is_pin = path == "/pins/a";
        assert_eq!(answer.status, if is_pin { 400 } else { 202 }, "{answer:?}");
        let absent = path.replace("/a", "/absent");
        expect_error(&served.ask(Method::POST, &absent, &[]).await, 404, "not_found");
    }
    for (method, path) in
        [(Method::POST, "/pins/"), (Method::DELETE, "/pins/"), (Method::POST, "/prefetch/")]
    {
        expect_error(&served.ask(method, path, &[]).await, 400, "invalid_name");
    }
    assert_eq!(served.ask(Method::POST, "/pins/a", &[]).await.status, 200);
    let second = served.ask(Method::POST, "/pins/b", &[]).await;
    expect_error(&second, 503, "too_many_pins");
    assert!(!second.header("retry-after").is_empty());
    served.stop().await;
}

#[tokio::test]
async fn prefetch_promotes_behind_its_answer() {
    let served = Served::start(|_| {}).await;
    let store = served.service.store().clone();
    served.stored("/objects/a", &[1; 600_000]).await;
    let handle = store.open_named("a").await.unwrap();
    store.demote(&handle, MemoryTier::Disk).await.unwrap();
    let answer = served.ask(Method::POST, "/prefetch/a", &[]).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    while store.residency(&handle).unwrap().current_tier() != Some(MemoryTier::Host) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(handle);
    served.stop().await;
}
