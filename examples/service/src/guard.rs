//! Which requests are answered at all: what they call this service, and which pages make them.
//!
//! Invariant: a page of another origin changes nothing; and while the service listens on loopback,
//! or `names` says what it is called, it answers to its own names, to those of this machine and to
//! addresses, so that no page reads it under a name that was made to lead here (DNS rebinding).
//! Called by `routes`, for each request.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::header::{HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{Extensions, HeaderMap, Method, StatusCode, Uri, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;
use crate::state::App;

/// Marks a response of what lies behind the guards.
#[derive(Clone, Copy, Debug)]
struct Passed;

/// Marks responses, so that `refuse` knows which are of the guards.
pub(crate) async fn pass(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    response.extensions_mut().insert(Passed);
    response
}

/// Says why a guard refused a request, in the words of this service.
pub(crate) async fn refuse(request: Request, next: Next) -> Response {
    if let Err(error) = check_host(request.version(), request.headers()) {
        return error.into_response();
    }
    let response = next.run(request).await;
    let passed = |extensions: &Extensions| extensions.get::<Passed>().is_some();
    if response.status() != StatusCode::FORBIDDEN || passed(response.extensions()) {
        return response;
    }
    let why = "asked for under a name, or by a page, that is not of this service: see `names`";
    ApiError::new(StatusCode::FORBIDDEN, "foreign_origin", why).into_response()
}

/// Refuses names that are not of this machine, and not configured: on a loopback address, and
/// wherever names are configured. An address is no name, and cannot be made to lead elsewhere.
pub(crate) async fn own_names(State(app): State<App>, request: Request, next: Next) -> Response {
    // Programs of HTTP/1.0 name no host; a page always does.
    let Some(host) = request.headers().get(HOST) else { return next.run(request).await };
    let is_own = |host: &str| {
        app.is_own_name(host) || !app.is_loopback && (!app.has_names() || is_address(host))
    };
    if host.to_str().is_ok_and(is_own) {
        return next.run(request).await;
    }
    vmem_dashboard::local_names(request, next).await
}

/// Refuses changes that a page of another origin asks for.
pub(crate) async fn own_pages(State(app): State<App>, request: Request, next: Next) -> Response {
    let only_reads = matches!(*request.method(), Method::GET | Method::HEAD);
    let origin = request.headers().get(ORIGIN).and_then(|origin| origin.to_str().ok());
    let origin = origin.and_then(|origin| origin.parse::<Uri>().ok());
    let origin = origin.as_ref().and_then(|origin| origin.authority());
    if only_reads || origin.is_some_and(|origin| app.is_own_name(origin.as_str())) {
        return next.run(request).await;
    }
    vmem_dashboard::same_origin(request, next).await
}

/// One valid Host, as RFC 9112, section 3.2 has it.
fn check_host(version: Version, headers: &HeaderMap) -> Result<(), ApiError> {
    let mut hosts = headers.get_all(HOST).into_iter();
    let is_valid = match (hosts.next(), hosts.next()) {
        (None, _) => version < Version::HTTP_11,
        (Some(host), None) => host.to_str().is_ok_and(is_host),
        (Some(_), Some(_)) => false,
    };
    let why = "a request has one Host header, with a name or an address and no more than a port";
    if is_valid { Ok(()) } else { Err(ApiError::bad_request("invalid_host", why)) }
}

/// Whether a Host header, which may have a port, names an address.
fn is_address(host: &str) -> bool {
    let Ok(host) = host.parse::<Authority>() else { return false };
    let host = host.host();
    let inside = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    inside.parse::<IpAddr>().is_ok()
}

fn is_host(text: &str) -> bool {
    text.is_empty() || (!text.contains('@') && text.parse::<Authority>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_valid_host_is_asked_for() {
        let of = |version, hosts: &[&str]| {
            let mut headers = HeaderMap::new();
            for host in hosts {
                headers.append(HOST, host.parse().unwrap());
            }
            check_host(version, &headers).is_ok()
        };
        for host in ["a", "a.example:80", "127.0.0.1:1", "[::1]:8080", ""] {
            assert!(of(Version::HTTP_11, &[host]), "{host}");
        }
        for host in ["a b", "a/b", "user@a", "\u{e9}"] {
            assert!(!of(Version::HTTP_11, &[host]), "{host}");
        }
        assert!(!of(Version::HTTP_11, &[]));
        assert!(of(Version::HTTP_10, &[]));
        for version in [Version::HTTP_10, Version::HTTP_11] {
            assert!(!of(version, &["a", "a"]));
        }
    }
}
