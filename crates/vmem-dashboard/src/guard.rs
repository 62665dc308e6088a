//! Which requests are answered.
//!
//! Invariant: a page of another origin gets nothing, neither by a script nor by a name that is made
//! to lead here (DNS rebinding). Methods but `GET` and `HEAD` are refused by the routes. Called for
//! each request.

use std::net::IpAddr;

use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// Refuses what a page of another origin asks for; for `axum::middleware::from_fn`.
pub async fn same_origin(request: Request, next: Next) -> Response {
    if is_foreign(request.headers(), host_of(&request)) {
        return (StatusCode::FORBIDDEN, "asked for by a page of another origin\n").into_response();
    }
    next.run(request).await
}

/// Refuses what is asked of a name that is not of this machine; for `axum::middleware::from_fn`.
pub async fn local_names(request: Request, next: Next) -> Response {
    if !host_of(&request).is_some_and(is_local) {
        return (StatusCode::FORBIDDEN, "not a name of this machine\n").into_response();
    }
    next.run(request).await
}

/// What the request calls this server, with its port.
fn host_of(request: &Request) -> Option<&str> {
    let named = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    named.or_else(|| request.uri().authority().map(|authority| authority.as_str()))
}

fn is_foreign(headers: &HeaderMap, host: Option<&str>) -> bool {
    // A browser says so itself. Following a link from elsewhere to the page is no harm.
    let says = |name: &str, value: &str| headers.get(name).is_some_and(|has| has == value);
    let elsewhere = says("sec-fetch-site", "cross-site") || says("sec-fetch-site", "same-site");
    if elsewhere && !says("sec-fetch-mode", "navigate") {
        return true;
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return false };
    let origin = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
    let authority = origin.as_ref().and_then(|origin| origin.authority());
    authority.is_none_or(|authority| Some(authority.as_str()) != host)
}

fn is_local(host: &str) -> bool {
    // An address in brackets has colons of its own.
    let end = host.rfind(']').map_or_else(|| host.find(':'), |at| Some(at + 1));
    let name = &host[..end.unwrap_or(host.len())];
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || address.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|&(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn request_of_another_origin_is_foreign() {
        let own = Some("stats.example:8080");
        for origin in ["http://evil.example", "null", "http://stats.example", "\u{e9}"] {
            assert!(is_foreign(&headers(&[("origin", origin)]), own), "{origin}");
        }
        assert!(is_foreign(&headers(&[("origin", "http://stats.example:8080")]), None));
        assert!(is_foreign(&headers(&[("sec-fetch-site", "cross-site")]), own));
        assert!(!is_foreign(&headers(&[("origin", "http://stats.example:8080")]), own));
        assert!(!is_foreign(&headers(&[]), own));
        let link = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate")];
        assert!(!is_foreign(&headers(&link), own));
    }

    #[test]
    fn names_of_this_machine_are_told_from_others() {
        for host in ["localhost", "LOCALHOST:1", "127.0.0.1:3580", "127.9.9.9", "[::1]:3580"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["", "evil.example", "10.0.0.1:3580", "localhost.evil.example", "[::2]", "::"] {
            assert!(!is_local(host), "{host}");
        }
    }
}
