//! The tables of the catalog: what a change does to their rows, and what all rows together must be.
//!
//! Invariant: after each commit there is one head, which counts the names; each name leads to an
//! object and has a version, no two to or of the same; each object has all of its segments, and no
//! segment is without one. Called by the catalog on its threads.

use std::io::ErrorKind;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTable, Table, TableDefinition, WriteTransaction};
use vmem_core::VirtualMemoryError;
use vmem_core::backend::{
    CHUNK_BYTES, CatalogChange, CatalogObject, CatalogRecord, SEGMENT_CHUNKS,
};

use super::rows::{self, FORMAT, Head};

const HEAD: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("head");
pub(super) const NAMES: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("names");
pub(super) const CHUNKS: TableDefinition<'static, (u64, u32), &[u8]> =
    TableDefinition::new("chunks");

const HEAD_KEY: &[u8] = b"store";

/// Why the tables did not do what was asked.
#[derive(Debug)]
pub(super) enum Failure {
    /// What is stored is not what was written.
    Damaged(String),
    /// Another version of the format.
    Format(u32),
    /// The operating system refused.
    Io(std::io::Error),
}

impl Failure {
    /// As the user sees it.
    pub(super) fn public(self, operation: &'static str, path: &Path) -> VirtualMemoryError {
        let path = path.to_owned();
        match self {
            Failure::Damaged(reason) => VirtualMemoryError::Damaged { path, reason: reason.into() },
            Failure::Format(found) => {
                VirtualMemoryError::UnknownFormat { path, found, known: FORMAT }
            }
            Failure::Io(error) => VirtualMemoryError::io(operation, error),
        }
    }
}

impl<E: Into<redb::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        match error.into() {
            // It is no file of redb's, or has been cut.
            redb::Error::Io(error)
                if matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof) =>
            {
                Failure::Damaged(error.to_string())
            }
            redb::Error::Io(error) => Failure::Io(error),
            redb::Error::Corrupted(reason) => Failure::Damaged(reason),
            error @ (redb::Error::UpgradeRequired(_) | redb::Error::TableDoesNotExist(_)) => {
                Failure::Damaged(error.to_string())
            }
            error => Failure::Io(std::io::Error::other(error)),
        }
    }
}

pub(super) fn flaw(of: impl std::fmt::Display, flaw: rows::Flaw) -> Failure {
    Failure::Damaged(format!("{of}: {flaw}"))
}

pub(super) fn text(name: &[u8]) -> Result<Arc<str>, Failure> {
    let name = std::str::from_utf8(name).map_err(|_| flaw("a name", "is no text"))?;
    Ok(name.into())
}

/// Begins an empty catalog.
pub(super) fn begin(db: &Database, block_bytes: u32) -> Result<Head, Failure> {
    let head = Head { format: FORMAT, block_bytes, ..Head::default() };
    let mut change = db.begin_write()?;
    change.set_two_phase_commit(true);
    change.open_table(NAMES)?;
    change.open_table(CHUNKS)?;
    change.open_table(HEAD)?.insert(HEAD_KEY, &*head.encode(HEAD_KEY))?;
    change.commit()?;
    Ok(head)
}

/// Applies the changes and commits them.
pub(super) fn commit(
    db: &Database,
    mut head: Head,
    changes: &[CatalogChange],
) -> Result<Head, Failure> {
    let mut transaction = db.begin_write()?;
    // Else redb takes a last commit that was damaged later for one that was cut off, and forgets
    // it.
    transaction.set_two_phase_commit(true);
    head.commits += 1;
    apply(&transaction, &mut head, changes)?;
    transaction.commit()?;
    Ok(head)
}

fn apply(
    transaction: &WriteTransaction,
    head: &mut Head,
    changes: &[CatalogChange],
) -> Result<(), Failure> {
    let mut names = transaction.open_table(NAMES)?;
    let mut chunks = transaction.open_table(CHUNKS)?;
    for change in changes {
        match change {
            CatalogChange::Put { name, record } => {
                put(&mut names, &mut chunks, head, name.as_bytes(), record)?;
                let last = record.id.max(record.version);
                head.next_id = head.next_id.max(last.saturating_add(1));
            }
            CatalogChange::Segment { id, segment, chunks: places } => {
                let key = (*id, *segment);
                chunks.insert(key, &*rows::encode_segment(key, places))?;
            }
            CatalogChange::Rename { from, to } => {
                let record = take(&mut names, from)?;
                head.names -= 1;
                put(&mut names, &mut chunks, head, to.as_bytes(), &record)?;
            }
            CatalogChange::Remove { name } => {
                let record = take(&mut names, name)?;
                head.names -= 1;
                forget(&mut chunks, &record)?;
            }
        }
    }
    let mut heads = transaction.open_table(HEAD)?;
    heads.insert(HEAD_KEY, &*head.encode(HEAD_KEY))?;
    Ok(())
}

type Names<'a> = Table<'a, &'static [u8], &'static [u8]>;
type Chunks<'a> = Table<'a, (u64, u32), &'static [u8]>;

fn put(
    names: &mut Names<'_>,
    chunks: &mut Chunks<'_>,
    head: &mut Head,
    name: &[u8],
    record: &CatalogRecord,
) -> Result<(), Failure> {
    let before = match names.insert(name, &*rows::encode_record(name, record))? {
        None => None,
        Some(row) => {
            Some(rows::decode_record(name, row.value()).map_err(|why| flaw("a name", why))?)
        }
    };
    match before {
        None => head.names += 1,
        Some(before) if before.id != record.id => forget(chunks, &before)?,
        Some(_) => {}
    }
    Ok(())
}

fn take(names: &mut Names<'_>, name: &Arc<str>) -> Result<CatalogRecord, Failure> {
    let Some(row) = names.remove(name.as_bytes())? else {
        return Err(flaw(format!("{name:?}"), "has gone"));
    };
    rows::decode_record(name.as_bytes(), row.value()).map_err(|why| flaw(format!("{name:?}"), why))
}

fn forget(chunks: &mut Chunks<'_>, record: &CatalogRecord) -> Result<(), Failure> {
    for segment in 0..segment_count(record.len) {
        chunks.remove((record.id, segment))?;
    }
    Ok(())
}

/// An object of no bytes has a segment too.
pub(super) fn segment_count(len: u64) -> u32 {
    let chunks = len.div_ceil(CHUNK_BYTES as u64);
    u32::try_from(chunks.div_ceil(SEGMENT_CHUNKS as u64).max(1)).unwrap_or(u32::MAX)
}

/// How many chunks a segment of an object has.
pub(super) fn chunks_in(len: u64, segment: u32) -> usize {
    let chunks = len.div_ceil(CHUNK_BYTES as u64) as usize;
    chunks.saturating_sub(segment as usize * SEGMENT_CHUNKS).min(SEGMENT_CHUNKS)
}

/// What has this name.
pub(super) fn find(db: &Database, name: &str) -> Result<Option<CatalogObject>, Failure> {
    let transaction = db.begin_read()?;
    let names = transaction.open_table(NAMES)?;
    let Some(row) = names.get(name.as_bytes())? else { return Ok(None) };
    let record = rows::decode_record(name.as_bytes(), row.value())
        .map_err(|why| flaw(format!("{name:?}"), why))?;
    let segments = transaction.open_table(CHUNKS)?;
    let mut chunks = Vec::with_capacity(record.len.div_ceil(CHUNK_BYTES as u64) as usize);
    for segment in 0..segment_count(record.len) {
        let key = (record.id, segment);
        let bad = |why| flaw(format!("segment {segment} of {name:?}"), why);
        let row = segments.get(key)?.ok_or_else(|| bad("has gone"))?;
        let part = rows::decode_segment(key, row.value()).map_err(bad)?;
        if part.len() != chunks_in(record.len, segment) {
            return Err(bad("has another length"));
        }
        chunks.extend(part);
    }
    Ok(Some(CatalogObject { record, chunks }))
}

/// The record of this name.
pub(super) fn record(db: &Database, name: &str) -> Result<Option<CatalogRecord>, Failure> {
    let transaction = db.begin_read()?;
    let names = transaction.open_table(NAMES)?;
    let Some(row) = names.get(name.as_bytes())? else { return Ok(None) };
    let record = rows::decode_record(name.as_bytes(), row.value());
    record.map(Some).map_err(|why| flaw(format!("{name:?}"), why))
}

/// A page of names.
pub(super) fn names(
    db: &Database,
    prefix: &str,
    from: Bound<&str>,
    limit: usize,
) -> Result<Vec<(Arc<str>, CatalogRecord)>, Failure> {
    let transaction = db.begin_read()?;
    let table = transaction.open_table(NAMES)?;
    let from = match from.map(str::as_bytes) {
        Bound::Included(from) | Bound::Excluded(from) if from < prefix.as_bytes() => {
            Bound::Included(prefix.as_bytes())
        }
        Bound::Unbounded => Bound::Included(prefix.as_bytes()),
        from => from,
    };
    let mut page = Vec::new();
    for row in table.range::<&[u8]>((from, Bound::Unbounded))? {
        let (name, record) = row?;
        let name = name.value();
        if !name.starts_with(prefix.as_bytes()) || page.len() == limit {
            break;
        }
        let record =
            rows::decode_record(name, record.value()).map_err(|why| flaw("a name", why))?;
        page.push((text(name)?, record));
    }
    Ok(page)
}

/// The head row.
pub(super) fn head(db: &Database) -> Result<Head, Failure> {
    let transaction = db.begin_read()?;
    let heads = transaction.open_table(HEAD)?;
    let row = heads.get(HEAD_KEY)?.ok_or_else(|| flaw("the head", "has gone"))?;
    let head = Head::decode(HEAD_KEY, row.value()).map_err(|why| flaw("the head", why))?;
    if head.format != FORMAT {
        return Err(Failure::Format(head.format));
    }
    Ok(head)
}

/// Calls `each` for every name whose rows are whole, in order, up to the first error that it
/// returns; says how many names were not.
pub(super) fn each_object(
    db: &Database,
    mut each: impl FnMut(&str, CatalogObject) -> Result<(), Failure>,
) -> Result<Vec<String>, Failure> {
    let mut unreadable = Vec::new();
    let transaction = db.begin_read()?;
    for row in transaction.open_table(NAMES)?.iter()? {
        let (name, _) = row?;
        let Ok(name) = std::str::from_utf8(name.value()) else {
            unreadable.push(String::from_utf8_lossy(name.value()).into_owned());
            continue;
        };
        match find(db, name) {
            Ok(Some(object)) => each(name, object)?,
            Ok(None) | Err(Failure::Damaged(_)) => unreadable.push(name.to_owned()),
            Err(error) => return Err(error),
        }
    }
    Ok(unreadable)
}

/// Copies every row of one moment into an empty catalog. Before they are committed `bytes_first`
/// sees to the extents to which they lead, in the order of the file.
pub(super) fn copy(
    from: &Database,
    into: &Database,
    bytes_first: impl FnOnce(Vec<(u64, u32)>) -> std::io::Result<()>,
) -> Result<(), Failure> {
    let source = from.begin_read()?;
    let mut target = into.begin_write()?;
    target.set_two_phase_commit(true);
    let mut taken = Vec::new();
    {
        let mut names = target.open_table(NAMES)?;
        for row in source.open_table(NAMES)?.iter()? {
            let (name, record) = row?;
            names.insert(name.value(), record.value())?;
        }
        let mut chunks = target.open_table(CHUNKS)?;
        for row in source.open_table(CHUNKS)?.iter()? {
            let (key, places) = row?;
            let read = rows::decode_segment(key.value(), places.value());
            let read = read.map_err(|why| flaw("a segment", why))?;
            let runs = read.into_iter().flatten().flat_map(|chunk| chunk.runs);
            taken.extend(runs.map(|run| (run.offset, run.footprint)));
            chunks.insert(key.value(), places.value())?;
        }
        let mut heads = target.open_table(HEAD)?;
        let row = source.open_table(HEAD)?.get(HEAD_KEY)?;
        let row = row.ok_or_else(|| flaw("the head", "has gone"))?;
        heads.insert(HEAD_KEY, row.value())?;
    }
    taken.sort_unstable();
    bytes_first(taken).map_err(Failure::Io)?;
    target.commit()?;
    Ok(())
}

/// Replaces the head row, whatever it says.
#[cfg(test)]
pub(super) fn set_head(db: &Database, head: Head) {
    let change = db.begin_write().unwrap();
    change.open_table(HEAD).unwrap().insert(HEAD_KEY, &*head.encode(HEAD_KEY)).unwrap();
    change.commit().unwrap();
}
