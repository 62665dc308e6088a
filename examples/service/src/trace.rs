//! The id and the span of each request.
//!
//! Invariant: a span has the method, the path, the id, and the caller's trace where there is one;
//! no query and no header besides, which may have secrets. Called by `routes`.

use std::time::Duration;

use axum::extract::Request;
use axum::http::{self, HeaderMap, HeaderName};
use axum::middleware::Next;
use axum::response::Response;
use opentelemetry::Context;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{SpanContext, TraceContextExt, TraceId, TraceState};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tower_http::request_id::RequestId;
use tower_http::trace::{DefaultOnResponse, OnResponse};
use tracing::Span;
use tracing::field::{Empty, display};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The header with the id.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
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

/// The span of a request, in the trace of its caller if there is one.
pub(crate) fn span(request: &Request) -> Span {
    let id = request.extensions().get::<RequestId>();
    let id = id.and_then(|id| id.header_value().to_str().ok()).unwrap_or_default();
    let span = tracing::info_span!(
        "request",
        otel.kind = "server",
        method = %request.method(),
        path = request.uri().path(),
        request_id = id,
        trace_id = Empty,
        parent_id = Empty,
        status = Empty,
        otel.status_code = Empty,
    );
    let caller = caller(request.headers());
    let parent = caller.span().span_context().clone();
    if parent.is_valid() {
        span.record("parent_id", display(parent.span_id()));
        // Refused where no span is sent to a collector.
        let _ = span.set_parent(caller);
    }
    let own = span.context().span().span_context().trace_id();
    let trace = if own == TraceId::INVALID { parent.trace_id() } else { own };
    if trace != TraceId::INVALID {
        span.record("trace_id", display(trace));
    }
    span
}

/// Records how a request was answered.
pub(crate) fn answered<B>(response: &http::Response<B>, latency: Duration, span: &Span) {
    span.record("status", response.status().as_u16());
    if response.status().is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
    DefaultOnResponse::new().on_response(response, latency, span);
}

/// Trace and span of the caller, as W3C Trace Context has them; its `tracestate` is not taken.
fn caller(headers: &HeaderMap) -> Context {
    let headers = HeaderExtractor(headers);
    let caller = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
    let span = caller.span().span_context().clone();
    if !span.is_valid() {
        return Context::new();
    }
    Context::new().with_remote_span_context(SpanContext::new(
        span.trace_id(),
        span.span_id(),
        span.trace_flags(),
        true,
        TraceState::default(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_of_callers_are_read_where_they_are_valid() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let span = "1234567890123456";
        let traceparent = HeaderName::from_static("traceparent");
        let of = |text: String| {
            let headers = HeaderMap::from_iter([(traceparent.clone(), text.parse().unwrap())]);
            let caller = caller(&headers);
            let caller = caller.span().span_context().clone();
            caller.is_valid().then(|| (caller.trace_id().to_string(), caller.span_id().to_string()))
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
