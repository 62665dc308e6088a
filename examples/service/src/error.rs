//! What goes wrong, as HTTP says it.
//!
//! Invariant: each error has a status, a short code for programs and a sentence for people. What is
//! the fault of this side is logged, and its details stay in the log. Called by the handlers.

use std::borrow::Cow;

use axum::Json;
use axum::http::header::{CONTENT_RANGE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use vmem::{MemoryTier, VirtualMemoryError};

/// An answer that is no success.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: Cow<'static, str>,
    /// The length of the object, for 416.
    whole: Option<u64>,
}

impl ApiError {
    /// An error with this status.
    pub(crate) fn new(
        status: StatusCode,
        code: &'static str,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        ApiError { status, code, message: message.into(), whole: None }
    }

    /// 400.
    pub(crate) fn bad_request(code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// 412.
    pub(crate) fn precondition(message: impl Into<Cow<'static, str>>) -> Self {
        ApiError::new(StatusCode::PRECONDITION_FAILED, "precondition_failed", message)
    }

    /// 413, for an object of more than `max` bytes.
    pub(crate) fn too_large(max: u64) -> Self {
        let message = format!("an object has at most {max} bytes here");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    }

    /// 416, for an object of `whole` bytes.
    pub(crate) fn range(whole: u64) -> Self {
        let message = format!("the object has {whole} bytes: the range is outside of it");
        let error =
            ApiError::new(StatusCode::RANGE_NOT_SATISFIABLE, "range_not_satisfiable", message);
        ApiError { whole: Some(whole), ..error }
    }

    /// 503, for what may succeed when it is tried again.
    pub(crate) fn unavailable(code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code, message)
    }

    /// 500.
    pub(crate) fn internal() -> Self {
        let message = "the service failed; its log has the reason under the id of this request";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }
}

impl From<VirtualMemoryError> for ApiError {
    fn from(error: VirtualMemoryError) -> Self {
        use VirtualMemoryError as E;
        let message = error.to_string();
        match &error {
            E::NameNotFound { .. } | E::HandleNotFound { .. } => {
                ApiError::new(StatusCode::NOT_FOUND, "not_found", "no object has this name")
            }
            E::NameExists { .. } => ApiError::precondition("an object of this name exists"),
            E::VersionChanged { current, .. } => {
                ApiError::precondition(format!("the object has the ETag \"{current}\""))
            }
            E::ExceedsCapacity { tier: MemoryTier::Disk, capacity_bytes, .. } => {
                ApiError::too_large(*capacity_bytes)
            }
            E::ExceedsCapacity { .. } => {
                ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "exceeds_tier", message)
            }
            E::TierFull { .. } => ApiError::unavailable("tier_full", message),
            E::AllPinned { .. } => ApiError::unavailable("all_pinned", message),
            E::TimedOut { .. } => ApiError::unavailable("timed_out", message),
            E::Closed => ApiError::unavailable("closing", "the service is shutting down"),
            E::TierNotAvailable { .. } => ApiError::bad_request("tier_not_available", message),
            E::InvalidConfig { field: "metadata", .. } => metadata_too_large(),
            E::InvalidConfig { field: "name", reason } => {
                ApiError::bad_request("invalid_name", reason.to_string())
            }
            _ => {
                tracing::error!(%error, "the store failed");
                ApiError::internal()
            }
        }
    }
}

/// 431: what is kept with an object has a limit.
pub(crate) fn metadata_too_large() -> ApiError {
    ApiError::new(
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        "metadata_too_large",
        "what is kept with an object takes at most 4096 bytes as JSON",
    )
}

impl From<std::io::Error> for ApiError {
    /// Of a stream of the store, which has the store's own error as its source.
    fn from(error: std::io::Error) -> Self {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<VirtualMemoryError>());
        match inner {
            Some(inner) => inner.clone().into(),
            None => {
                tracing::error!(%error, "a stream failed");
                ApiError::internal()
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = serde_json::json!({ "code": self.code, "message": self.message });
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        if let Some(whole) = self.whole {
            let value = HeaderValue::try_from(format!("bytes */{whole}"));
            headers.extend(value.ok().map(|value| (CONTENT_RANGE, value)));
        }
        if matches!(self.status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            // The least there is; `limits` puts the configured value in its place.
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
