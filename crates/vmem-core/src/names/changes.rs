//! The changes of names, each with the turn of its names.
//!
//! Invariant: the catalog changes first and memory after it; until both say the same the turn is
//! held. A handle that was taken from the table is dropped only after the object is back in it,
//! since dropping the last one but that of the table lets the object leave memory. Called by
//! `vmem/named.rs` and `vmem/entries.rs`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::{Names, NotCommitted, Result, Turn, persist};
use crate::catalog::{CatalogChange, CatalogObject, CatalogRecord};
use crate::chunk::chunk_len;
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;
use crate::object::{Claim, ExtentMap, Object};
use crate::storage::TierError;

/// What a name must stand for before it is replaced.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expected {
    Anything,
    Nothing,
    Version(u64),
}

impl Expected {
    /// # Errors
    ///
    /// `NameExists`, `NameNotFound`, `VersionChanged`.
    pub(crate) fn check(self, name: &Arc<str>, found: Option<&CatalogRecord>) -> Result<()> {
        let name = || name.clone();
        match (self, found.map(|record| record.version)) {
            (Expected::Nothing, Some(_)) => Err(VirtualMemoryError::NameExists { name: name() }),
            (Expected::Version(_), None) => Err(VirtualMemoryError::NameNotFound { name: name() }),
            (Expected::Version(expected), Some(current)) if expected != current => {
                Err(VirtualMemoryError::VersionChanged { name: name(), expected, current })
            }
            _ => Ok(()),
        }
    }
}

/// Finds the object of the name, in memory or by the catalog.
///
/// # Errors
///
/// Those of the catalog; `TierNotAvailable` for an object whose home tier the store has not.
async fn find(names: &Arc<Names>, turn: &Turn) -> Result<Option<VMemHandle>> {
    let name = turn.name();
    if let Some(handle) = names.get(name) {
        return Ok(Some(handle));
    }
    match names.catalog()?.find(name.clone()).await? {
        None => Ok(None),
        Some(stored) => bring_in(names, name, stored).await.map(Some),
    }
}

/// What has the name.
///
/// # Errors
///
/// `NameNotFound`, and those of the catalog.
pub(crate) async fn find_or_error(names: &Arc<Names>, turn: &Turn) -> Result<VMemHandle> {
    let found = find(names, turn).await?;
    found.ok_or_else(|| VirtualMemoryError::NameNotFound { name: turn.name().clone() })
}

/// What has the name, if that is what `expected` says.
///
/// # Errors
///
/// Those of [`Expected::check`]; those of a flush.
async fn find_expected(
    names: &Arc<Names>,
    turn: &Turn,
    expected: Expected,
) -> Result<Option<VMemHandle>> {
    let found = find(names, turn).await?;
    if let (Expected::Version(_), Some(found)) = (expected, &found) {
        // What was written to it and not flushed is another version, which is not durable yet.
        persist::persist(names, turn, found.object()).await?;
    }
    let record = found.as_ref().and_then(|found| found.object().named().record());
    expected.check(turn.name(), record.as_ref())?;
    Ok(found)
}

/// The record of the name, without its object.
///
/// # Errors
///
/// `NameNotFound`, and those of the catalog.
pub(crate) async fn record(names: &Arc<Names>, turn: &Turn) -> Result<CatalogRecord> {
    let name = turn.name();
    if let Some(record) = names.record_in_memory(name) {
        return Ok(record);
    }
    let stored = names.catalog()?.record(name.clone()).await?;
    stored.ok_or_else(|| VirtualMemoryError::NameNotFound { name: name.clone() })
}

/// Makes an object from its record in the catalog.
async fn bring_in(
    names: &Arc<Names>,
    name: &Arc<str>,
    stored: CatalogObject,
) -> Result<VMemHandle> {
    let CatalogObject { record, chunks } = stored;
    // Another store may have given it the numbers.
    names.next_id.fetch_max(record.id.max(record.version).saturating_add(1), Ordering::Relaxed);
    let level = names.shared.durable_level();
    let len = usize::try_from(record.len).map_err(|_| VirtualMemoryError::ExceedsCapacity {
        tier: MemoryTier::of_level(level),
        requested_bytes: record.len,
        capacity_bytes: usize::MAX as u64,
    })?;
    let adopt = |(index, chunk): (usize, Option<_>)| match chunk {
        None => Ok(None),
        Some(chunk) => names.shared.durable().adopt(chunk_len(len, index), chunk).map(|mut one| {
            one.set_level(level);
            Some(one)
        }),
    };
    let adopted = chunks.into_iter().enumerate().map(adopt).collect::<std::result::Result<_, _>>();
    let map = ExtentMap::of_some(
        adopted.map_err(|error: TierError| names.shared.tier_error(record.id, error))?,
    );
    let handle = VMemHandle::adopt(names.shared.create(len, record.home));
    let object = handle.object();
    let pass = object.gate(&names.shared.deadline()).await?;
    Claim::of(object, name, record.clone())?.keep(record, Some(map.clone()));
    object.with_extents(&pass, |current, _| *current = map);
    drop(pass);
    names.shared.announce(object);
    let before = names.insert(name, handle.clone());
    assert!(before.is_none(), "an object that is in memory is not loaded again");
    Ok(handle)
}

/// Gives a name that is free to an object that has none; no change of the catalog.
///
/// # Errors
///
/// `NameExists`, and those of the catalog.
pub(crate) async fn allocate(names: &Arc<Names>, turn: &Turn, handle: &VMemHandle) -> Result<()> {
    if find(names, turn).await?.is_some() {
        return Err(VirtualMemoryError::NameExists { name: turn.name().clone() });
    }
    let record = names.new_record(handle.object(), Bytes::new())?;
    Claim::of(handle.object(), turn.name(), record.clone())?.keep(record, None);
    let before = names.insert(turn.name(), handle.clone());
    assert!(before.is_none(), "a free name is nobody's");
    Ok(())
}

/// Gives the name to an object that has none, durably, and takes it from the object that had it.
///
/// # Errors
///
/// Those of [`Expected::check`]; `AlreadyNamed`; those of a flush.
pub(crate) async fn replace(
    names: &Arc<Names>,
    turn: &Turn,
    handle: &VMemHandle,
    metadata: Bytes,
    expected: Expected,
) -> Result<()> {
    let before = find_expected(names, turn, expected).await?;
    if let Err(error) = give(names, turn, handle, metadata).await {
        before.iter().for_each(|before| names.yield_name(turn, before.object(), &error));
        return Err(error);
    }
    if let Some(before) = before {
        lose_name(names, before.object());
    }
    Ok(())
}

/// Gives a name that is free to an object that has none, durably. If that fails it stays an unnamed
/// object.
///
/// # Errors
///
/// `NameExists`, `AlreadyNamed`; those of a flush.
pub(crate) async fn adopt(names: &Arc<Names>, turn: &Turn, handle: &VMemHandle) -> Result<()> {
    let found = record(names, turn).await;
    match found {
        Ok(found) => Expected::Nothing.check(turn.name(), Some(&found))?,
        Err(VirtualMemoryError::NameNotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    give(names, turn, handle, Bytes::new()).await
}

/// Commits the bytes, the metadata and the name at once.
async fn give(names: &Arc<Names>, turn: &Turn, handle: &VMemHandle, metadata: Bytes) -> Result<()> {
    let object = handle.object();
    let record = names.new_record(object, metadata)?;
    let claim = Claim::of(object, turn.name(), record.clone())?;
    let (record, map) = persist::store(names, turn, object, record, None).await?;
    claim.keep(record, Some(map));
    drop(names.insert(turn.name(), handle.clone()));
    Ok(())
}

/// Moves the object of one name to another, durably; an object that had the other name loses it.
///
/// # Errors
///
/// `NameNotFound`; those of [`Expected::check`] for the other name; those of a flush.
pub(crate) async fn rename(
    names: &Arc<Names>,
    from: &Turn,
    to: &Turn,
    expected: Expected,
) -> Result<()> {
    let moved = find_or_error(names, from).await?;
    let before = find_expected(names, to, expected).await?;
    persist::persist(names, from, moved.object()).await?;
    let change = CatalogChange::Rename { from: from.name().clone(), to: to.name().clone() };
    if let Err(error) = commit(names, from, moved.object(), change).await {
        before.iter().for_each(|before| names.yield_name(to, before.object(), &error));
        return Err(error);
    }
    moved.object().named().rename(to.name().clone());
    let taken = names.take(from.name());
    assert!(is_none_or_of(taken.as_ref(), Some(&moved)), "what moves had the name");
    drop(taken);
    let replaced = names.insert(to.name(), moved.clone());
    assert!(is_none_or_of(replaced.as_ref(), before.as_ref()), "what is replaced was found");
    if let Some(before) = before {
        lose_name(names, before.object());
    }
    drop(replaced);
    Ok(())
}

/// Makes the object of the name durable, and changes nothing else.
///
/// # Errors
///
/// `NameNotFound`; those of [`Expected::check`]; those of a flush.
pub(crate) async fn rename_to_itself(
    names: &Arc<Names>,
    turn: &Turn,
    expected: Expected,
) -> Result<()> {
    find_or_error(names, turn).await?;
    let found = find_expected(names, turn, expected).await?;
    match found {
        Some(found) => persist::persist(names, turn, found.object()).await,
        None => Ok(()),
    }
}

/// Forgets the name, durably.
///
/// # Errors
///
/// `NameNotFound`; those of the catalog.
pub(crate) async fn remove(names: &Arc<Names>, turn: &Turn) -> Result<()> {
    let handle = find_or_error(names, turn).await?;
    if handle.object().named().is_durable() {
        let change = CatalogChange::Remove { name: turn.name().clone() };
        commit(names, turn, handle.object(), change).await?;
    }
    let taken = names.take(turn.name());
    assert!(is_none_or_of(taken.as_ref(), Some(&handle)), "what is removed had the name");
    drop(taken);
    lose_name(names, handle.object());
    Ok(())
}

/// Stores metadata beside the name, durably.
///
/// # Errors
///
/// `NameNotFound`; those of a flush.
pub(crate) async fn set_metadata(names: &Arc<Names>, turn: &Turn, metadata: Bytes) -> Result<()> {
    let handle = find_or_error(names, turn).await?;
    let object = handle.object();
    persist::persist(names, turn, object).await?;
    let Some(record) = object.named().record() else { return Err(object.not_found()) };
    let record = names.new_version(CatalogRecord { metadata, ..record })?;
    let change = CatalogChange::Put { name: turn.name().clone(), record: record.clone() };
    commit(names, turn, object, change).await?;
    object.named().set_record(record);
    Ok(())
}

/// Commits a change of what has the name of this turn; it leads to no new bytes.
async fn commit(
    names: &Names,
    turn: &Turn,
    object: &Arc<Object>,
    change: CatalogChange,
) -> Result<()> {
    let committed = names.commit(vec![change], false).await;
    committed.map_err(|NotCommitted { error, .. }| {
        names.yield_name(turn, object, &error);
        error
    })
}

/// Whether what was in the table is the object that was found before, in the same turn. Nothing is
/// there once the store has ended.
fn is_none_or_of(in_table: Option<&VMemHandle>, found: Option<&VMemHandle>) -> bool {
    in_table.is_none_or(|one| found.is_some_and(|other| Arc::ptr_eq(one.object(), other.object())))
}

/// Notes that the catalog does not lead to this object any more: its space is freed with its last
/// handle.
pub(super) fn lose_name(names: &Names, object: &Arc<Object>) {
    let Some(named) = object.named.get() else { return };
    if let Some(durable) = named.lose() {
        names.retire(durable, object.len, &ExtentMap::Empty);
    }
}
