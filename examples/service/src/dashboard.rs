//! The live page over the store, below `/dashboard/`.
//!
//! Invariant: it is read-only, and unless the configuration says otherwise, a client of another
//! machine or under a name of another machine does not see it. A page that is open does not delay
//! the end of the service. Called by `server`.

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use futures::StreamExt;

use crate::config::DashboardAccess;
use crate::error::ApiError;
use crate::limits::Peer;
use crate::routes::wrong_method;
use crate::state::App;

/// The routes below `/dashboard/`, if there is to be such a page.
pub(crate) fn router(app: &App, access: DashboardAccess) -> Router {
    if access == DashboardAccess::Off {
        return Router::new();
    }
    let page = Router::new()
        .nest("/dashboard/", vmem_dashboard::router(app.vmem.clone()))
        // The page asks for what lies beside it.
        .route("/dashboard", get(|| async { Redirect::permanent("/dashboard/") }))
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), end_at_shutdown));
    match access {
        DashboardAccess::Loopback => {
            page.layer(from_fn(vmem_dashboard::local_names)).layer(from_fn(loopback_alone))
        }
        _ => page,
    }
}

/// Refuses clients of other machines.
async fn loopback_alone(request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>();
    if peer.is_none_or(|peer| !peer.0.ip().to_canonical().is_loopback()) {
        let why = "the dashboard is shown to this machine alone: see `dashboard` in the README";
        return ApiError::new(StatusCode::FORBIDDEN, "loopback_only", why).into_response();
    }
    next.run(request).await
}

/// Ends the stream of a page, which has no end of its own.
async fn end_at_shutdown(State(app): State<App>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let mut closing = app.closing();
    let closes = async move { drop(closing.wait_for(|closes| *closes).await) };
    let stream = |body: Body| body.into_data_stream().take_until(Box::pin(closes));
    response.map(|body| Body::from_stream(stream(body)))
}
