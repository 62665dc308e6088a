//! What the service and its store do, in the text format of Prometheus.
//!
//! Invariant: a label has one of a few values that stand here, and never a part of a request: the
//! answer is as long after a million names as after one. A request is timed from its headers to
//! those of its answer. Called by `server`, and for each request.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{Method, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics::{Unit, counter, gauge, histogram};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::sync::watch;
use tokio::time::timeout;
use vmem::VirtualMemory;

use crate::error::ApiError;
use crate::limits::charged;
use crate::routes::wrong_method;
use crate::state::{App, Shared};

/// Scrapes at once, to the end of their answers; others get 503.
pub(crate) const SCRAPES_MAX: usize = 4;
/// How often samples of histograms are put into their buckets where nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);
/// The bounds of the buckets of all histograms, in seconds.
const BUCKETS: [f64; 14] =
    [1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 2.5, 10.0];

const REQUESTS: &str = "vmem_service_requests_total";
const DURATION: &str = "vmem_service_request_duration_seconds";
const IN_FLIGHT: &str = "vmem_service_requests_in_flight";

/// The recorder of the process, installed at the first call.
///
/// # Errors
///
/// If the process has one of another kind.
pub(crate) fn recorder() -> anyhow::Result<PrometheusHandle> {
    static INSTALLED: Mutex<Option<PrometheusHandle>> = Mutex::new(None);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = &*installed {
        return Ok(handle.clone());
    }
    let recorder = PrometheusBuilder::new().set_buckets(&BUCKETS)?.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).ok().context("metrics are recorded elsewhere")?;
    vmem::metrics::describe();
    metrics::describe_counter!(REQUESTS, Unit::Count, "Requests that were answered.");
    let help = "From the headers of a request to those of its answer, the request's body included.";
    metrics::describe_histogram!(DURATION, Unit::Seconds, help);
    let help = "Requests under way that count against `max_requests`.";
    metrics::describe_gauge!(IN_FLIGHT, Unit::Count, help);
    Ok(installed.insert(handle).clone())
}

/// Keeps the memory of histograms bounded until the service is about to end, and what is left to
/// publish small, though nobody scrapes.
pub(crate) async fn upkeep(
    vmem: VirtualMemory,
    recorder: PrometheusHandle,
    mut closing: watch::Receiver<bool>,
) {
    while timeout(UPKEEP, closing.wait_for(|closes| *closes)).await.is_err() {
        vmem.publish_metrics();
        recorder.run_upkeep();
    }
}

/// The route `/metrics`.
pub(crate) fn router(app: App, recorder: PrometheusHandle) -> Router {
    Router::new()
        .route("/metrics", get(scrape))
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn(vmem_dashboard::same_origin))
        .with_state((app, recorder))
}

async fn scrape(
    State((app, recorder)): State<(Arc<Shared>, PrometheusHandle)>,
) -> Result<Response, ApiError> {
    let full = |_| ApiError::unavailable("busy", "as many scrapes as may be are under way");
    let slot = app.scrapes.clone().try_acquire_owned().map_err(full)?;
    app.vmem.publish_metrics();
    let in_flight = app.limits.max_requests - app.requests.available_permits();
    gauge!(IN_FLIGHT).set(in_flight as f64);
    let headers = [(CONTENT_TYPE, "text/plain; version=0.0.4"), (CACHE_CONTROL, "no-store")];
    let text = recorder.render().into_bytes();
    Ok((StatusCode::OK, headers, charged(text, slot)).into_response())
}

/// Counts a request and its time.
pub(crate) async fn measure(request: Request, next: Next) -> Response {
    let route = route_class(request.uri().path());
    let method = method_class(request.method());
    let began = Instant::now();
    let response = next.run(request).await;
    let labels =
        [("route", route), ("method", method), ("status", status_class(response.status()))];
    counter!(REQUESTS, &labels).increment(1);
    histogram!(DURATION, &labels).record(began.elapsed());
    response
}

/// What a path is, by its first part.
pub(crate) fn route_class(path: &str) -> &'static str {
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    match first {
        "objects" if path == "/objects" => "listing",
        "objects" => "object",
        "prefetch" => "prefetch",
        "pins" => "pin",
        "healthz" | "readyz" => "health",
        "metrics" => "metrics",
        "dashboard" => "dashboard",
        _ => "other",
    }
}

fn method_class(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::POST => "POST",
        _ => "other",
    }
}

fn status_class(status: StatusCode) -> &'static str {
    match status.as_u16() / 100 {
        2 => "2xx",
        3 => "3xx",
        4 => "4xx",
        5 => "5xx",
        _ => "other",
    }
}
