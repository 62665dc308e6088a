//! Listings, page by page.
//!
//! Invariant: a page has at most `max_listed` items and a mebibyte, and says where the next one
//! starts if there is one. All pages that are made or sent at once have a budget: an item takes up
//! to 5 KiB, of its name and of what its user keeps with it. One client has half of the budget at
//! most, where clients are distinguished. Called by `routes`.

use std::pin::pin;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures::TryStreamExt;
use serde::{Deserialize, Serialize};
use vmem::{ListOptions, Listed, NamedEntry};

use crate::attributes::Attributes;
use crate::error::ApiError;
use crate::limits::{Peer, charged};
use crate::state::App;

/// The items of a page, in bytes, unless one alone takes more.
const PAGE_LEN_MAX: usize = 1 << 20;
/// What a page is charged while it is made, in KiB: besides its items it has a name.
const PAGE_KIB: u32 = (PAGE_LEN_MAX >> 10) as u32 + 16;
/// What all pages together are charged, in KiB.
pub(crate) const LISTED_KIB: usize = 8 * PAGE_KIB as usize;
/// Pages of one client's address at once, so that none has the whole budget.
const PAGES_PER_CLIENT: usize = 4;

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

/// One page, as JSON.
#[derive(Debug, Default)]
struct Page {
    objects: Vec<u8>,
    prefixes: Vec<u8>,
    items: usize,
    /// The last item, which is the `start_after` of the next page.
    last: Option<String>,
}

impl Page {
    /// Adds an item. False if there is no space for it.
    fn add(&mut self, item: &Listed) -> bool {
        let before = self.objects.len() + self.prefixes.len();
        let json = match item {
            Listed::Entry(entry) => serde_json::to_vec(&Object::new(entry)),
            Listed::Prefix(prefix) => serde_json::to_vec(&**prefix),
        };
        let json = json.expect("strings are JSON");
        if self.items > 0 && before + json.len() + 1 > PAGE_LEN_MAX {
            return false;
        }
        let list = match item {
            Listed::Entry(_) => &mut self.objects,
            Listed::Prefix(_) => &mut self.prefixes,
        };
        if !list.is_empty() {
            list.push(b',');
        }
        list.extend(json);
        self.items += 1;
        self.last = Some(item.key().to_owned());
        true
    }

    /// The whole; `has_more` if there is another page.
    fn into_json(self, has_more: bool) -> Vec<u8> {
        let next = serde_json::to_vec(&self.last.filter(|_| has_more)).expect("strings are JSON");
        let parts: [&[u8]; 7] = [
            b"{\"objects\":[",
            &self.objects,
            b"],\"prefixes\":[",
            &self.prefixes,
            b"],\"next\":",
            &next,
            b"}",
        ];
        parts.concat()
    }
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
    peer: Option<Extension<Peer>>,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<Response, ApiError> {
    let wanted = query(wanted)?;
    let max = app.limits.max_listed;
    let limit = wanted.limit.unwrap_or(max).min(max);
    if limit == 0 || wanted.delimiter.as_deref() == Some("") {
        let why = "limit is 1 at least, and delimiter has one character at least";
        return Err(ApiError::bad_request("invalid_query", why));
    }
    // Where requests are not counted by client, listings are not either.
    let peer = peer.filter(|_| app.limits.max_requests_per_client > 0);
    let counted = peer.map(|peer| app.listers.count(peer.0, PAGES_PER_CLIENT, "listings"));
    let counted = counted.transpose()?;
    let full = |_| ApiError::unavailable("busy", "as many listings as may be are under way");
    let mut slots = app.listed.clone().try_acquire_many_owned(PAGE_KIB).map_err(full)?;
    // One more, to know whether there is another page.
    let mut options = ListOptions::new().prefix(wanted.prefix).limit(limit + 1);
    options.start_after = wanted.start_after;
    options.delimiter = wanted.delimiter;
    let mut items = pin!(app.vmem.names_with(options));
    let mut page = Page::default();
    let mut has_more = false;
    while let Some(item) = items.try_next().await? {
        if page.items == limit || !page.add(&item) {
            has_more = true;
            break;
        }
    }
    let json = page.into_json(has_more);
    // From here on it takes its length, until it has gone.
    let kept = slots.split(json.len().div_ceil(1024).min(PAGE_KIB as usize));
    drop(slots);
    Ok(([(CONTENT_TYPE, "application/json")], charged(json, (kept, counted))).into_response())
}
