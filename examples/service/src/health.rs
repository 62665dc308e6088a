//! Whether the process is alive, and whether it is ready for requests.
//!
//! Invariant: neither counts as a request, so that a busy service answers them. Ready means that a
//! name was looked up just now, and that what is stored would be durable. Called by `routes`.

use std::time::Duration;

use axum::extract::State;
use vmem::VirtualMemoryError;

use crate::error::ApiError;
use crate::state::App;

/// A name that no request can have.
const PROBE: &str = "\u{1}ready";
/// How long the store may take to answer.
const ANSWERS: Duration = Duration::from_secs(2);

/// Answers as long as the process runs.
pub(crate) async fn healthz() -> &'static str {
    "alive\n"
}

/// Answers with 503 while the service ends, or if its store does not work.
pub(crate) async fn readyz(State(app): State<App>) -> Result<&'static str, ApiError> {
    app.check_open()?;
    if app.vmem.stats().commits_stopped {
        // Until a restart.
        return Err(ApiError::unavailable("not_ready", "the disk failed: nothing can be stored"));
    }
    match tokio::time::timeout(ANSWERS, app.vmem.entry(PROBE)).await {
        Ok(Ok(_) | Err(VirtualMemoryError::NameNotFound { .. })) => Ok("ready\n"),
        Ok(Err(error)) => {
            tracing::error!(%error, "the store does not answer");
            Err(ApiError::unavailable("not_ready", "the store does not work"))
        }
        Err(_) => Err(ApiError::unavailable("not_ready", "the store does not answer")),
    }
}
