//! Making the current bytes of a named object durable.
//!
//! Invariant: the durable version of an object owns its extents until a commit that leads elsewhere
//! has succeeded, whatever happens to the current version meanwhile. Called with the turn of the
//! name.

use std::sync::Arc;

use futures::StreamExt;

use super::{Names, NotCommitted, Result, Turn};
use crate::catalog::{CatalogChange, CatalogRecord, SEGMENT_CHUNKS};
use crate::chunk::{StoredChunk, chunk_count};
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::migrate;
use crate::object::{ExtentMap, Object};

/// Names that `flush_all` makes durable at once: as many as share a commit.
const AT_ONCE: usize = 1024;

/// Makes every write that completed before the call durable. What is durable already costs nothing.
///
/// # Errors
///
/// Those of the disk and of the catalog; the durable version is then the previous one, or unknown
/// if it was the commit that failed.
pub(crate) async fn persist(names: &Arc<Names>, turn: &Turn, object: &Arc<Object>) -> Result<()> {
    let Some(named) = object.named.get() else { return Ok(()) };
    let Some((record, before)) = named.state() else { return Ok(()) };
    assert!(named.current().as_ref() == Some(turn.name()), "the turn is that of the name");
    let version = record.version;
    let stored = store(names, turn, object, record, before).await;
    let (record, map) = stored.inspect_err(|error| names.yield_name(turn, object, error))?;
    assert!(record.version >= version, "version {} follows {version}", record.version);
    let old = named.set_durable(record, map.clone());
    if let Some(old) = old {
        names.retire(old, object.len, &map);
    }
    drop(map);
    // The last handle may have been dropped while the object was not durable.
    object.offer_if_closed();
    Ok(())
}

/// Takes the turn of the object, then persists it. An object that loses its name meanwhile has
/// nothing to make durable.
///
/// # Errors
///
/// Those of [`persist`].
pub(crate) async fn flush(
    names: &Arc<Names>,
    object: &Arc<Object>,
    deadline: &Deadline,
) -> Result<()> {
    let Some(named) = object.named.get() else { return Ok(()) };
    while let Some(name) = named.current() {
        let turn = Turn::of(names, name, deadline).await?;
        if named.current().as_ref() == Some(turn.name()) {
            return persist(names, &turn, object).await;
        }
    }
    // Its bytes are not durable if another store has what was its name.
    named.taken().map_or(Ok(()), Err)
}

/// Makes every named object in memory durable; all are tried.
///
/// # Errors
///
/// `NotFlushed` with the names of those that are not.
pub(crate) async fn flush_all(names: &Arc<Names>) -> Result<()> {
    // One deadline for all. Flushes that do not wait when it passes still complete.
    let deadline = names.shared.deadline();
    let all = names.all();
    // Their bytes first, many in one run. What fails here is tried again below, and reported there.
    let objects = all.iter().map(|(_, handle)| handle.object());
    let dirty = objects.filter(|object| object.is_dirty()).cloned().collect();
    let _ = migrate::flush_many(&names.shared, dirty, &deadline).await;
    let flushes = all.into_iter().map(|(name, handle)| async move {
        let outcome = flush(names, handle.object(), &deadline).await;
        outcome.map_err(|error| (name, error))
    });
    let outcomes: Vec<_> = futures::stream::iter(flushes).buffer_unordered(AT_ONCE).collect().await;
    let mut failed: Vec<_> = outcomes.into_iter().filter_map(std::result::Result::err).collect();
    let Some((_, source)) = failed.first() else { return Ok(()) };
    let source = Box::new(source.clone());
    let names = failed.drain(..).map(|(name, _)| name).collect();
    Err(VirtualMemoryError::NotFlushed { names, source })
}

/// Writes the current bytes to disk and commits their place: under `record`, as a new version
/// unless nothing has changed since `before`.
pub(super) async fn store(
    names: &Arc<Names>,
    turn: &Turn,
    object: &Arc<Object>,
    record: CatalogRecord,
    before: Option<ExtentMap>,
) -> Result<(CatalogRecord, ExtentMap)> {
    let map = migrate::settle(object, turn.deadline()).await?;
    let mut changes = segments(record.id, object.len, &map, before.as_ref());
    if changes.is_empty() {
        return Ok((record, map));
    }
    let record = names.new_version(record)?;
    let before = before.unwrap_or_default();
    for extent in (0..chunk_count(object.len)).filter_map(|index| map.chunk(index)) {
        extent.keep();
    }
    changes.push(CatalogChange::Put { name: turn.name().clone(), record: record.clone() });
    match names.commit(changes, true).await {
        Ok(()) => Ok((record, map)),
        Err(NotCommitted { error, perhaps, .. }) => {
            if !perhaps {
                let_go(&map, object.len, &before);
            }
            Err(error)
        }
    }
}

/// Notes that the catalog no longer leads to the extents of `map` that are not in `other`.
pub(super) fn let_go(map: &ExtentMap, len: usize, other: &ExtentMap) {
    for index in 0..chunk_count(len) {
        let Some(extent) = map.chunk(index) else { continue };
        if other.chunk(index).is_none_or(|other| !Arc::ptr_eq(extent, other)) {
            extent.let_go();
        }
    }
}

/// The segments that differ from those of the previous map; all of them where there is none. An
/// object of no bytes has one too.
fn segments(
    id: u64,
    len: usize,
    map: &ExtentMap,
    before: Option<&ExtentMap>,
) -> Vec<CatalogChange> {
    let count = chunk_count(len);
    let stored =
        |map: &ExtentMap, index: usize| map.chunk(index).and_then(|extent| extent.stored());
    let mut changes = Vec::new();
    for segment in 0..count.div_ceil(SEGMENT_CHUNKS).max(1) {
        let range = segment * SEGMENT_CHUNKS..count.min((segment + 1) * SEGMENT_CHUNKS);
        let chunks: Vec<Option<StoredChunk>> =
            range.clone().map(|index| stored(map, index)).collect();
        let same = |before: &ExtentMap| {
            range.clone().map(|i| stored(before, i)).eq(chunks.iter().cloned())
        };
        if before.is_none_or(|before| !same(before)) {
            changes.push(CatalogChange::Segment { id, segment: segment as u32, chunks });
        }
    }
    changes
}
