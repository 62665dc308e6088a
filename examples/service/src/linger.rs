//! Bodies of requests that are refused.
//!
//! Invariant: a connection that is closed with bytes unread loses the answer, which the client then
//! sees as a reset. So before an answer that is an error the body is read on, up to a number of
//! bytes and a time, whatever refused the request; a client that waits for leave to send gets none.
//! Called by `routes`, for each request.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::header::EXPECT;
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::timeout;

/// What is read of a body that nobody wants, and for how long.
const BYTES: usize = 16 << 20;
const TIME: Duration = Duration::from_secs(5);

/// Answers a request, and reads what an error leaves of its body.
pub(crate) async fn linger(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let waits = request.headers().contains_key(EXPECT);
    let (parts, body) = request.into_parts();
    let shared = Arc::new(Mutex::new(Shared { body, is_begun: false }));
    let lent = Body::new(Lent(shared.clone()));
    let response = next.run(Request::from_parts(parts, lent)).await;
    let status = response.status();
    if (status.is_client_error() || status.is_server_error()) && (shared.lock().is_begun || !waits)
    {
        let _ = timeout(TIME, discard(Body::new(Lent(shared)), BYTES)).await;
    }
    response
}

/// What is left of a body, up to `max` bytes.
async fn discard(mut body: Body, max: usize) {
    let mut seen = 0;
    while seen <= max
        && let Some(Ok(frame)) = body.frame().await
    {
        seen += frame.data_ref().map_or(0, Bytes::len);
    }
}

/// The body of a request, and whether any of it was asked for.
#[derive(Debug)]
struct Shared {
    body: Body,
    is_begun: bool,
}

/// A body that can be read on once the handler has dropped it. One side reads at a time.
struct Lent(Arc<Mutex<Shared>>);

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut shared = self.0.lock();
        shared.is_begun = true;
        Pin::new(&mut shared.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.0.lock().body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.lock().body.size_hint()
    }
}
