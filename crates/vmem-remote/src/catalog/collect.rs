//! Deletion of generations that nothing can need any more.
//!
//! Invariant: a generation is deleted only if a later one of its name was listed that the object
//! store has had for four times the grace, by its own clock: so the newest, and each that a writer
//! with fresh knowledge could create again, stays, and so does each that led to a segment when a
//! collector of segments might not have seen it. Called by the catalog.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use object_store::path::Path;
use tokio::time::sleep;
use uuid::Uuid;
use vmem_core::{VirtualMemoryError, planted};

use super::inner::Inner;
use super::segments::collect_segments;
use crate::error::RequestError;

/// Objects of one request to delete.
const BATCH: usize = 1000;

/// Graces that a generation stays after another has superseded it.
const STAYS: u32 = 4;

/// Since when the generations of each name are in the bucket.
pub(super) type Listed = HashMap<Arc<str>, BTreeMap<u64, SystemTime>>;

/// Deletes what may be; returns how many generations that were.
///
/// # Errors
///
/// `Io`; what was deleted until then is deleted.
pub(super) async fn collect(inner: Arc<Inner>) -> Result<u64, VirtualMemoryError> {
    let collected = collect_all(&inner).await;
    collected.map_err(|error| error.of_catalog("collect"))
}

/// Collects generations and segments again and again, about this long apart, until the catalog
/// closes or is dropped.
pub(super) async fn keep_collecting(catalog: Weak<Inner>, every: Duration) {
    let closing = catalog.upgrade().map(|inner| inner.closing.clone());
    let Some(closing) = closing else { return };
    let once = async || {
        // Instances that were opened together do not all collect at once.
        let share = Uuid::new_v4().as_u128() as f64 / u128::MAX as f64;
        sleep(every.mul_f64(0.5 + share)).await;
        let Some(inner) = catalog.upgrade() else { return false };
        let collected = match collect(inner.clone()).await {
            Ok(generations) => collect_segments(inner).await.map(|it| (generations, it.deleted)),
            Err(error) => Err(error),
        };
        match collected {
            Ok((generations, segments)) => {
                tracing::debug!(target: "vmem::remote", generations, segments, "collected");
            }
            Err(error) => {
                tracing::warn!(target: "vmem::remote", %error, "a collection failed");
            }
        }
        true
    };
    while closing.run_until_cancelled(once()).await == Some(true) {}
}

async fn collect_all(inner: &Inner) -> Result<u64, RequestError> {
    // Before the listing, so that what is listed as older than that was superseded then.
    let now = time_of_store(inner).await?;
    let stays = if planted!("bucket-forgets-soon") { 1 } else { STAYS };
    let Some(before) = now.checked_sub(inner.client.options().grace * stays) else { return Ok(0) };
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
pub(super) async fn time_of_store(inner: &Inner) -> Result<SystemTime, RequestError> {
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
