//! The named objects: which object has which name in memory, and how changes of names become
//! durable.
//!
//! Invariant: a change of a name holds its turn (`turns.rs`) from the first look at the name until
//! memory says what the catalog says; so changes of one name never overlap, while those of
//! different names share commits (`commits.rs`). Each runs as a task of its own, which goes on if
//! its caller is dropped. The extents that the catalog leads to, or may lead to, are kept: their
//! space is free only after a commit that no longer names them has succeeded.
//!
//! Called by `vmem/named.rs`, and by the actor at its end.

mod changes;
mod closed;
mod commits;
mod follow;
mod persist;
mod table;
mod turns;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::locks::{self, Lock};
use bytes::Bytes;
use dashmap::DashMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub(crate) use changes::{
    Expected, adopt, allocate, find_or_error, record, remove, rename, rename_to_itself, replace,
    set_metadata,
};
pub(crate) use commits::{Commits, NotCommitted};
pub(crate) use persist::{flush, flush_all, persist};
pub(crate) use turns::Turn;

use crate::catalog::{Catalog, CatalogChange, CatalogRecord, METADATA_LEN_MAX, NAME_LEN_MAX};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;
use crate::object::{ExtentMap, Object, Shared};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Changes of names that run at once; further ones wait as futures.
const TASKS_MAX: usize = 1024;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Names {
    pub(crate) shared: Arc<Shared>,
    catalog: Option<Arc<dyn Catalog>>,
    commits: Option<Commits>,
    /// Every named object that is in memory, each with a handle of its own, so that one that has
    /// changed outlives those of the users.
    table: DashMap<Arc<str>, VMemHandle>,
    /// Bytes of the names in the table.
    name_bytes: AtomicU64,
    /// Those in the table that may leave it.
    closed: closed::Closed,
    closed_max: usize,
    turns: turns::Turns,
    next_id: AtomicU64,
    tasks: Arc<Semaphore>,
    frozen: Lock<Frozen, { locks::FROZEN }>,
    /// The table was cleared, for good.
    cleared: AtomicBool,
    /// Set where others change names, too.
    follower: OnceLock<follow::Follower>,
}

/// The extents that the catalog no longer leads to, while a snapshot copies them.
#[derive(Debug, Default)]
struct Frozen {
    snapshots: usize,
    limbo: Vec<ExtentMap>,
}

impl Names {
    /// Starts what commits, if there is a catalog, on the current runtime.
    pub(crate) fn start(shared: &Arc<Shared>, catalog: Option<Arc<dyn Catalog>>) -> Arc<Self> {
        let start = |catalog: &Arc<dyn Catalog>| {
            let told = Arc::downgrade(shared);
            let stops = move |error: &VirtualMemoryError| {
                let shared = told.upgrade().filter(|shared| !shared.is_closed());
                let fault = |shared: &Arc<Shared>| {
                    shared.notices(MemoryTier::of_level(shared.durable_level())).fault(error);
                };
                shared.iter().for_each(fault);
            };
            Commits::start(catalog.clone(), shared.durable().clone(), stops)
        };
        let commits = catalog.as_ref().map(start);
        let names = Arc::new(Names {
            shared: shared.clone(),
            next_id: AtomicU64::new(catalog.as_ref().map_or(0, |catalog| catalog.next_id())),
            closed_max: catalog.as_ref().map_or(0, |catalog| catalog.closed_names_max()),
            catalog,
            commits,
            table: DashMap::new(),
            name_bytes: AtomicU64::new(0),
            closed: closed::Closed::default(),
            turns: turns::Turns::default(),
            tasks: Arc::new(Semaphore::new(TASKS_MAX)),
            frozen: Lock::default(),
            cleared: AtomicBool::new(false),
            follower: OnceLock::new(),
        });
        if let Some(every) = names.catalog.as_ref().and_then(|catalog| catalog.follow_every()) {
            let _ = names.follower.set(follow::Follower::start(&names, every));
        }
        let weak = Arc::downgrade(&names);
        let offer = move |object: &Arc<Object>| {
            if let Some(names) = weak.upgrade() {
                closed::offer(&names, object);
            }
        };
        shared.set_closed_hook(Box::new(offer));
        names
    }

    /// The catalog.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` for a store over backends that have none.
    pub(crate) fn catalog(&self) -> Result<&Arc<dyn Catalog>> {
        self.catalog.as_ref().ok_or_else(|| {
            let reason = "these backends have no catalog of names";
            let tier = MemoryTier::of_level(self.shared.durable_level());
            VirtualMemoryError::tier_not_available(tier, reason)
        })
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

    /// Which commit is under way; none between two.
    pub(crate) fn commit_under_way(&self) -> Option<u64> {
        self.commits.as_ref().and_then(Commits::under_way)
    }

    /// Whether a sync failed, after which nothing is committed any more.
    pub(crate) fn has_stopped(&self) -> bool {
        self.commits.as_ref().is_some_and(Commits::have_stopped)
    }

    fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// The record of an object that has no name yet.
    fn new_record(&self, object: &Object, metadata: Bytes) -> Result<CatalogRecord> {
        let modified = self.catalog()?.time();
        let id = self.next_id();
        let len = object.len as u64;
        Ok(CatalogRecord { id, version: id, modified, len, home: object.home, metadata })
    }

    /// The record of the next version of an object.
    fn new_version(&self, record: CatalogRecord) -> Result<CatalogRecord> {
        let modified = self.catalog()?.time();
        let version = self.next_id();
        assert!(version > record.version, "version {version} follows {}", record.version);
        Ok(CatalogRecord { version, modified, ..record })
    }

    /// The right to run one change.
    pub(crate) async fn task(&self) -> Result<OwnedSemaphorePermit> {
        self.tasks.clone().acquire_owned().await.map_err(|_| VirtualMemoryError::Closed)
    }

    /// A commit of a change of this object's name has failed: if another store has changed what has
    /// the name, the object is without one from now on, and the next look finds what has it.
    fn yield_name(&self, turn: &Turn, object: &Arc<Object>, error: &VirtualMemoryError) {
        use VirtualMemoryError::{NameExists, NameNotFound, VersionChanged};
        let (VersionChanged { name, .. } | NameExists { name } | NameNotFound { name }) = error
        else {
            return;
        };
        let has_it = |handle: &VMemHandle| Arc::ptr_eq(handle.object(), object);
        if name == turn.name() && self.get(name).is_some_and(|handle| has_it(&handle)) {
            object.named().set_taken(error.clone());
            drop(self.take(name));
            changes::lose_name(self, object);
        }
    }

    /// A version that the catalog named no longer, or one that it names without these chunks.
    fn retire(&self, old: ExtentMap, len: usize, new: &ExtentMap) {
        persist::let_go(&old, len, new);
        let mut frozen = self.frozen.lock();
        let is_in_use = frozen.limbo.is_empty() || frozen.snapshots > 0;
        assert!(is_in_use, "no version stays for a snapshot that has ended");
        if frozen.snapshots > 0 {
            frozen.limbo.push(old);
        } else {
            drop(frozen);
            drop(old);
        }
    }

    /// Until the guard goes, the space of nothing that is committed now is given to others.
    pub(crate) fn freeze(self: &Arc<Self>) -> Freeze {
        self.frozen.lock().snapshots += 1;
        Freeze(self.clone())
    }
}

/// See [`Names::freeze`].
pub(crate) struct Freeze(Arc<Names>);

impl Drop for Freeze {
    fn drop(&mut self) {
        let mut frozen = self.0.frozen.lock();
        assert!(frozen.snapshots > 0, "a snapshot ends once");
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
        0 => "a name has at least one byte".to_owned(),
        len if len > NAME_LEN_MAX => {
            format!("a name has at most {NAME_LEN_MAX} bytes, this one has {len}")
        }
        _ => return Ok(()),
    };
    Err(VirtualMemoryError::invalid_config("name", reason))
}

/// # Errors
///
/// `InvalidConfig` for metadata that are too long.
pub(crate) fn check_metadata(metadata: &[u8]) -> Result<()> {
    if metadata.len() <= METADATA_LEN_MAX {
        return Ok(());
    }
    let len = metadata.len();
    let reason = format!("at most {METADATA_LEN_MAX} bytes, not {len}");
    Err(VirtualMemoryError::invalid_config("metadata", reason))
}
