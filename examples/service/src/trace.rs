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
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use tower_http::request_id::RequestId;
use tower_http::trace::{DefaultOnResponse, OnResponse};
use tracing::field::{Empty, display};
use tracing::{Level, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::metrics::route_class;

/// The header with the id.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The header with the caller's span.
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

/// The span of a request, in the trace of its caller if there is one. That of a probe, a scrape or
/// the dashboard is for the log at `debug` alone.
pub(crate) fn span(request: &Request) -> Span {
    let id = request.extensions().get::<RequestId>();
    let id = id.and_then(|id| id.header_value().to_str().ok()).unwrap_or_default();
    let path = request.uri().path();
    // A level is constant where a span is written.
    macro_rules! request_span {
        ($level:expr) => {
            tracing::span!(
                $level,
                "request",
                otel.kind = "server",
                method = %request.method(),
                path,
                request_id = id,
                trace_id = Empty,
                parent_id = Empty,
                status = Empty,
                otel.status_code = Empty,
            )
        };
    }
    // What asks every few seconds, forever, is of no interest to a collector.
    let is_watching = matches!(route_class(path), "health" | "metrics" | "dashboard");
    let span = if is_watching { request_span!(Level::DEBUG) } else { request_span!(Level::INFO) };
    let caller = caller(request.headers());
    if let Some(parent) = &caller {
        span.record("parent_id", display(parent.span_id()));
        // Refused where no span is sent to a collector.
        let _ = span.set_parent(Context::new().with_remote_span_context(parent.clone()));
    }
    let own = span.context().span().span_context().trace_id();
    let theirs = caller.map_or(TraceId::INVALID, |parent| parent.trace_id());
    let trace = if own == TraceId::INVALID { theirs } else { own };
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
fn caller(headers: &HeaderMap) -> Option<SpanContext> {
    let mut all = headers.get_all(TRACEPARENT).into_iter();
    let text = all.next()?.to_str().ok()?;
    // Of two there is no saying which is the caller's.
    if all.next().is_some() { None } else { parse(text) }
}

/// By hand: the propagator of the SDK takes short ids, signs and versions of one digit, and so puts
/// requests of strangers into one trace.
fn parse(text: &str) -> Option<SpanContext> {
    let mut fields = text.splitn(5, '-');
    let mut field = |len| fields.next().filter(|field| is_hex(field, len));
    let version = field(2).filter(|version| *version != "ff")?;
    let trace = TraceId::from_hex(field(32)?).ok()?;
    let span = SpanId::from_hex(field(16)?).ok()?;
    let flags = u8::from_str_radix(field(2)?, 16).ok()?;
    // Later versions may have more.
    if version == "00" && fields.next().is_some() {
        return None;
    }
    let flags = TraceFlags::new(flags) & TraceFlags::SAMPLED;
    let caller = SpanContext::new(trace, span, flags, true, TraceState::default());
    caller.is_valid().then_some(caller)
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
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
            let caller = caller(&headers)?;
            let ids = (caller.trace_id().to_string(), caller.span_id().to_string());
            assert!(caller.is_remote());
            Some((ids, caller.is_sampled()))
        };
        let read = |sampled| Some(((trace.to_owned(), span.to_owned()), sampled));
        assert_eq!(of(format!("00-{trace}-{span}-01")), read(true));
        assert_eq!(of(format!("00-{trace}-{span}-00")), read(false));
        assert_eq!(of(format!("00-{trace}-{span}-ff")), read(true));
        assert_eq!(of(format!("01-{trace}-{span}-01-more")), read(true));
        assert_eq!(of(format!("01-{trace}-{span}-01")), read(true));
        for text in [
            "00-1-1-01".to_owned(),
            format!("00-{}-{span}-01", &trace[1..]),
            format!("00-{trace}-{}-01", &span[1..]),
            format!("00-+{}-{span}-01", &trace[1..]),
            format!("00-{trace}-+{}-01", &span[1..]),
            format!("0-{trace}-{span}-01"),
            format!("+0-{trace}-{span}-01"),
            format!("000-{trace}-{span}-01"),
            format!("00-{trace}-{span}-1"),
            format!("00-{trace}-{span}-+1"),
            format!("00-{trace}-{span}-001"),
            format!("00-{trace}-{span}"),
            format!("00-{trace}0-{span}-01"),
            format!("00-{trace}-{}-01", span.replace('1', "A")),
            format!("01-{trace}-{span}-01more"),
            format!("00-{trace}-{span}-01-"),
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
        let mut two = HeaderMap::new();
        for _ in 0..2 {
            two.append(TRACEPARENT, format!("00-{trace}-{span}-01").parse().unwrap());
        }
        assert_eq!(caller(&two), None);
    }
}
