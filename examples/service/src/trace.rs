//! The id and the span of each request.
//!
//! Invariant: a span has the method, the path, the id, and the caller's trace where there is one;
//! no query and no header besides, which may have secrets. Called by `routes`.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName};
use axum::middleware::Next;
use axum::response::Response;
use tower_http::request_id::RequestId;
use tracing::Span;

/// The header with the id.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The header with the trace of the caller.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// The longest id that a client may choose.
const ID_LEN_MAX: usize = 64;

/// Forgets an id that a log had better not have; the request gets another one.
pub(crate) async fn check_id(mut request: Request, next: Next) -> Response {
    let is_plain = |letter: u8| letter.is_ascii_alphanumeric() || b"-_.".contains(&letter);
    let id = request.headers().get(REQUEST_ID).map(|id| id.as_bytes());
    let is_good =
        |id: &[u8]| !id.is_empty() && id.len() <= ID_LEN_MAX && id.iter().copied().all(is_plain);
    if !id.is_none_or(is_good) {
        request.headers_mut().remove(REQUEST_ID);
    }
    next.run(request).await
}

/// The span of a request.
pub(crate) fn span(request: &Request) -> Span {
    let id = request.extensions().get::<RequestId>();
    let id = id.and_then(|id| id.header_value().to_str().ok()).unwrap_or_default();
    let (trace_id, parent_id) = parent(request.headers()).unwrap_or_default();
    tracing::info_span!(
        "request",
        method = %request.method(),
        path = request.uri().path(),
        request_id = id,
        trace_id,
        parent_id,
    )
}

/// Trace and span of the caller, as W3C Trace Context has them.
fn parent(headers: &HeaderMap) -> Option<(&str, &str)> {
    let text = headers.get(TRACEPARENT)?.to_str().ok()?;
    let mut parts = text.split('-');
    let version = parts.next()?;
    let trace = parts.next()?;
    let span = parts.next()?;
    let flags = parts.next()?;
    let is_hex = |text: &str, len| {
        text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_set = |text: &str| text.bytes().any(|digit| digit != b'0');
    let is_valid = is_hex(version, 2)
        && version != "ff"
        && is_hex(trace, 32)
        && is_hex(span, 16)
        && is_hex(flags, 2)
        && is_set(trace)
        && is_set(span)
        // The first version has nothing behind the flags.
        && (version != "00" || parts.next().is_none());
    is_valid.then_some((trace, span))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_of_callers_are_read_where_they_are_valid() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let span = "1234567890123456";
        let of = |text: String| {
            let headers = HeaderMap::from_iter([(TRACEPARENT, text.parse().unwrap())]);
            parent(&headers).map(|(trace, span)| (trace.to_owned(), span.to_owned()))
        };
        let read = Some((trace.to_owned(), span.to_owned()));
        assert_eq!(of(format!("00-{trace}-{span}-01")), read);
        assert_eq!(of(format!("01-{trace}-{span}-01-more")), read);
        for text in [
            format!("00-{trace}-{span}-01-more"),
            format!("ff-{trace}-{span}-01"),
            format!("00-{}-{span}-01", "0".repeat(32)),
            format!("00-{trace}-{}-01", "0".repeat(16)),
            format!("00-{}-{span}-01", trace.to_uppercase()),
            "00".to_owned(),
            String::new(),
        ] {
            assert_eq!(of(text.clone()), None, "{text}");
        }
    }
}
