//! Deletion of generations that nothing can need any more.
//!
//! Invariant: a generation is deleted only if a later one of its name was listed that the object
//! store has had for longer than the grace, by its own clock: so the newest, and each that a writer
//! with fresh knowledge could create again, stays. Called by the catalog.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use object_store::path::Path;
use vmem_core::VirtualMemoryError;

use super::Inner;
use crate::error::RequestError;

/// Objects of one request to delete.
const BATCH: usize = 1000;

/// Since when the generations of each name are in the bucket.
type Listed = HashMap<Arc<str>, BTreeMap<u64, SystemTime>>;

/// Deletes what may be; returns how many generations that were.
///
/// # Errors
///
/// `Io`; what was deleted until then is deleted.
pub(super) async fn collect(inner: Arc<Inner>) -> Result<u64, VirtualMemoryError> {
    let collected = collect_all(&inner).await;
    collected.map_err(|error| error.of_catalog("collect"))
}

async fn collect_all(inner: &Inner) -> Result<u64, RequestError> {
    // Before the listing, so that what is listed as older than that was superseded then.
    let now = time_of_store(inner).await?;
    let Some(before) = now.checked_sub(inner.client.options().grace) else { return Ok(0) };
    let fold = |listed: &mut Listed, path: &Path, put_at| {
        if let Some((name, number)) = inner.paths.parse(path) {
            listed.entry(name).or_default().insert(number, put_at);
        }
    };
    let listed = inner.client.scan(inner.paths.names(), fold).await?;
    let superseded: Vec<Path> = listed
        .iter()
        .flat_map(|(name, generations)| {
            let numbers = superseded(generations, before).into_iter();
            numbers.map(|number| inner.paths.generation(name, number))
        })
        .collect();
    for paths in superseded.chunks(BATCH) {
        inner.client.delete(paths).await?;
    }
    Ok(superseded.len() as u64)
}

/// What time it is for the object store, at least: when it says that an object was put just now.
async fn time_of_store(inner: &Inner) -> Result<SystemTime, RequestError> {
    let path = inner.paths.probe();
    match inner.client.create(&path, &Bytes::from_static(b"time"), |_| ()).await {
        // An earlier try was answered too late.
        Ok(()) | Err(RequestError::Exists) => {}
        Err(error) => return Err(error),
    }
    let read = inner.client.get_whole(&path, 64).await;
    inner.client.delete(std::slice::from_ref(&path)).await?;
    // Without the probe nothing is known of the time, and nothing is deleted.
    Ok(read?.map_or(SystemTime::UNIX_EPOCH, |(_, put_at)| put_at))
}

/// The generations of a name that a later one has superseded before this time.
fn superseded(generations: &BTreeMap<u64, SystemTime>, before: SystemTime) -> Vec<u64> {
    let later = generations.iter().skip(1);
    let pairs = generations.keys().zip(later);
    pairs.filter(|(_, (_, put_at))| **put_at < before).map(|(&number, _)| number).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn newest_generation_and_fresh_ones_stay() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let generations = BTreeMap::from([(3, at(10)), (5, at(20)), (6, at(30)), (7, at(40))]);
        const NONE: [u64; 0] = [];
        assert_eq!(superseded(&generations, at(20)), NONE);
        assert_eq!(superseded(&generations, at(21)), [3]);
        assert_eq!(superseded(&generations, at(31)), [3, 5]);
        assert_eq!(superseded(&generations, at(99)), [3, 5, 6], "all but the newest");
        assert_eq!(superseded(&BTreeMap::from([(1, at(0))]), at(99)), NONE);
        assert_eq!(superseded(&BTreeMap::new(), at(99)), NONE);
    }
}
