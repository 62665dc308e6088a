//! All rows of the catalog together: what they lead to, and whether they fit each other.
//!
//! Invariant: a summary is returned only if each version has all of its segments and no two have
//! the same space. Called when the catalog is opened, and by `verify`.

use std::collections::{HashMap, HashSet};

use redb::{Database, ReadableDatabase, ReadableTable};
use vmem_core::backend::Run;

use super::rows::{self, Head};
use super::tables::{CHUNKS, Failure, NAMES, chunks_in, flaw, head, segment_count, text};

/// What all rows say together.
#[derive(Debug)]
pub(super) struct Summary {
    pub(super) head: Head,
    /// Offset and footprint of every extent, in bytes, in the order of the file.
    pub(super) taken: Vec<(u64, u32)>,
}

/// Reads every row once.
///
/// # Errors
///
/// `Damaged` for the first row that is not what was written, or rows that do not fit each other.
pub(super) fn summary(db: &Database) -> Result<Summary, Failure> {
    let head = head(db)?;
    let transaction = db.begin_read()?;
    // How many segments of each version are still to come.
    let mut due: HashMap<u64, (u64, u32)> = HashMap::new();
    let mut versions: HashSet<u64> = HashSet::new();
    for row in transaction.open_table(NAMES)?.iter()? {
        let (name, record) = row?;
        let record =
            rows::decode_record(name.value(), record.value()).map_err(|why| flaw("a name", why))?;
        text(name.value())?;
        let segments = segment_count(record.len);
        let used = due.insert(record.id, (record.len, segments)).is_some();
        if used || !versions.insert(record.version) || record.id.max(record.version) >= head.next_id
        {
            return Err(flaw(format!("version {}", record.version), "is another one's"));
        }
    }
    if due.len() as u64 != head.names {
        let found = due.len();
        let names = head.names;
        return Err(Failure::Damaged(format!("only {found} of {names} names were found")));
    }
    let mut taken = Vec::with_capacity(due.len());
    for row in transaction.open_table(CHUNKS)?.iter()? {
        let (key, places) = row?;
        let (id, segment) = key.value();
        let bad = |why| flaw(format!("segment {segment} of object {id}"), why);
        let places = rows::decode_segment((id, segment), places.value()).map_err(bad)?;
        let (len, left) = due.get_mut(&id).ok_or_else(|| bad("has no name"))?;
        if segment >= segment_count(*len) || places.len() != chunks_in(*len, segment) {
            return Err(bad("has another length"));
        }
        *left -= 1;
        let whole_blocks = |run: &Run| {
            run.offset.is_multiple_of(head.block_bytes.into())
                && run.footprint.is_multiple_of(head.block_bytes)
        };
        for run in places.into_iter().flatten().flat_map(|chunk| chunk.runs) {
            if !whole_blocks(&run) {
                return Err(bad("is not of whole blocks"));
            }
            taken.push((run.offset, run.footprint));
        }
    }
    if due.values().any(|&(_, left)| left > 0) {
        return Err(flaw("an object", "has not all of its segments"));
    }
    drop(due);
    taken.sort_unstable();
    let overlap = taken.windows(2).any(|two| two[0].0 + u64::from(two[0].1) > two[1].0);
    if overlap {
        return Err(flaw("two objects", "have the same space"));
    }
    Ok(Summary { head, taken })
}
