//! GET and HEAD: bodies as streams.
//!
//! Invariant: validators, metadata and bytes of a response are of one version. A client that reads
//! slowly holds windows of the reserve for streams, or a copy that is charged, and no object space.
//! Called by `routes`.

use std::ops::Range;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_SECURITY_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, TryStreamExt};
use vmem::{NamedEntry, VMemHandle};

use crate::attributes::{Attributes, add_validators};
use crate::conditions::{Verdict, of_read, range};
use crate::error::ApiError;
use crate::limits::charged;
use crate::name::Name;
use crate::state::App;

/// The longest response that is copied, in bytes.
const COPIED_MAX: usize = 256 << 10;

/// Sends an object, or a range of it.
pub(crate) async fn get(
    State(app): State<App>,
    name: Name,
    request: HeaderMap,
) -> Result<Response, ApiError> {
    let (handle, entry) = app.vmem.open_entry(name.as_str()).await?;
    if of_read(&request, &entry)? == Verdict::NotModified {
        return Ok(not_modified(&entry));
    }
    let range = range(&request, &entry)?;
    let mut headers = describe(&entry);
    let (status, part) = match range {
        None => (StatusCode::OK, 0..entry.len),
        Some(part) => {
            let text = format!("bytes {}-{}/{}", part.start, part.end - 1, entry.len);
            headers.extend(HeaderValue::try_from(text).ok().map(|value| (CONTENT_RANGE, value)));
            (StatusCode::PARTIAL_CONTENT, part)
        }
    };
    headers.insert(CONTENT_LENGTH, HeaderValue::from(part.end - part.start));
    let part = part.start as usize..part.end as usize;
    let body = match copied(&app, &handle, part.clone()).await? {
        Some(body) => body,
        None => streamed(&app, &handle, part, name).await?,
    };
    Ok((status, headers, body).into_response())
}

/// A short part, read at once into memory of its own: a response that the kernel takes as a whole
/// needs no window for as long as its client reads. None if it is long, or there is no such memory.
async fn copied(
    app: &App,
    handle: &VMemHandle,
    part: Range<usize>,
) -> Result<Option<Body>, ApiError> {
    if part.len() > COPIED_MAX {
        return Ok(None);
    }
    let kib = part.len().div_ceil(1024) as u32;
    let Ok(slots) = app.copied.clone().try_acquire_many_owned(kib) else { return Ok(None) };
    let mut bytes = vec![0; part.len()];
    app.vmem.read_into(handle, part, &mut bytes).await?;
    Ok(Some(charged(bytes, slots)))
}

/// A part as a stream of windows.
async fn streamed(
    app: &App,
    handle: &VMemHandle,
    part: Range<usize>,
    name: Name,
) -> Result<Body, ApiError> {
    let mut stream = app.vmem.reader(handle, part).into_stream();
    // Before the status is sent, since an error has another one.
    let first = stream.next().await.transpose()?;
    let rest = stream.inspect_err(move |error| {
        tracing::warn!(%error, name = name.as_str(), "a response was cut off");
    });
    Ok(Body::from_stream(futures::stream::iter(first.map(Ok)).chain(rest)))
}

/// Tells of an object. It costs the same whatever its length.
pub(crate) async fn head(
    State(app): State<App>,
    name: Name,
    request: HeaderMap,
) -> Result<Response, ApiError> {
    let entry = app.vmem.entry(name.as_str()).await?;
    if of_read(&request, &entry)? == Verdict::NotModified {
        return Ok(not_modified(&entry));
    }
    let mut headers = describe(&entry);
    headers.insert(CONTENT_LENGTH, HeaderValue::from(entry.len));
    Ok((StatusCode::OK, headers).into_response())
}

fn describe(entry: &NamedEntry) -> HeaderMap {
    let mut headers = HeaderMap::new();
    Attributes::of_entry(entry).add_to(&mut headers);
    add_validators(entry, &mut headers);
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    // A page that is stored here is of this origin: it gets none of its rights, and what is no page
    // is not taken for one.
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
    headers
}

fn not_modified(entry: &NamedEntry) -> Response {
    let mut headers = HeaderMap::new();
    Attributes::of_entry(entry).add_caching(&mut headers);
    add_validators(entry, &mut headers);
    (StatusCode::NOT_MODIFIED, headers).into_response()
}
