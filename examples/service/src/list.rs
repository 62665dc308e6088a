//! Listings, page by page.
//!
//! Invariant: a page has at most `max_listed` items, and says where the next one starts if there is
//! one. Called by `routes`.

use axum::Json;
use axum::extract::Query;
use axum::extract::State;
use axum::extract::rejection::QueryRejection;
use futures::TryStreamExt;
use serde::{Deserialize, Serialize};
use vmem::{ListOptions, Listed, NamedEntry};

use crate::attributes::Attributes;
use crate::error::ApiError;
use crate::state::App;

/// The query of a listing.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wanted {
    #[serde(default)]
    prefix: String,
    start_after: Option<String>,
    limit: Option<usize>,
    delimiter: Option<String>,
}

/// One page.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Page {
    objects: Vec<Object>,
    prefixes: Vec<String>,
    /// The `start_after` of the next page.
    next: Option<String>,
}

#[derive(Debug, Serialize)]
struct Object {
    name: String,
    size: u64,
    etag: String,
    last_modified: String,
    #[serde(flatten)]
    attributes: Attributes,
}

impl Object {
    fn new(entry: &NamedEntry) -> Self {
        Object {
            name: entry.name.to_string(),
            size: entry.len,
            etag: format!("\"{}\"", entry.version),
            last_modified: httpdate::fmt_http_date(entry.modified),
            attributes: Attributes::of_entry(entry),
        }
    }
}

/// The query of a request.
///
/// # Errors
///
/// 400 with the field.
pub(crate) fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, ApiError> {
    let refused =
        |rejection: QueryRejection| ApiError::bad_request("invalid_query", rejection.body_text());
    query.map(|Query(query)| query).map_err(refused)
}

/// Lists objects by prefix.
pub(crate) async fn list(
    State(app): State<App>,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<Json<Page>, ApiError> {
    let wanted = query(wanted)?;
    let max = app.limits.max_listed;
    let limit = wanted.limit.unwrap_or(max).min(max);
    if limit == 0 || wanted.delimiter.as_deref() == Some("") {
        let why = "limit is 1 at least, and delimiter has one character at least";
        return Err(ApiError::bad_request("invalid_query", why));
    }
    // One more, to know whether there is another page.
    let mut options = ListOptions::new().prefix(wanted.prefix).limit(limit + 1);
    options.start_after = wanted.start_after;
    options.delimiter = wanted.delimiter;
    let mut items: Vec<Listed> = app.vmem.names_with(options).try_collect().await?;
    let mut page = Page::default();
    if items.len() > limit {
        items.truncate(limit);
        page.next = items.last().map(|last| last.key().to_owned());
    }
    for item in items {
        match item {
            Listed::Entry(entry) => page.objects.push(Object::new(&entry)),
            Listed::Prefix(prefix) => page.prefixes.push(prefix.to_string()),
        }
    }
    Ok(Json(page))
}
