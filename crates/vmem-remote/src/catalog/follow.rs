//! Which of the names that a store has in memory other instances have changed.
//!
//! Invariant: a name is reported only if the next commit of it would be refused. A generation that
//! is older than half the grace when it is asked for is looked up anew, since what superseded it
//! may have been deleted; otherwise the one behind it is still there. Called by the catalog.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::{StreamExt, stream};
use tokio::time::Instant;
use vmem_core::{VirtualMemoryError, planted};

use super::generations::{Generations, Known};
use super::inner::Inner;
use super::lookup::generation;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Names that are asked for at once.
const AT_ONCE: usize = 32;
/// So few names are never listed.
const NAMES_LISTED_MIN: usize = 64;
/// Keys of one answer to a listing.
const PAGE: u64 = 1000;

/// How large the last listing of all names was.
#[derive(Debug, Default)]
pub(super) struct Listed(AtomicU64);

impl Listed {
    /// Whether a listing of all names takes fewer requests than one for each of these, as far as
    /// known.
    fn is_cheaper_than(&self, names: usize) -> bool {
        let pages = self.0.load(Ordering::Relaxed).div_ceil(PAGE);
        names > NAMES_LISTED_MIN && names as u64 > pages
    }
}

/// The errors of [`Catalog::changed`](vmem_core::backend::Catalog::changed).
///
/// # Errors
///
/// `Io` if the names cannot be listed, or none can be asked for; `Closed`.
pub(super) async fn changed(
    inner: Arc<Inner>,
    names: Vec<(Arc<str>, u64)>,
) -> Result<Vec<VirtualMemoryError>> {
    let mut asked = names;
    if inner.listed.is_cheaper_than(asked.len()) {
        let newest = list(&inner, &asked).await?;
        let generations = inner.generations.lock();
        let is_as_known = |name: &Arc<str>| {
            let listed = newest.get(name).copied().unwrap_or_default();
            generations.get(name).is_some_and(|known| listed <= known.newest.number)
        };
        // What is as it was may still differ from what the store has, which costs no request.
        asked.retain(|(name, version)| {
            !is_as_known(name) || difference(&generations, name, *version).is_some()
        });
    }
    let looks = stream::iter(asked).map(|(name, version)| {
        let inner = &inner;
        async move { look(inner, &name, version).await }
    });
    let outcomes: Vec<_> = looks.buffer_unordered(AT_ONCE).collect().await;
    match outcomes.iter().find_map(|outcome| outcome.as_ref().err()) {
        Some(error) if outcomes.iter().all(|outcome| outcome.is_err()) => Err(error.clone()),
        _ => Ok(outcomes.into_iter().flatten().flatten().collect()),
    }
}

/// The newest generation of each of these names that is listed.
async fn list(inner: &Inner, names: &[(Arc<str>, u64)]) -> Result<HashMap<Arc<str>, u64>> {
    let wanted: HashSet<&str> = names.iter().map(|(name, _)| &**name).collect();
    let fold = |(keys, newest): &mut (u64, HashMap<Arc<str>, u64>), path: &_, _| {
        *keys += 1;
        let Some((name, number)) = inner.paths.parse(path) else { return };
        if wanted.contains(&*name) {
            let newest = newest.entry(name).or_default();
            *newest = number.max(*newest);
        }
    };
    let listed = inner.client.scan(inner.paths.names(), fold).await;
    let listed: (u64, _) = listed.map_err(|error| error.of_catalog("list"))?;
    inner.listed.0.store(listed.0, Ordering::Relaxed);
    Ok(listed.1)
}

/// Asks for the generation behind the one that is known of a name.
async fn look(inner: &Inner, name: &Arc<str>, version: u64) -> Result<Option<VirtualMemoryError>> {
    let began = Instant::now();
    let known = {
        let generations = inner.generations.lock();
        let differs = difference(&generations, name, version);
        if differs.is_some() {
            return Ok(differs);
        }
        generations.get(name).cloned()
    };
    let grace = inner.client.options().grace;
    let fresh =
        |known: &Known| known.confirmed.elapsed() <= grace / 2 || planted!("bucket-follows-past");
    match known.filter(|known| fresh(known)) {
        Some(known) => {
            let newest = match inner.newest_behind(name, known.newest.number).await? {
                (_, None) => known.newest,
                (number, Some(bytes)) => generation(number, &inner.decode(name, number, &bytes)?),
            };
            inner.generations.lock().confirm(name, newest, began);
            inner.saw(newest);
        }
        None => inner.confirm(name).await?,
    }
    Ok(difference(&inner.generations.lock(), name, version))
}

/// How the name differs from this version of it, as far as known.
fn difference(
    generations: &Generations,
    name: &Arc<str>,
    version: u64,
) -> Option<VirtualMemoryError> {
    let known = generations.get(name)?;
    if let Err(error) = known.check(name, known.base) {
        return Some(error);
    }
    let name = name.clone();
    match known.base.object {
        Some((_, current)) if current == version => None,
        Some((_, current)) => {
            Some(VirtualMemoryError::VersionChanged { name, expected: version, current })
        }
        None => Some(VirtualMemoryError::NameNotFound { name }),
    }
}
