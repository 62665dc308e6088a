//! The named objects: who has which name in memory, and how changes of names become durable.
//!
//! Invariant: whatever changes a name holds its turn (`turns.rs`) from the first look at the name until
//! memory says what the catalog says; so changes of one name never overlap, while those of different
//! names share commits (`commits.rs`). Each runs as a task of its own, which a caller who goes away
//! does not cancel. The extents that the catalog leads to, or may lead to, are kept: their space is
//! free only after a commit that no longer names them has succeeded.
//!
//! Called by `vmem/named.rs`, and by the actor at its end.

mod commits;
mod persist;
mod turns;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dashmap::DashMap;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub(crate) use commits::{Commits, NotCommitted};
pub(crate) use persist::{Durable, Named, flush, flush_all, persist};
pub(crate) use turns::Turn;

use crate::catalog::{Catalog, CatalogChange, CatalogObject, CatalogRecord, NAME_LEN_MAX};
use crate::disk::{DiskBackend, DiskError};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;
use crate::object::{DiskMap, Object, chunk_len};
use crate::shared::Shared;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Changes of names that run at once; further ones wait as futures.
const TASKS_MAX: usize = 1024;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Names {
    catalog: Option<Arc<dyn Catalog>>,
    commits: Option<Commits>,
    /// Every named object that is in memory, each with a handle of its own, so that one that has changed
    /// outlives those of the users.
    table: DashMap<Arc<str>, VMemHandle>,
    turns: turns::Turns,
    next_id: AtomicU64,
    tasks: Arc<Semaphore>,
    frozen: Mutex<Frozen>,
    /// The table was cleared, for good.
    cleared: AtomicBool,
}

/// What the catalog no longer leads to, while somebody copies what it led to.
#[derive(Debug, Default)]
struct Frozen {
    snapshots: usize,
    limbo: Vec<DiskMap>,
}

impl Names {
    /// Starts what commits, if there is a catalog, on the current runtime.
    pub(crate) fn start(catalog: Option<Arc<dyn Catalog>>, disk: &Arc<dyn DiskBackend>) -> Self {
        let commits = catalog.as_ref().map(|catalog| Commits::start(catalog.clone(), disk.clone()));
        Names {
            next_id: AtomicU64::new(catalog.as_ref().map_or(0, |catalog| catalog.next_id())),
            catalog,
            commits,
            table: DashMap::new(),
            turns: turns::Turns::default(),
            tasks: Arc::new(Semaphore::new(TASKS_MAX)),
            frozen: Mutex::default(),
            cleared: AtomicBool::new(false),
        }
    }

    /// The catalog.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` for a store over backends that have none.
    pub(crate) fn catalog(&self) -> Result<&Arc<dyn Catalog>> {
        self.catalog.as_ref().ok_or_else(|| VirtualMemoryError::TierNotAvailable {
            tier: MemoryTier::Disk,
            reason: "these backends have no catalog of names".into(),
        })
    }

    /// The object of this name, if it is in memory.
    pub(crate) fn get(&self, name: &str) -> Option<VMemHandle> {
        self.table.get(name).map(|handle| handle.clone())
    }

    /// Commits, together with whatever else waits for that.
    pub(crate) async fn commit(
        &self,
        changes: Vec<CatalogChange>,
        new_data: bool,
    ) -> std::result::Result<(), NotCommitted> {
        match &self.commits {
            Some(commits) => commits.commit(changes, new_data).await,
            None => Err(NotCommitted::not(VirtualMemoryError::Closed)),
        }
    }

    /// Changes that were made durable, and the commits that did it.
    pub(crate) fn committed(&self) -> (u64, u64) {
        self.commits.as_ref().map_or((0, 0), Commits::committed)
    }

    pub(crate) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// The right to run one change.
    pub(crate) async fn task(&self) -> Result<OwnedSemaphorePermit> {
        self.tasks.clone().acquire_owned().await.map_err(|_| VirtualMemoryError::Closed)
    }

    /// Names of objects in memory that the catalog does not know, in order.
    pub(crate) fn volatile(&self, prefix: &str) -> BTreeMap<Arc<str>, CatalogRecord> {
        let new = |handle: &VMemHandle| {
            let object = handle.object();
            object.named.get().is_some_and(|named| !named.is_durable())
        };
        self.table
            .iter()
            .filter(|entry| entry.key().starts_with(prefix) && new(entry.value()))
            .map(|entry| {
                let object = entry.value().object();
                (entry.key().clone(), persist::new_record(object, 0))
            })
            .collect()
    }

    /// Every named object in memory, in the order of their names.
    pub(crate) fn all(&self) -> Vec<(Arc<str>, VMemHandle)> {
        let mut all: Vec<_> =
            self.table.iter().map(|entry| (entry.key().clone(), entry.value().clone())).collect();
        all.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        all
    }

    /// Lets the objects go; at the end of the store. Each holds the store, which holds the table.
    pub(crate) fn clear(&self) {
        self.cleared.store(true, Ordering::SeqCst);
        // Not inside of the table: the last handle of an object frees it.
        for (name, handle) in self.all() {
            self.table.remove(&name);
            drop(handle);
        }
    }

    /// Puts an object into the table; returns what had the name there.
    fn insert(&self, name: &Arc<str>, handle: VMemHandle) -> Option<VMemHandle> {
        let before = self.table.insert(name.clone(), handle);
        if self.cleared.load(Ordering::SeqCst) {
            // The store has ended meanwhile, and nobody would take it out again.
            drop(self.table.remove(name));
        }
        before
    }

    /// A version that the catalog named no longer, or one that it names without these chunks.
    fn retire(&self, old: DiskMap, len: usize, new: &DiskMap) {
        persist::let_go(&old, len, new);
        let mut frozen = self.frozen.lock();
        if frozen.snapshots > 0 {
            frozen.limbo.push(old);
        } else {
            drop(frozen);
            drop(old);
        }
    }

    /// Until the guard goes, the space of nothing that is committed now is given to others.
    pub(crate) fn freeze(shared: &Arc<Shared>) -> Freeze {
        shared.names.frozen.lock().snapshots += 1;
        Freeze(shared.clone())
    }
}

/// See [`Names::freeze`].
pub(crate) struct Freeze(Arc<Shared>);

impl Drop for Freeze {
    fn drop(&mut self) {
        let mut frozen = self.0.names.frozen.lock();
        frozen.snapshots -= 1;
        let limbo = match frozen.snapshots {
            0 => std::mem::take(&mut frozen.limbo),
            _ => Vec::new(),
        };
        drop(frozen);
        drop(limbo);
    }
}

/// # Errors
///
/// `InvalidConfig` for a name that is empty or too long.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let reason = match name.len() {
        0 => "a name has at least one byte".into(),
        len if len > NAME_LEN_MAX => {
            format!("a name has at most {NAME_LEN_MAX} bytes, this one has {len}").into()
        }
        _ => return Ok(()),
    };
    Err(VirtualMemoryError::InvalidConfig { field: "name", reason })
}

/// What has the name, from memory or from the catalog.
///
/// # Errors
///
/// What the catalog says; `TierNotAvailable` for an object whose home is not there.
pub(crate) async fn find(shared: &Arc<Shared>, turn: &Turn) -> Result<Option<VMemHandle>> {
    let name = turn.name();
    if let Some(handle) = shared.names.get(name) {
        return Ok(Some(handle));
    }
    match shared.names.catalog()?.find(name.clone()).await? {
        None => Ok(None),
        Some(stored) => bring_in(shared, name, stored).await.map(Some),
    }
}

/// Makes an object of what the catalog has.
async fn bring_in(
    shared: &Arc<Shared>,
    name: &Arc<str>,
    stored: CatalogObject,
) -> Result<VMemHandle> {
    let CatalogObject { record, chunks } = stored;
    let len = usize::try_from(record.len).map_err(|_| VirtualMemoryError::ExceedsCapacity {
        tier: MemoryTier::Disk,
        requested_bytes: record.len,
        capacity_bytes: usize::MAX as u64,
    })?;
    let adopt = |(index, chunk): (usize, Option<_>)| match chunk {
        None => Ok(None),
        Some(chunk) => shared.disk.adopt(chunk_len(len, index), chunk).map(Some),
    };
    let adopted = chunks.into_iter().enumerate().map(adopt).collect::<std::result::Result<_, _>>();
    let map =
        DiskMap::of_some(adopted.map_err(|error: DiskError| shared.disk_error(record.id, error))?);
    let handle = VMemHandle::adopt(shared.create(len, record.home));
    let object = handle.object();
    let pass = object.gate(&shared.deadline()).await?;
    shared.announce(object);
    object.with_disk(&pass, |disk, _| *disk = map.clone());
    drop(pass);
    object.name(Named::stored(name.clone(), Durable { record, map }));
    drop(shared.names.insert(name, handle.clone()));
    Ok(handle)
}

/// Gives a name to an object that has none; no change of the catalog.
pub(crate) fn call(shared: &Shared, turn: &Turn, handle: &VMemHandle) {
    handle.object().name(Named::new(turn.name().clone()));
    drop(shared.names.insert(turn.name(), handle.clone()));
}

/// Gives the name to a version that has none, durably, and takes it from whatever had it.
pub(crate) async fn replace(shared: &Arc<Shared>, turn: &Turn, handle: &VMemHandle) -> Result<()> {
    let before = find(shared, turn).await?;
    let object = handle.object();
    let durable = persist::store(shared, turn, object, None).await?;
    object.name(Named::stored(turn.name().clone(), durable));
    drop(shared.names.insert(turn.name(), handle.clone()));
    if let Some(before) = before {
        lose_name(shared, before.object());
    }
    Ok(())
}

/// Moves what has one name to another, durably; whatever had that one loses it.
pub(crate) async fn rename(shared: &Arc<Shared>, from: &Turn, to: &Turn) -> Result<()> {
    let moved = find_or_error(shared, from).await?;
    let before = find(shared, to).await?;
    persist(shared, from, moved.object()).await?;
    let change = CatalogChange::Rename { from: from.name().clone(), to: to.name().clone() };
    shared.names.commit(vec![change], false).await.map_err(|why| why.error)?;
    if let Some(named) = moved.object().named.get() {
        named.rename(to.name().clone());
    }
    drop(shared.names.table.remove(from.name()));
    let replaced = shared.names.insert(to.name(), moved);
    if let Some(before) = before {
        lose_name(shared, before.object());
    }
    drop(replaced);
    Ok(())
}

/// Forgets the name, durably.
pub(crate) async fn remove(shared: &Arc<Shared>, turn: &Turn) -> Result<()> {
    let handle = find_or_error(shared, turn).await?;
    if handle.object().named.get().is_some_and(|named| named.is_durable()) {
        let change = CatalogChange::Remove { name: turn.name().clone() };
        shared.names.commit(vec![change], false).await.map_err(|why| why.error)?;
    }
    drop(shared.names.table.remove(turn.name()));
    lose_name(shared, handle.object());
    Ok(())
}

/// Stores metadata beside the name, durably.
pub(crate) async fn set_metadata(
    shared: &Arc<Shared>,
    turn: &Turn,
    metadata: bytes::Bytes,
) -> Result<()> {
    let handle = find_or_error(shared, turn).await?;
    let object = handle.object();
    persist(shared, turn, object).await?;
    let Some(named) = object.named.get() else { return Err(object.not_found()) };
    let Some(mut record) = named.record() else { return Err(object.not_found()) };
    record.metadata = metadata;
    let change = CatalogChange::Put { name: turn.name().clone(), record: record.clone() };
    shared.names.commit(vec![change], false).await.map_err(|why| why.error)?;
    named.set_record(record);
    Ok(())
}

/// What has the name.
///
/// # Errors
///
/// `NameNotFound`, and those of [`find`].
pub(crate) async fn find_or_error(shared: &Arc<Shared>, turn: &Turn) -> Result<VMemHandle> {
    let found = find(shared, turn).await?;
    found.ok_or_else(|| VirtualMemoryError::NameNotFound { name: turn.name().clone() })
}

/// The catalog does not lead to this version any more: its space goes with its last handle.
fn lose_name(shared: &Shared, object: &Arc<Object>) {
    let Some(named) = object.named.get() else { return };
    if let Some(durable) = named.lose() {
        shared.names.retire(durable.map, object.len, &DiskMap::Empty);
    }
}
