//! Making the current bytes of a named object durable.
//!
//! Invariant: the durable version of an object owns its extents until a commit that leads elsewhere has
//! succeeded, whatever becomes of the current version meanwhile. Called with the turn of the name.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use parking_lot::Mutex;

use super::{NotCommitted, Result, Turn};
use crate::catalog::{CatalogChange, CatalogRecord, SEGMENT_CHUNKS};
use crate::chunk::StoredChunk;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::migrate;
use crate::object::{DiskMap, Object, chunk_count};
use crate::shared::Shared;

/// Objects that are flushed at once, where all are.
const AT_ONCE: usize = 64;

/// What an object knows of its name.
#[derive(Debug)]
pub(crate) struct Named {
    /// The name with which it came into memory: handles lend it out, so it stays.
    first: Arc<str>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// None once another version has the name, or nobody.
    current: Option<Arc<str>>,
    /// None before the first flush.
    durable: Option<Durable>,
}

/// The version to which the catalog leads.
#[derive(Debug)]
pub(crate) struct Durable {
    pub(super) record: CatalogRecord,
    pub(super) map: DiskMap,
}

impl Named {
    pub(super) fn new(name: Arc<str>) -> Self {
        let state = State { current: Some(name.clone()), durable: None };
        Named { first: name, state: Mutex::new(state) }
    }

    pub(super) fn stored(name: Arc<str>, durable: Durable) -> Self {
        let state = State { current: Some(name.clone()), durable: Some(durable) };
        Named { first: name, state: Mutex::new(state) }
    }

    /// The name with which it came into memory.
    pub(crate) fn first(&self) -> &str {
        &self.first
    }

    /// The name that it has now.
    pub(crate) fn current(&self) -> Option<Arc<str>> {
        self.state.lock().current.clone()
    }

    pub(super) fn rename(&self, to: Arc<str>) {
        self.state.lock().current = Some(to);
    }

    pub(super) fn lose(&self) -> Option<Durable> {
        let mut state = self.state.lock();
        state.current = None;
        state.durable.take()
    }

    pub(super) fn is_durable(&self) -> bool {
        self.state.lock().durable.is_some()
    }

    pub(super) fn record(&self) -> Option<CatalogRecord> {
        self.state.lock().durable.as_ref().map(|durable| durable.record.clone())
    }

    pub(super) fn set_record(&self, record: CatalogRecord) {
        if let Some(durable) = &mut self.state.lock().durable {
            durable.record = record;
        }
    }
}

/// Makes every write that completed before the call durable. What is durable already costs nothing.
///
/// # Errors
///
/// What the disk or the catalog says; the durable version is then the one before, or unknown if it was
/// the commit that failed.
pub(crate) async fn persist(shared: &Arc<Shared>, turn: &Turn, object: &Arc<Object>) -> Result<()> {
    let Some(named) = object.named.get() else { return Ok(()) };
    let before = named
        .state
        .lock()
        .durable
        .as_ref()
        .map(|durable| Durable { record: durable.record.clone(), map: durable.map.clone() });
    let durable = store(shared, turn, object, before).await?;
    let map = durable.map.clone();
    let old = named.state.lock().durable.replace(durable);
    if let Some(old) = old {
        shared.names.retire(old.map, object.len, &map);
    }
    Ok(())
}

/// The same, for who has no turn yet. An object that loses its name meanwhile has nothing to be durable.
///
/// # Errors
///
/// Those of [`persist`].
pub(crate) async fn flush(
    shared: &Arc<Shared>,
    object: &Arc<Object>,
    deadline: &Deadline,
) -> Result<()> {
    let Some(named) = object.named.get() else { return Ok(()) };
    while let Some(name) = named.current() {
        let turn = Turn::of(shared, name, deadline).await?;
        if named.current().as_ref() == Some(turn.name()) {
            return persist(shared, &turn, object).await;
        }
    }
    Ok(())
}

/// Makes every named object in memory durable; all are tried.
///
/// # Errors
///
/// `NotFlushed` with the names of those that are not.
pub(crate) async fn flush_all(shared: &Arc<Shared>) -> Result<()> {
    // One for all: what nobody keeps from it goes on after it.
    let deadline = shared.deadline();
    let flushes = shared.names.all().into_iter().map(|(name, handle)| async move {
        let outcome = flush(shared, handle.object(), &deadline).await;
        outcome.map_err(|error| (name, error))
    });
    let outcomes: Vec<_> = futures::stream::iter(flushes).buffered(AT_ONCE).collect().await;
    let mut failed: Vec<_> = outcomes.into_iter().filter_map(std::result::Result::err).collect();
    let Some((_, source)) = failed.first() else { return Ok(()) };
    let source = Box::new(source.clone());
    let names = failed.drain(..).map(|(name, _)| name).collect();
    Err(VirtualMemoryError::NotFlushed { names, source })
}

/// Brings the current bytes down and commits where they are.
pub(super) async fn store(
    shared: &Arc<Shared>,
    turn: &Turn,
    object: &Arc<Object>,
    before: Option<Durable>,
) -> Result<Durable> {
    let map = migrate::settle(object, turn.deadline()).await?;
    let record = match &before {
        Some(before) => before.record.clone(),
        None => new_record(object, shared.names.next_id()),
    };
    let is_new = before.is_none();
    let before = before.map_or(DiskMap::Empty, |before| before.map);
    let mut changes = segments(record.id, object.len, &map, (!is_new).then_some(&before));
    if changes.is_empty() {
        return Ok(Durable { record, map });
    }
    for extent in (0..chunk_count(object.len)).filter_map(|index| map.chunk(index)) {
        extent.keep();
    }
    if is_new {
        changes.push(CatalogChange::Put { name: turn.name().clone(), record: record.clone() });
    }
    match shared.names.commit(changes, true).await {
        Ok(()) => Ok(Durable { record, map }),
        Err(NotCommitted { error, perhaps, .. }) => {
            if !perhaps {
                let_go(&map, object.len, &before);
            }
            Err(error)
        }
    }
}

/// The catalog does not lead to those extents of `map` that `other` has not.
pub(super) fn let_go(map: &DiskMap, len: usize, other: &DiskMap) {
    for index in 0..chunk_count(len) {
        let Some(extent) = map.chunk(index) else { continue };
        if other.chunk(index).is_none_or(|other| !Arc::ptr_eq(extent, other)) {
            extent.let_go();
        }
    }
}

/// The record of a version that is not stored yet.
pub(super) fn new_record(object: &Object, id: u64) -> CatalogRecord {
    CatalogRecord { id, len: object.len as u64, home: object.home, metadata: Bytes::new() }
}

/// The segments that differ from those before; all of them where there is nothing before. An object
/// of no bytes has one too.
fn segments(id: u64, len: usize, map: &DiskMap, before: Option<&DiskMap>) -> Vec<CatalogChange> {
    let count = chunk_count(len);
    let stored = |map: &DiskMap, index: usize| map.chunk(index).and_then(|extent| extent.stored());
    let mut changes = Vec::new();
    for segment in 0..count.div_ceil(SEGMENT_CHUNKS).max(1) {
        let range = segment * SEGMENT_CHUNKS..count.min((segment + 1) * SEGMENT_CHUNKS);
        let chunks: Vec<Option<StoredChunk>> =
            range.clone().map(|index| stored(map, index)).collect();
        let same =
            |before: &DiskMap| range.clone().map(|i| stored(before, i)).eq(chunks.iter().cloned());
        if before.is_none_or(|before| !same(before)) {
            changes.push(CatalogChange::Segment { id, segment: segment as u32, chunks });
        }
    }
    changes
}
