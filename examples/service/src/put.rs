//! PUT and DELETE: changes of names.
//!
//! Invariant: the bytes of a PUT go to the store as they come, a window at a time, and there is no
//! object before all have come: a body that breaks off, stands still or is too long leaves nothing.
//! A change that is acknowledged is durable. Called by `routes`.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CONTENT_RANGE, TRANSFER_ENCODING};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use headers::{ContentLength, HeaderMapExt};
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, timeout_at};
use vmem::{
    MemoryTier, NamedEntry, ObjectWriter, PutMode, PutOptions, VMemHandle, VirtualMemoryError,
};

use crate::attributes::{Attributes, add_validators};
use crate::conditions::of_write;
use crate::config::Limits;
use crate::error::ApiError;
use crate::name::Name;
use crate::pace::Pace;
use crate::state::App;

/// Stores an object.
pub(crate) async fn put(
    State(app): State<App>,
    name: Name,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (options, exists) = prepare(&app, &name, &headers).await?;
    let mut writer = app.vmem.writer_named(name.as_str(), options);
    receive(body, &mut writer, &app.limits).await?;
    let handle = commit(&app, writer).await?;
    app.pins.release_replaced(name.as_str(), Some(handle.id()));
    let mut answer = serde_json::json!({ "name": name.as_str(), "size": handle.len() });
    let mut headers = HeaderMap::new();
    // Of this version, unless another has the name already.
    if let Ok((current, entry)) = app.vmem.open_entry(name.as_str()).await
        && current == handle
    {
        add_validators(&entry, &mut headers);
        answer["etag"] = format!("\"{}\"", entry.version).into();
    }
    let status = if exists { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, headers, Json(answer)).into_response())
}

/// What a PUT may do, and whether the object exists; before any of its body is read.
async fn prepare(
    app: &App,
    name: &Name,
    headers: &HeaderMap,
) -> Result<(PutOptions, bool), ApiError> {
    let max = app.limits.max_object;
    let length = headers.typed_get::<ContentLength>().map(|length| length.0);
    if length.is_none() && !headers.contains_key(TRANSFER_ENCODING) {
        // HTTP takes such a body as empty, which is hardly what the client means.
        let why = "a PUT has a Content-Length, 0 for an empty object, or comes in chunks";
        return Err(ApiError::new(StatusCode::LENGTH_REQUIRED, "length_required", why));
    }
    if length.is_some_and(|length| length > max) {
        return Err(ApiError::too_large(max));
    }
    if headers.contains_key(CONTENT_RANGE) {
        // Stored as a whole object, the part would replace all of it.
        let why = "a PUT replaces the whole object: it has no Content-Range";
        return Err(ApiError::bad_request("partial_put", why));
    }
    let attributes = Attributes::of_request(headers)?;
    let current = current(app, name).await?;
    let mode = of_write(headers, current.as_ref())?;
    let options = PutOptions::new(MemoryTier::Host).metadata(attributes.to_bytes()).mode(mode);
    Ok((options, current.is_some()))
}

/// What has the name now.
async fn current(app: &App, name: &Name) -> Result<Option<NamedEntry>, ApiError> {
    match app.vmem.entry(name.as_str()).await {
        Ok(entry) => Ok(Some(entry)),
        Err(VirtualMemoryError::NameNotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Writes a body as it comes.
///
/// # Errors
///
/// 400 if it breaks off, 408 if it stands still or is too slow as a whole, 413 if it is too long;
/// those of the store.
async fn receive(body: Body, writer: &mut ObjectWriter, limits: &Limits) -> Result<(), ApiError> {
    let mut stream = body.into_data_stream();
    let mut deadline = Instant::now() + limits.body_timeout;
    let mut progress = 0;
    let mut pace = Pace::new(limits);
    loop {
        let asked = Instant::now();
        let whole = pace.left().map_or(deadline, |left| asked + left);
        let next = match timeout_at(deadline.min(whole), stream.next()).await {
            Ok(Some(Ok(bytes))) => bytes,
            Ok(None) => return Ok(()),
            Ok(Some(Err(_))) => {
                return Err(ApiError::bad_request("incomplete_body", "the body broke off"));
            }
            Err(_) => {
                let why = "the body came too slowly";
                return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "slow_body", why));
            }
        };
        if writer.len() + next.len() as u64 > limits.max_object {
            return Err(ApiError::too_large(limits.max_object));
        }
        progress += next.len() as u64;
        let began = Instant::now();
        pace.waited(began - asked, next.len() as u64);
        writer.write_all(&next).await?;
        // The client does not answer for the time that the store takes.
        deadline += began.elapsed();
        if progress >= limits.body_progress {
            progress = 0;
            deadline = Instant::now() + limits.body_timeout;
        }
    }
}

/// Commits in a task of its own: a client that goes away then does not leave a commit that a
/// DELETE on a condition does not see.
async fn commit(app: &App, writer: ObjectWriter) -> Result<VMemHandle, ApiError> {
    let changes = app.changes.clone();
    let committing = tokio::spawn(async move {
        let _shared = changes.read().await;
        writer.commit().await
    });
    Ok(committing.await.map_err(|_| ApiError::internal())??)
}

/// Removes an object.
pub(crate) async fn delete(
    State(app): State<App>,
    name: Name,
    headers: HeaderMap,
) -> Result<StatusCode, ApiError> {
    let task = app.clone();
    // A task, for the same reason as a commit.
    let removing = tokio::spawn(async move {
        let changes = task.changes.clone();
        match of_write(&headers, None) {
            Ok(PutMode::Overwrite) => {
                let _shared = changes.read().await;
                task.vmem.remove_named(name.as_str()).await?;
            }
            _ => {
                // Nothing else changes a name between the look and the removal.
                let _alone = changes.write().await;
                let current = current(&task, &name).await?;
                of_write(&headers, current.as_ref())?;
                task.vmem.remove_named(name.as_str()).await?;
            }
        }
        task.pins.release_replaced(name.as_str(), None);
        Ok(StatusCode::NO_CONTENT)
    });
    removing.await.map_err(|_| ApiError::internal())?
}
