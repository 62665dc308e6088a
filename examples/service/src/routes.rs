//! What leads where.
//!
//! Invariant: every answer has the id of its request, and every error a body that says why. The
//! limits hold for objects, listings, pins and prefetches; metrics and the dashboard have limits of
//! their own, and health has none. Called by `server`.

use axum::Router;
use axum::http::StatusCode;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tower_http::trace::{DefaultOnFailure, TraceLayer};
use tracing::Level;

use crate::error::ApiError;
use crate::limits::limit;
use crate::linger::linger;
use crate::metrics::measure;
use crate::state::App;
use crate::trace::{REQUEST_ID, answered, check_id, span};
use crate::{get as read, guard, health, list, pins, put};

/// All routes; `mounted` are others than those of objects, such as metrics.
pub(crate) fn router(app: App, mounted: Router) -> Router {
    let objects = get(read::get).head(read::head).put(put::put).delete(put::delete);
    let limited = Router::new()
        .route("/objects", get(list::list))
        .route("/objects/{*name}", objects)
        .route("/objects/", get(empty_name).put(empty_name).delete(empty_name))
        .route("/prefetch/{*name}", post(pins::prefetch))
        .route("/prefetch/", post(empty_name))
        .route("/pins", get(pins::pins))
        .route("/pins/{*name}", post(pins::pin).delete(pins::unpin))
        .route("/pins/", post(empty_name).delete(empty_name))
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), limit));
    Router::new()
        .merge(limited)
        .route("/healthz", get(health::healthz))
        .route("/readyz", get(health::readyz))
        .with_state(app.clone())
        .merge(mounted)
        .fallback(unknown_path)
        // The last one is the first that a request meets.
        .layer(from_fn(guard::pass))
        .layer(from_fn_with_state(app.clone(), guard::own_pages))
        .layer(from_fn_with_state(app, guard::own_names))
        .layer(from_fn(guard::refuse))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(linger))
        .layer(from_fn(measure))
        .layer(
            TraceLayer::new_for_http()
                .make_span_with(span)
                .on_response(answered)
                .on_failure(DefaultOnFailure::new().level(Level::DEBUG)),
        )
        .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
        .layer(from_fn(check_id))
}

async fn empty_name() -> ApiError {
    ApiError::bad_request("invalid_name", "a name has one byte at least")
}

async fn unknown_path() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "unknown_path", "nothing is at this path")
}

pub(crate) async fn wrong_method() -> ApiError {
    let why = "this path does not have this method";
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", why)
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> axum::response::Response {
    tracing::error!("a handler panicked");
    axum::response::IntoResponse::into_response(ApiError::internal())
}
