//! Metrics and the dashboard: what they show, and which clients see it.
//!
//! Counters are those of the process, which other tests share: a test asserts that one grew.

use axum::http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vmem_service::{Config, DashboardAccess, Service};

use crate::support::{Served, expect_error};

async fn scraped(served: &Served) -> String {
    let answer = served.get("/metrics", &[]).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.header("content-type").starts_with("text/plain; version=0.0.4"));
    String::from_utf8(answer.body.to_vec()).unwrap()
}

/// The value of a series.
fn value(text: &str, series: &str) -> f64 {
    let lines = text.lines().filter_map(|line| line.rsplit_once(' '));
    let mut values = lines.filter(|(name, _)| *name == series).map(|(_, value)| value);
    values.next().map_or(0.0, |value| value.parse().unwrap())
}

#[tokio::test]
async fn metrics_have_the_store_and_count_requests_by_class() {
    let served = Served::start(|_| {}).await;
    let puts = "route=\"object\",method=\"PUT\",status=\"2xx\"";
    let total = format!("vmem_service_requests_total{{{puts}}}");
    let timed = format!("vmem_service_request_duration_seconds_count{{{puts}}}");
    let whole = format!("vmem_service_request_duration_seconds_bucket{{{puts},le=\"+Inf\"}}");
    let before = scraped(&served).await;
    for n in 0..3 {
        served.stored(&format!("/objects/secret-{n}"), &[1; 100_000]).await;
    }
    served.get("/objects/absent", &[]).await;
    let after = scraped(&served).await;
    for series in [&total, &timed, &whole] {
        assert!(value(&after, series) >= value(&before, series) + 3.0, "{series}\n{after}");
    }
    let absent =
        "vmem_service_requests_total{route=\"object\",method=\"GET\",status=\"4xx\"}".to_owned();
    assert!(value(&after, &absent) > value(&before, &absent), "{after}");
    assert!(value(&after, "vmem_tier_capacity_bytes{tier=\"host\"}") > 0.0, "{after}");
    assert!(after.contains("# TYPE vmem_service_request_duration_seconds histogram"), "{after}");
    assert!(after.contains("# TYPE vmem_objects gauge"), "{after}");
    assert!(!after.contains("secret"), "names of objects are no labels: {after}");
    served.stop().await;
}

#[tokio::test]
async fn metrics_are_as_long_after_many_names_and_methods() {
    let served = Served::start(|_| {}).await;
    let series =
        |text: String| text.lines().filter(|line| line.contains("_requests_total{")).count();
    for n in 0..50 {
        served.get(&format!("/objects/name-{n}"), &[]).await;
        served.get(&format!("/elsewhere-{n}"), &[]).await;
        let method = Method::from_bytes(format!("M{n}").as_bytes()).unwrap();
        served.ask(method, "/objects/a", &[]).await;
    }
    let text = scraped(&served).await;
    assert!(
        !text.contains("name-") && !text.contains("elsewhere") && !text.contains("M4"),
        "{text}"
    );
    // Eight routes, six methods and five classes are all that there may be.
    assert!(series(text) <= 8 * 6 * 5);
    served.stop().await;
}

#[tokio::test]
async fn metrics_refuse_other_origins_and_methods() {
    let served = Served::start(|_| {}).await;
    let own = format!("http://{}", served.service.local_addr());
    assert_eq!(served.get("/metrics", &[("origin", &own)]).await.status, 200);
    for origin in ["http://evil.example", "null", "http://127.0.0.1:1"] {
        let answer = served.get("/metrics", &[("origin", origin)]).await;
        assert_eq!(answer.status, 403, "{origin}");
        assert!(!String::from_utf8_lossy(&answer.body).contains("vmem_"), "{answer:?}");
    }
    for method in [Method::POST, Method::PUT, Method::DELETE] {
        expect_error(&served.ask(method, "/metrics", &[]).await, 405, "method_not_allowed");
    }
    for path in ["/metrics", "/healthz", "/readyz"] {
        let head = served.ask(Method::HEAD, path, &[]).await;
        assert_eq!((head.status.as_u16(), head.body.len()), (200, 0), "{path}");
    }
    served.stop().await;
}

#[tokio::test]
async fn dashboard_is_shown_to_names_of_this_machine() {
    let served = Served::start(|_| {}).await;
    served.stored("/objects/shown", b"hidden bytes").await;
    let page = served.get("/dashboard/", &[]).await;
    assert_eq!(page.status, 200, "{page:?}");
    assert!(page.header("content-type").starts_with("text/html"));
    let snapshot = served.get("/dashboard/snapshot", &[]).await;
    assert_eq!(snapshot.header("content-type"), "application/json");
    assert_eq!(served.get("/dashboard", &[]).await.header("location"), "/dashboard/");
    for headers in [[("host", "evil.example")], [("origin", "http://evil.example")]] {
        for path in ["/dashboard/", "/dashboard/snapshot", "/dashboard/stream"] {
            assert_eq!(served.get(path, &headers).await.status, 403, "{path} {headers:?}");
        }
    }
    for path in ["/dashboard/", "/dashboard/snapshot", "/dashboard/stream"] {
        for method in [Method::POST, Method::PUT, Method::DELETE] {
            assert_eq!(served.ask(method, path, &[]).await.status, 405, "{path}");
        }
    }
    served.stop().await;

    let served = Served::start(|config| {
        config.dashboard = DashboardAccess::All;
        config.names = vec!["proxy.example".to_owned()];
    })
    .await;
    let named = [("host", "proxy.example")];
    assert_eq!(served.get("/dashboard/", &named).await.status, 200);
    served.stop().await;
    let served = Served::start(|config| config.dashboard = DashboardAccess::Off).await;
    expect_error(&served.get("/dashboard/", &[]).await, 404, "unknown_path");
    served.stop().await;
}

/// An address of this machine that is not loopback, as another machine would see it.
pub(crate) fn other_address() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent: the system only chooses an address.
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

#[tokio::test]
async fn dashboard_refuses_peers_that_are_not_loopback() {
    let Some(address) = other_address() else {
        eprintln!("SKIPPED: there is no address but loopback here");
        return;
    };
    for (access, status) in [(DashboardAccess::Loopback, 403), (DashboardAccess::All, 200)] {
        let served = Served::start(|config| {
            config.listen = (address, 0).into();
            config.dashboard = access;
        })
        .await;
        // A name of this machine does not help.
        let answer = served.get("/dashboard/snapshot", &[("host", "localhost")]).await;
        assert_eq!(answer.status, status, "{answer:?}");
        if status == 403 {
            expect_error(&answer, 403, "loopback_only");
        }
        served.stop().await;
    }
}

#[tokio::test]
async fn open_dashboard_does_not_delay_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let mut config: Config = crate::support::config(directory.path());
    // Far longer than a test may take.
    config.limits.drain_timeout = std::time::Duration::from_secs(100_000);
    let service = Service::start(config, |_| axum::Router::new()).await.unwrap();
    let mut raw = TcpStream::connect(service.local_addr()).await.unwrap();
    let get = "GET /dashboard/stream HTTP/1.1\r\nhost: localhost\r\n\r\n";
    raw.write_all(get.as_bytes()).await.unwrap();
    let mut answer = vec![0; 15];
    raw.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 200 OK");
    let ending = tokio::spawn(service.shutdown());
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(crate::limits::BOUND, raw.read_to_end(&mut rest)).await;
    ended.expect("the stream ends").unwrap();
    ending.await.unwrap().unwrap();
}
