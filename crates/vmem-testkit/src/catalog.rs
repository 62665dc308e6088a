//! A catalog of names in memory, with a clock of its own; and any catalog, with a bound on the
//! closed names in memory.
//!
//! Invariant: of the simulated one, what `commit` has returned from its call is what every later
//! call sees, and what a restart finds, since a change is applied at the call, all of it or
//! nothing; the answer comes a turn of the runtime later, so that others run in between. Called by
//! tests that have core let names leave memory at once, or that need no file.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use vmem_core::VirtualMemoryError;
use vmem_core::backend::{
    Answer, CHUNK_BYTES, Catalog, CatalogChange, CatalogObject, CatalogRecord, SEGMENT_CHUNKS,
    StoredChunk,
};

type Result<T> = std::result::Result<T, VirtualMemoryError>;
type Segment = Vec<Option<StoredChunk>>;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct SimCatalog {
    state: Mutex<State>,
}

#[derive(Clone, Debug, Default)]
struct State {
    names: BTreeMap<Arc<str>, CatalogRecord>,
    segments: BTreeMap<(u64, u32), Segment>,
    next_id: u64,
    attempts: u64,
    ticks: u64,
    closed: bool,
}

impl SimCatalog {
    /// An empty one.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What a restart finds.
    pub fn reopened(&self) -> Arc<Self> {
        let state = State { closed: false, attempts: 0, ..self.state.lock().clone() };
        Arc::new(SimCatalog { state: Mutex::new(state) })
    }

    /// Offset and footprint of every extent to which it leads, in the order of the file.
    pub fn taken(&self) -> Vec<(u64, u32)> {
        let state = self.state.lock();
        let chunks = state.segments.values().flatten().flatten();
        let runs =
            chunks.flat_map(|chunk| chunk.runs.iter().map(|run| (run.offset, run.footprint)));
        let mut taken: Vec<_> = runs.collect();
        taken.sort_unstable();
        taken
    }

    fn answer<T: Send + 'static>(&self, work: impl FnOnce(&mut State) -> Result<T>) -> Answer<T> {
        let mut state = self.state.lock();
        let outcome = if state.closed { Err(VirtualMemoryError::Closed) } else { work(&mut state) };
        drop(state);
        Box::pin(async move {
            tokio::task::yield_now().await;
            outcome
        })
    }
}

impl State {
    fn apply(&mut self, change: CatalogChange) -> Result<()> {
        match change {
            CatalogChange::Put { name, record } => {
                self.next_id = self.next_id.max(record.id.max(record.version) + 1);
                self.put(name, record);
            }
            CatalogChange::Segment { id, segment, chunks } => {
                self.segments.insert((id, segment), chunks);
            }
            CatalogChange::Rename { from, to } => {
                let record = self.take(&from)?;
                self.put(to, record);
            }
            CatalogChange::Remove { name } => {
                let record = self.take(&name)?;
                self.forget(record.id);
            }
        }
        Ok(())
    }

    fn put(&mut self, name: Arc<str>, record: CatalogRecord) {
        let id = record.id;
        if let Some(before) = self.names.insert(name, record).filter(|before| before.id != id) {
            self.forget(before.id);
        }
    }

    fn take(&mut self, name: &Arc<str>) -> Result<CatalogRecord> {
        let reason = format!("{name:?}: has gone").into();
        let gone = VirtualMemoryError::Damaged { path: PathBuf::from("simulated"), reason };
        self.names.remove(name).ok_or(gone)
    }

    fn forget(&mut self, id: u64) {
        self.segments.retain(|&(of, _), _| of != id);
    }

    fn find(&self, name: &str) -> Option<CatalogObject> {
        let record = self.names.get(name)?.clone();
        let count = record.len.div_ceil(CHUNK_BYTES as u64).div_ceil(SEGMENT_CHUNKS as u64).max(1);
        let segments = (0..count as u32).map(|segment| self.segments.get(&(record.id, segment)));
        let chunks = segments.flat_map(|segment| segment.cloned().unwrap_or_default()).collect();
        Some(CatalogObject { record, chunks })
    }
}

impl Catalog for SimCatalog {
    fn commit(&self, changes: Vec<CatalogChange>) -> Answer<()> {
        self.answer(|state| {
            state.attempts += 1;
            let mut after = state.clone();
            changes.into_iter().try_for_each(|change| after.apply(change))?;
            *state = after;
            Ok(())
        })
    }

    fn attempts(&self) -> u64 {
        self.state.lock().attempts
    }

    fn is_poisoned(&self) -> bool {
        false
    }

    fn is_shut(&self) -> bool {
        false
    }

    fn find(&self, name: Arc<str>) -> Answer<Option<CatalogObject>> {
        self.answer(|state| Ok(state.find(&name)))
    }

    fn record(&self, name: Arc<str>) -> Answer<Option<CatalogRecord>> {
        self.answer(|state| Ok(state.names.get(&name).cloned()))
    }

    fn names(
        &self,
        prefix: Arc<str>,
        from: Bound<Arc<str>>,
        limit: usize,
    ) -> Answer<Vec<(Arc<str>, CatalogRecord)>> {
        self.answer(|state| {
            let from = from.as_ref().map(|from| &**from);
            let names = state.names.range::<str, _>((from, Bound::Unbounded));
            let names = names.filter(|(name, _)| name.starts_with(&*prefix));
            Ok(names.take(limit).map(|(name, record)| (name.clone(), record.clone())).collect())
        })
    }

    /// A millisecond later at each call.
    fn time(&self) -> SystemTime {
        let mut state = self.state.lock();
        state.ticks += 1;
        SystemTime::UNIX_EPOCH + Duration::from_millis(state.ticks)
    }

    fn snapshot(&self, directory: PathBuf) -> Answer<()> {
        let reason = format!("{}: a simulated catalog has no files", directory.display());
        let refused = VirtualMemoryError::invalid_config("directory", reason);
        Box::pin(std::future::ready(Err(refused)))
    }

    fn next_id(&self) -> u64 {
        self.state.lock().next_id
    }

    fn close(&self) -> Answer<()> {
        self.state.lock().closed = true;
        Box::pin(std::future::ready(Ok(())))
    }
}

/// A catalog that has core keep a given number of closed names in memory, for tests of how the
/// others leave it.
#[derive(Debug)]
pub struct ClosedNames(pub Arc<dyn Catalog>, pub usize);

impl Catalog for ClosedNames {
    crate::hand_on!(
        commit,
        attempts,
        is_poisoned,
        is_shut,
        find,
        record,
        names,
        time,
        snapshot,
        next_id,
        close
    );

    fn closed_names_max(&self) -> usize {
        self.1
    }

    fn check(&self) -> Answer<()> {
        self.0.check()
    }
}

/// Methods of a [`Catalog`] that a decorator hands on to the catalog in its field `0`, by their
/// names.
#[macro_export]
macro_rules! hand_on {
    ($($method:ident),+ $(,)?) => { $($crate::hand_on!(@$method);)+ };
    (@commit) => {
        fn commit(
            &self,
            changes: Vec<$crate::catalog::parts::CatalogChange>,
        ) -> $crate::catalog::parts::Answer<()> {
            self.0.commit(changes)
        }
    };
    (@attempts) => {
        fn attempts(&self) -> u64 {
            self.0.attempts()
        }
    };
    (@is_poisoned) => {
        fn is_poisoned(&self) -> bool {
            self.0.is_poisoned()
        }
    };
    (@is_shut) => {
        fn is_shut(&self) -> bool {
            self.0.is_shut()
        }
    };
    (@find) => {
        fn find(
            &self,
            name: std::sync::Arc<str>,
        ) -> $crate::catalog::parts::Answer<Option<$crate::catalog::parts::CatalogObject>> {
            self.0.find(name)
        }
    };
    (@record) => {
        fn record(
            &self,
            name: std::sync::Arc<str>,
        ) -> $crate::catalog::parts::Answer<Option<$crate::catalog::parts::CatalogRecord>> {
            self.0.record(name)
        }
    };
    (@names) => {
        fn names(
            &self,
            prefix: std::sync::Arc<str>,
            from: std::ops::Bound<std::sync::Arc<str>>,
            limit: usize,
        ) -> $crate::catalog::parts::Answer<
            Vec<(std::sync::Arc<str>, $crate::catalog::parts::CatalogRecord)>,
        > {
            self.0.names(prefix, from, limit)
        }
    };
    (@time) => {
        fn time(&self) -> std::time::SystemTime {
            self.0.time()
        }
    };
    (@snapshot) => {
        fn snapshot(&self, directory: std::path::PathBuf) -> $crate::catalog::parts::Answer<()> {
            self.0.snapshot(directory)
        }
    };
    (@next_id) => {
        fn next_id(&self) -> u64 {
            self.0.next_id()
        }
    };
    (@close) => {
        fn close(&self) -> $crate::catalog::parts::Answer<()> {
            self.0.close()
        }
    };
}

#[doc(hidden)]
pub mod parts {
    pub use vmem_core::backend::{Answer, CatalogChange, CatalogObject, CatalogRecord};
}
