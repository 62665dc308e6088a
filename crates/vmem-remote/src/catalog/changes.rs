//! What the changes of one commit make of its names, without a request.
//!
//! Invariant: either all changes can be applied, in their order, or there is an error and nothing
//! is put. Called by `commit`.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::sync::Arc;

use vmem_core::VirtualMemoryError;
use vmem_core::backend::{
    CHUNK_BYTES, CatalogChange, CatalogRecord, METADATA_LEN_MAX, SEGMENT_CHUNKS, StoredChunk,
};

use super::body::{CHUNKS_MAX, Object};
use super::paths::{Paths, shown};
use super::places::{Place, Places};
use crate::lease::SegmentId;

type Result<T> = std::result::Result<T, VirtualMemoryError>;
type Segment = Vec<Option<Place>>;

/// The changes of one commit, with places in the bucket.
#[derive(Debug, Default)]
pub(super) struct Changes {
    steps: Vec<Step>,
    /// By object and number.
    segments: BTreeMap<u64, BTreeMap<u32, Segment>>,
}

#[derive(Debug)]
enum Step {
    Put { name: Arc<str>, record: CatalogRecord },
    Rename { from: Arc<str>, to: Arc<str> },
    Remove { name: Arc<str> },
}

/// What a name stands for while the changes are applied.
#[derive(Clone, Debug)]
pub(super) enum State {
    Absent,
    /// An object that was not read.
    Unread,
    Object(Object),
}

/// An error of a change that no caller may make.
pub(super) fn refused(why: &'static str) -> VirtualMemoryError {
    VirtualMemoryError::io("commit", io::Error::new(io::ErrorKind::InvalidInput, why))
}

impl Changes {
    /// Takes in changes of chunks of this tier.
    ///
    /// # Errors
    ///
    /// `InvalidConfig` for a name that the bucket cannot have; `Io` with `InvalidInput` for a chunk
    /// that has no place in the bucket, or that no record is about.
    pub(super) fn new(
        changes: Vec<CatalogChange>,
        places: &dyn Places,
        paths: &Paths,
    ) -> Result<Self> {
        let mut all = Changes::default();
        for change in changes {
            all.add(change, places)?;
        }
        all.names().iter().try_for_each(|name| paths.check(name))?;
        let records = all.records();
        let ids: BTreeSet<u64> = records.map(|record| record.id).collect();
        match all.segments.keys().all(|id| ids.contains(id)) {
            true => Ok(all),
            false => Err(refused("chunks of an object without its record")),
        }
    }

    fn add(&mut self, change: CatalogChange, places: &dyn Places) -> Result<()> {
        match change {
            CatalogChange::Put { record, .. } if record.metadata.len() > METADATA_LEN_MAX => {
                return Err(refused("metadata that are too long"));
            }
            CatalogChange::Put { name, record } => self.steps.push(Step::Put { name, record }),
            CatalogChange::Rename { from, to } => self.steps.push(Step::Rename { from, to }),
            CatalogChange::Remove { name } => self.steps.push(Step::Remove { name }),
            CatalogChange::Segment { id, segment, chunks } => {
                let chunks = chunks.iter().map(|chunk| place(chunk.as_ref(), places));
                let chunks = chunks.collect::<Result<_>>()?;
                self.segments.entry(id).or_default().insert(segment, chunks);
            }
        }
        Ok(())
    }

    /// The segments of the chunks that are given.
    pub(super) fn given(&self) -> HashSet<SegmentId> {
        let segments = self.segments.values().flat_map(BTreeMap::values);
        segments.flatten().flatten().map(Place::segment_id).collect()
    }

    fn records(&self) -> impl Iterator<Item = &CatalogRecord> {
        self.steps.iter().filter_map(|step| match step {
            Step::Put { record, .. } => Some(record),
            _ => None,
        })
    }

    /// The greatest number that the changes give to an object or a version.
    pub(super) fn last_id(&self) -> u64 {
        self.records().map(|record| record.id.max(record.version)).max().unwrap_or_default()
    }

    /// All names that change.
    pub(super) fn names(&self) -> BTreeSet<Arc<str>> {
        let names = self.steps.iter().flat_map(|step| match step {
            Step::Put { name, .. } | Step::Remove { name } => vec![name],
            Step::Rename { from, to } => vec![from, to],
        });
        names.cloned().collect()
    }

    /// The names whose object as it is must be read.
    pub(super) fn to_read(&self) -> BTreeSet<Arc<str>> {
        let names = self.steps.iter().filter_map(|step| match step {
            Step::Rename { from, .. } => Some(from),
            Step::Put { name, record } if !self.has_all_segments(record) => Some(name),
            _ => None,
        });
        names.cloned().collect()
    }

    fn has_all_segments(&self, record: &CatalogRecord) -> bool {
        let given = self.segments.get(&record.id).map_or(0, BTreeMap::len);
        given as u64 == segments_of(record)
    }

    /// What each name stands for after the changes.
    ///
    /// # Errors
    ///
    /// `Damaged` if a name is removed or renamed that nothing has; `Io` with `InvalidInput` for
    /// chunks that are not those of their object.
    pub(super) fn apply(
        &self,
        mut states: BTreeMap<Arc<str>, State>,
        paths: &Paths,
    ) -> Result<BTreeMap<Arc<str>, State>> {
        for step in &self.steps {
            match step {
                Step::Put { name, record } => {
                    let object = self.object(record, states.get(name))?;
                    states.insert(name.clone(), State::Object(object));
                }
                Step::Rename { from, to } => {
                    let moved = take(&mut states, from, paths)?;
                    states.insert(to.clone(), moved);
                }
                Step::Remove { name } => {
                    take(&mut states, name, paths)?;
                }
            }
        }
        Ok(states)
    }

    /// The object with this record: with the segments that are given, and else those that it has.
    fn object(&self, record: &CatalogRecord, before: Option<&State>) -> Result<Object> {
        let chunks = record.len.div_ceil(CHUNK_BYTES as u64);
        if chunks > CHUNKS_MAX {
            return Err(refused("an object with more chunks than one body has"));
        }
        let chunks = chunks as usize;
        let before = match before {
            Some(State::Object(Object { record: before, places }))
                if before.id == record.id && places.len() == chunks =>
            {
                Some(places)
            }
            _ => None,
        };
        let given = self.segments.get(&record.id);
        let mut places = Vec::with_capacity(chunks);
        for segment in 0..segments_of(record) as u32 {
            let begin = segment as usize * SEGMENT_CHUNKS;
            let range = begin..chunks.min(begin + SEGMENT_CHUNKS);
            let own = given.and_then(|given| given.get(&segment)).map(Vec::as_slice);
            let taken = own.or_else(|| before?.get(range.clone()));
            match taken.filter(|taken| taken.len() == range.len()) {
                Some(taken) => places.extend_from_slice(taken),
                None => return Err(refused("another number of chunks than the object has")),
            }
        }
        Ok(Object { record: record.clone(), places })
    }
}

/// How many segments an object has: one of no bytes has one too.
fn segments_of(record: &CatalogRecord) -> u64 {
    record.len.div_ceil((CHUNK_BYTES * SEGMENT_CHUNKS) as u64).max(1)
}

fn place(chunk: Option<&StoredChunk>, places: &dyn Places) -> Result<Option<Place>> {
    let Some(chunk) = chunk else { return Ok(None) };
    let place = places.place(chunk);
    place.map(Some).ok_or_else(|| refused("a chunk that was not written to the bucket"))
}

/// Takes the name from what has it.
fn take(states: &mut BTreeMap<Arc<str>, State>, name: &Arc<str>, paths: &Paths) -> Result<State> {
    match states.insert(name.clone(), State::Absent) {
        None | Some(State::Absent) => Err(VirtualMemoryError::Damaged {
            path: shown(&paths.folder(name)),
            reason: format!("{name:?}: has gone").into(),
        }),
        Some(state) => Ok(state),
    }
}
