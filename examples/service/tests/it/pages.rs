//! Pages of other origins, names that lead here, and pages that are stored here.

use axum::http::Method;

use crate::seeing::other_address;
use crate::support::{Served, exchange, expect_error};

/// A page that makes its own name lead to loopback is of the same origin as what it asks there.
#[tokio::test]
async fn loopback_service_refuses_names_of_others() {
    let served = Served::start(|config| config.names = vec!["objects.example".to_owned()]).await;
    served.stored("/objects/a", b"secret").await;
    for host in ["evil.example", "evil.example:8080", "192.0.2.1", "objects.example.evil.example"] {
        for (method, path) in [
            (Method::GET, "/objects/a"),
            (Method::GET, "/objects"),
            (Method::PUT, "/objects/a"),
            (Method::DELETE, "/objects/a"),
            (Method::POST, "/pins/a"),
            (Method::GET, "/metrics"),
            (Method::GET, "/readyz"),
            (Method::GET, "/elsewhere"),
        ] {
            let refused = served.ask(method.clone(), path, &[("host", host)]).await;
            expect_error(&refused, 403, "foreign_origin");
            assert!(!String::from_utf8_lossy(&refused.body).contains("secret"), "{refused:?}");
        }
    }
    for host in ["localhost:8080", "127.0.0.1", "[::1]:1", "objects.example:80", "Objects.Example"]
    {
        let got = served.get("/objects/a", &[("host", host)]).await;
        assert_eq!(&got.body[..], b"secret", "{host}");
    }
    served.stop().await;
}

/// Where it does not listen on loopback it goes by `names`, if it has any.
#[tokio::test]
async fn service_with_names_refuses_those_of_others() {
    let Some(address) = other_address() else {
        eprintln!("SKIPPED: there is no address but loopback here");
        return;
    };
    for names in [vec![], vec!["objects.example".to_owned()]] {
        let has_names = !names.is_empty();
        let served = Served::start(|config| {
            config.listen = (address, 0).into();
            config.names = names;
        })
        .await;
        served.stored("/objects/a", b"a").await;
        let by_address = served.service.local_addr().to_string();
        for host in ["objects.example", "localhost", "192.0.2.1:80", "[2001:db8::1]", &by_address] {
            let got = served.get("/objects/a", &[("host", host)]).await;
            assert_eq!(&got.body[..], b"a", "{host}");
        }
        for host in ["evil.example", "192.0.2.1.evil.example"] {
            for (method, path) in [
                (Method::GET, "/objects/a"),
                (Method::GET, "/metrics"),
                (Method::PUT, "/objects/a"),
                (Method::DELETE, "/objects/b"),
            ] {
                let origin = format!("http://{host}");
                let headers = [("host", host), ("origin", &*origin), ("content-length", "0")];
                let answer = served.ask(method, path, &headers).await;
                match has_names {
                    true => expect_error(&answer, 403, "foreign_origin"),
                    false => assert_ne!(answer.status, 403, "{host}: {answer:?}"),
                }
            }
        }
        served.stop().await;
    }
}

/// A form, or a script without a look at the answer, needs no leave of the service.
#[tokio::test]
async fn changes_that_pages_of_others_ask_for_are_refused() {
    let served = Served::start(|config| config.names = vec!["objects.example".to_owned()]).await;
    served.stored("/objects/a", b"a").await;
    let own = format!("http://{}", served.service.local_addr());
    for (name, value) in [
        ("origin", "http://evil.example"),
        ("origin", "null"),
        ("origin", "http://localhost:1"),
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-site", "same-site"),
    ] {
        for (method, path) in [
            (Method::POST, "/pins/a"),
            (Method::POST, "/prefetch/a"),
            (Method::DELETE, "/pins/a"),
            (Method::PUT, "/objects/a"),
            (Method::DELETE, "/objects/a"),
        ] {
            let headers = [(name, value), ("content-length", "0")];
            expect_error(&served.ask(method, path, &headers).await, 403, "foreign_origin");
        }
    }
    assert_eq!(&served.get("/objects/a", &[]).await.body[..], b"a");
    for origin in [&*own, "https://objects.example"] {
        let pinned = served.ask(Method::POST, "/pins/a", &[("origin", origin)]).await;
        assert_eq!(pinned.status, 200, "{origin}: {pinned:?}");
    }
    served.stop().await;
}

#[tokio::test]
async fn stored_pages_have_no_rights_of_this_origin() {
    let served = Served::start(|_| {}).await;
    let page = [("content-type", "text/html")];
    served.put("/objects/page", &page, b"<script>alert(1)</script>").await;
    let range = [("range", "bytes=0-3")];
    let whole = served.get("/objects/page", &[]).await;
    let part = served.get("/objects/page", &range).await;
    let head = served.ask(Method::HEAD, "/objects/page", &[]).await;
    for answer in [whole, part, head] {
        assert_eq!(answer.header("content-security-policy"), "sandbox", "{answer:?}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff", "{answer:?}");
    }
    served.stop().await;
}

#[tokio::test]
async fn requests_without_one_host_are_refused() {
    let served = Served::start(|_| {}).await;
    for (hosts, version, status) in [
        ("", "1.1", 400),
        ("host: localhost\r\nhost: localhost\r\n", "1.1", 400),
        ("host: localhost\r\nhost: evil.example\r\n", "1.1", 400),
        ("host: local host\r\n", "1.1", 400),
        ("host: localhost\r\n", "1.1", 200),
        ("host: localhost\r\n", "1.0", 200),
        ("", "1.0", 200),
    ] {
        let text = format!("GET /healthz HTTP/{version}\r\n{hosts}connection: close\r\n\r\n");
        let answer = exchange(&served, &text).await;
        assert!(answer.starts_with(&format!("HTTP/{version} {status} ")), "{hosts:?}: {answer}");
        assert_eq!(answer.contains("invalid_host"), status == 400, "{answer}");
    }
    served.stop().await;
}
