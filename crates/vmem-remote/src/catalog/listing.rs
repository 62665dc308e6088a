//! Pages of names, in the order of their bytes.
//!
//! Invariant: no more names are kept of a listing than a page needs, whatever the order in which
//! the object store lists them. Called by the catalog.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use vmem_core::VirtualMemoryError;
use vmem_core::backend::CatalogRecord;

use super::inner::Inner;
use super::lookup::generation;

type Result<T> = std::result::Result<T, VirtualMemoryError>;
/// The newest generation of each name that was listed.
type Page = BTreeMap<Arc<str>, u64>;

/// Records that are read at once.
const AT_ONCE: usize = 32;
/// Names beyond the limit that one listing keeps, in place of those that turn out to be removed.
const SPARE: usize = 256;

/// At most `limit` names with their records.
///
/// # Errors
///
/// Those of `Catalog::names`.
pub(super) async fn names(
    inner: Arc<Inner>,
    prefix: Arc<str>,
    mut from: Bound<Arc<str>>,
    limit: usize,
) -> Result<Vec<(Arc<str>, CatalogRecord)>> {
    let mut found = Vec::new();
    while found.len() < limit {
        let missing = limit - found.len();
        let len_max = missing.saturating_add(SPARE);
        let page = page(&inner, &prefix, &from, len_max).await?;
        let is_last = page.len() < len_max;
        let Some((last, _)) = page.last_key_value() else { break };
        from = Bound::Excluded(last.clone());
        found.extend(records(&inner, page, missing).await?);
        if is_last {
            break;
        }
    }
    Ok(found)
}

/// The first names of a listing.
async fn page(inner: &Inner, prefix: &str, from: &Bound<Arc<str>>, len_max: usize) -> Result<Page> {
    let is_behind = |name: &Arc<str>| match from {
        Bound::Unbounded => true,
        Bound::Included(from) => name >= from,
        Bound::Excluded(from) => name > from,
    };
    let fold = |page: &mut Page, path: &_, _| {
        let Some((name, number)) = inner.paths.parse(path) else { return };
        if !name.starts_with(prefix) || !is_behind(&name) {
            return;
        }
        let newest = page.entry(name).or_default();
        *newest = number.max(*newest);
        if page.len() > len_max {
            page.pop_last();
        }
    };
    let listed = inner.client.scan(inner.paths.names(), fold).await;
    listed.map_err(|error| error.of_catalog("list"))
}

/// The records of the first `limit` names of a page that are not removed.
async fn records(
    inner: &Inner,
    page: Page,
    limit: usize,
) -> Result<Vec<(Arc<str>, CatalogRecord)>> {
    let reads = stream::iter(page).map(|(name, number)| async move {
        let record = record(inner, &name, number).await?;
        Ok::<_, VirtualMemoryError>(record.map(|record| (name, record)))
    });
    let found = reads.buffered(AT_ONCE.min(limit)).try_filter_map(async |read| Ok(read));
    found.take(limit).try_collect().await
}

/// The record of a name, of a generation that is no older than what this instance knows.
async fn record(inner: &Inner, name: &Arc<str>, listed: u64) -> Result<Option<CatalogRecord>> {
    let number = listed.max(inner.generations.lock().newest(name));
    let body = match inner.read(name, number).await? {
        Some(bytes) => Some(inner.decode(name, number, &bytes)?),
        // It was superseded and deleted since it was listed.
        None => inner.look(name).await?.body,
    };
    let Some(body) = body else { return Ok(None) };
    inner.saw(generation(number, &body));
    Ok(body.object.map(|object| object.record))
}
