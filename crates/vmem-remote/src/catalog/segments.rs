//! Deletion of segments to which no name leads and that no instance uses, of all instances.
//!
//! Invariant: a segment is deleted only if no instance had anything of it in its ledger or in a
//! commit when it answered a round about it, and a look at all names after that did not find it.
//! Several instances may collect at once, and one that ends in the middle leaves only its round
//! behind. Called by the catalog.
//!
//! # Why nothing in use is deleted
//!
//! An instance uses a segment from when it puts it, or from when it finds it as what a name leads
//! to, until its ledger has nothing of it and its last commit that leads there has ended for good
//! ([`lease`](crate::lease)). A round asks about segments that are older than the grace, so that
//! nobody puts them any more.
//!
//! Let `G` be the grace, and `c` the time at which the collector begins to read the leases for the
//! last time. What a lease says then is no older than `c - 3/2 G`: half the grace is the most that
//! is taken as its age; another half lies at most between the answer and its put; and half is for a
//! late put that took the place of a later one. If an instance uses a segment later, it found it
//! after that: at a generation that was the newest of its name no more than the grace before its
//! use began. That generation is still in the bucket `4 G` after that, since no generation is
//! deleted sooner after it was superseded, so until `c + 3/2 G` at least. The instance that made it
//! used the segment as well, so either it was made before `c`, or there is another one, which its
//! maker had found, and of these the first was made before `c`. The look at all names begins half
//! the grace after the leases were read, when all listings show what was made until then, and its
//! listing ends before `c + 3/2 G`, or nothing is deleted. So it finds that first generation,
//! whether it is the newest of its name or not.
//!
//! An instance whose lease was not listed opened later than half the grace before `c`, so all that
//! it found it found after that. One that has ended was asked in vain for four times the grace, and
//! then for twice the grace after its end was put, in which the last of its commits arrived.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;
use vmem_core::{VirtualMemoryError, planted};

use super::collect::{Listed, time_of_store};
use super::inner::Inner;
use super::lookup::contended;
use super::paths::shown;
use crate::error::RequestError;
use crate::inner::{root_of, segment_path};
use crate::lease::{
    Answers, CANDIDATES_MAX, LEASE_LEN_MAX, SegmentId, decode_lease, encode_round, entry, id_of,
};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Requests that are made at once.
const AT_ONCE: usize = 16;
/// Objects of one request to delete.
const BATCH: usize = 1000;
/// Graces after which a lease that was not renewed is ended.
const ENDS: u32 = 4;
/// Graces after which nothing of an instance arrives any more once its lease was ended.
const GONE: u32 = 2;
/// Graces that a round waits for its answers: an instance that was killed is ended in that time.
const WAITS: u32 = 8;
/// Graces after which a round is one that nobody ends any more.
const FORGOTTEN: u32 = 16;

/// What a [collection](super::BucketCatalog::collect_segments) has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CollectedSegments {
    /// Segments to which no name led at first, of those that were older than the grace.
    pub candidates: u64,
    /// Of these, the segments that an instance uses, or to which a name led later.
    pub kept: u64,
    /// Of these, the segments that were deleted.
    pub deleted: u64,
}

/// Deletes what may be; returns what that was.
///
/// # Errors
///
/// `Io`, also if an instance does not answer or the object store is too slow; `Damaged` and
/// `UnknownFormat` of a name or a lease. Nothing was deleted then, or a part of it.
pub(super) async fn collect_segments(inner: Arc<Inner>) -> Result<CollectedSegments> {
    let mut names = Names::default();
    let candidates = candidates(&inner, &mut names).await?;
    if candidates.is_empty() {
        return Ok(CollectedSegments::default());
    }
    let round = Uuid::new_v4();
    let path = entry(&inner.leases.rounds, round);
    let body = encode_round(round, &candidates);
    inner.client.create(&path, &body, |_| ()).await.or_else(exists).map_err(of("collect"))?;
    let collected = ask(&inner, round, &candidates, &mut names).await;
    let ended = inner.client.delete(&[path]).await;
    let deleted = collected?;
    ended.map_err(of("collect"))?;
    let candidates = candidates.len() as u64;
    Ok(CollectedSegments { candidates, kept: candidates - deleted, deleted })
}

/// An earlier try has created it, and its answer was lost.
fn exists(error: RequestError) -> std::result::Result<(), RequestError> {
    if error == RequestError::Exists { Ok(()) } else { Err(error) }
}

fn of(operation: &'static str) -> impl Fn(RequestError) -> VirtualMemoryError {
    move |error| error.of_catalog(operation)
}

/// Everything that a listing shows below the prefix.
#[derive(Default)]
struct All {
    names: Listed,
    segments: Vec<(SegmentId, SystemTime)>,
    /// Rounds, and objects by which an opening instance tries the object store.
    short_lived: Vec<(Path, SystemTime)>,
}

/// Segments to which no name leads. What nobody ends any more is deleted on the way.
async fn candidates(inner: &Inner, names: &mut Names) -> Result<Vec<SegmentId>> {
    let grace = inner.client.options().grace;
    let now = time_of_store(inner).await.map_err(of("collect"))?;
    let fold = |all: &mut All, path: &Path, put_at| {
        if let Some((name, number)) = inner.paths.parse(path) {
            all.names.entry(name).or_default().insert(number, put_at);
        } else if let Some(segment) = parse(&inner.prefix, path) {
            all.segments.push((segment, put_at));
        } else if inner.is_short_lived(path) {
            all.short_lived.push((path.clone(), put_at));
        }
    };
    let all: All = inner.client.scan(&inner.prefix, fold).await.map_err(of("list"))?;
    let is_older = |put_at: &SystemTime, graces: u32| *put_at + grace * graces < now;
    let forgotten = all.short_lived.into_iter().filter(|(_, at)| is_older(at, FORGOTTEN));
    let forgotten: Vec<Path> = forgotten.map(|(path, _)| path).collect();
    delete(inner, &forgotten).await?;
    names.read(inner, &all.names, Gone::Ignored).await?;
    let mut candidates: Vec<_> = all
        .segments
        .into_iter()
        .filter(|(segment, put_at)| is_older(put_at, 1) && !names.segments.contains(segment))
        .map(|(segment, _)| segment)
        .collect();
    // Not the same ones each time, if they are more than a round has.
    let at = round_robin(candidates.len());
    candidates.rotate_left(at);
    candidates.truncate(CANDIDATES_MAX);
    Ok(candidates)
}

fn round_robin(candidates: usize) -> usize {
    match candidates > CANDIDATES_MAX {
        true => (Uuid::new_v4().as_u128() % candidates as u128) as usize,
        false => 0,
    }
}

/// Which segment of which instance an object is.
fn parse(prefix: &Path, path: &Path) -> Option<SegmentId> {
    let mut parts = path.prefix_match(prefix)?;
    let id = Uuid::try_parse(parts.next()?.as_ref()).ok()?;
    let number = u64::from_str_radix(parts.next()?.as_ref(), 16).ok()?;
    (*path == segment_path(&root_of(prefix, id), number)).then_some((id, number))
}

/// Asks all instances, looks again at all names, and deletes.
async fn ask(
    inner: &Inner,
    round: Uuid,
    candidates: &[SegmentId],
    names: &mut Names,
) -> Result<u64> {
    let grace = inner.client.options().grace;
    let waits_until = Instant::now() + grace * WAITS;
    let leases = loop {
        let began = Instant::now();
        if let Some(leases) = read_leases(inner, round, candidates.len()).await? {
            break Leases { began, ..leases };
        }
        if began > waits_until {
            return Err(contended("collect", "an instance has not answered"));
        }
        sleep(grace / 16).await;
    };
    if !planted!("sweep-looks-once") {
        sleep_until(Instant::now() + grace / 2).await;
        let listed = list(inner).await?;
        if leases.began.elapsed() > grace * 3 / 2 {
            return Err(contended("collect", "the object store lists too slowly"));
        }
        names.read(inner, &listed, Gone::Refused).await?;
    }
    let unused = candidates.iter().zip(&leases.used).filter(|(_, is_used)| !**is_used);
    let unused = unused.map(|(segment, _)| segment).filter(|it| !names.segments.contains(it));
    let paths: Vec<Path> =
        unused.map(|&(id, number)| segment_path(&root_of(&inner.prefix, id), number)).collect();
    delete(inner, &paths).await?;
    let ended = leases.ended.iter().map(|&id| entry(&inner.leases.instances, id));
    delete(inner, &ended.collect::<Vec<_>>()).await?;
    Ok(paths.len() as u64)
}

async fn delete(inner: &Inner, paths: &[Path]) -> Result<()> {
    for paths in paths.chunks(BATCH) {
        inner.client.delete(paths).await.map_err(of("delete"))?;
    }
    Ok(())
}

async fn list(inner: &Inner) -> Result<Listed> {
    let fold = |listed: &mut Listed, path: &Path, put_at| {
        if let Some((name, number)) = inner.paths.parse(path) {
            listed.entry(name).or_default().insert(number, put_at);
        }
    };
    inner.client.scan(inner.paths.names(), fold).await.map_err(of("list"))
}

/// What all instances have answered.
struct Leases {
    /// When the collector began to read them.
    began: Instant,
    /// Of each candidate whether anybody uses it.
    used: Vec<bool>,
    /// Instances of which nothing comes any more.
    ended: Vec<Uuid>,
}

/// What one has.
enum Lease {
    Answered(Vec<bool>),
    Ended(Uuid),
    /// It was given back since it was listed.
    Gone,
    Waits,
}

/// What all instances have answered to the round; none as long as one has not.
async fn read_leases(inner: &Inner, round: Uuid, candidates: usize) -> Result<Option<Leases>> {
    let began = Instant::now();
    let now = time_of_store(inner).await.map_err(of("collect"))?;
    let folder = &inner.leases.instances;
    let fold = |listed: &mut Vec<Uuid>, path: &Path, _| listed.extend(id_of(folder, path));
    let listed: Vec<Uuid> = inner.client.scan(folder, fold).await.map_err(of("list"))?;
    let reads = stream::iter(listed).map(|id| read_lease(inner, id, round, candidates, now));
    let read: Vec<_> = reads.buffer_unordered(AT_ONCE).try_collect().await?;
    let mut leases = Leases { began, used: vec![false; candidates], ended: Vec::new() };
    for lease in read {
        match lease {
            Lease::Waits if !planted!("sweep-unanswered") => return Ok(None),
            Lease::Waits | Lease::Gone => {}
            Lease::Ended(id) => leases.ended.push(id),
            Lease::Answered(used) => {
                leases.used.iter_mut().zip(used).for_each(|(any, is_used)| *any |= is_used);
            }
        }
    }
    Ok(Some(leases))
}

async fn read_lease(
    inner: &Inner,
    id: Uuid,
    round: Uuid,
    candidates: usize,
    now: SystemTime,
) -> Result<Lease> {
    let grace = inner.client.options().grace;
    let path = entry(&inner.leases.instances, id);
    let read = inner.client.get_whole(&path, LEASE_LEN_MAX).await.map_err(of("get"))?;
    let Some((body, put_at)) = read else { return Ok(Lease::Gone) };
    let age = now.duration_since(put_at).unwrap_or_default();
    if age > grace / 2 {
        return missed(inner, id, age, now).await;
    }
    let damaged = |flaw| VirtualMemoryError::Damaged {
        path: shown(&path),
        reason: format!("a lease: {flaw}").into(),
    };
    let mut answers: Answers = decode_lease(id, &body).map_err(damaged)?;
    let answer = answers.remove(&round).filter(|used| used.len() == candidates);
    Ok(answer.map_or(Lease::Waits, Lease::Answered))
}

/// Of an instance that has not renewed its lease in time: it is ended at last.
async fn missed(inner: &Inner, id: Uuid, age: Duration, now: SystemTime) -> Result<Lease> {
    let grace = inner.client.options().grace;
    let path = entry(&inner.leases.ended, id);
    match inner.client.get_whole(&path, 64).await.map_err(of("get"))? {
        Some((_, ended_at)) if ended_at + grace * GONE < now => Ok(Lease::Ended(id)),
        None if age > grace * ENDS => {
            tracing::warn!(target: "vmem::remote", instance = %id, ?age, "ends a lease");
            let ended = inner.client.create(&path, &"ended".into(), |_| ()).await;
            ended.or_else(exists).map_err(of("collect"))?;
            Ok(Lease::Waits)
        }
        _ => Ok(Lease::Waits),
    }
}

/// What to do about a generation that was listed and is not there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gone {
    Ignored,
    Refused,
}

/// What the generations lead to that were read.
#[derive(Default)]
struct Names {
    segments: HashSet<SegmentId>,
    read: HashMap<Arc<str>, HashSet<u64>>,
}

impl Names {
    /// Reads what was listed and not read so far, whether it is superseded or not.
    async fn read(&mut self, inner: &Inner, listed: &Listed, gone: Gone) -> Result<()> {
        let unread: Vec<_> = listed.iter().flat_map(|(name, of)| self.unread(name, of)).collect();
        let reads = stream::iter(unread).map(|(name, number)| async move {
            let Some(bytes) = inner.read(&name, number).await? else {
                return match gone {
                    Gone::Ignored => Ok((name, number, HashSet::new())),
                    Gone::Refused => Err(contended("collect", "a name was collected meanwhile")),
                };
            };
            let object = inner.decode(&name, number, &bytes)?.object;
            let places = object.iter().flat_map(|object| &object.places).flatten();
            Ok((name, number, places.map(|place| place.segment_id()).collect()))
        });
        let mut reads = reads.buffer_unordered(AT_ONCE);
        while let Some((name, number, segments)) = reads.try_next().await? {
            self.segments.extend(segments);
            self.read.entry(name).or_default().insert(number);
        }
        Ok(())
    }

    fn unread(&self, name: &Arc<str>, listed: &BTreeMap<u64, SystemTime>) -> Vec<(Arc<str>, u64)> {
        let read = self.read.get(name);
        let is_unread = |number: &&u64| !read.is_some_and(|read| read.contains(number));
        listed.keys().filter(is_unread).map(|&number| (name.clone(), number)).collect()
    }
}

impl Inner {
    fn is_short_lived(&self, path: &Path) -> bool {
        let is_probe = path.prefix_match(&self.prefix).is_some_and(|parts| {
            let parts: Vec<_> = parts.collect();
            match &parts[..] {
                [folder, name] => folder.as_ref() == "probes" || name.as_ref() == "probe",
                _ => false,
            }
        });
        is_probe || id_of(&self.leases.rounds, path).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::LeasePaths;

    #[test]
    fn only_segments_are_segments() {
        let prefix = Path::from("a/b");
        let id = Uuid::from_u128(7);
        let path = segment_path(&root_of(&prefix, id), 0x2a);
        assert_eq!(parse(&prefix, &path), Some((id, 0x2a)));
        let root = root_of(&prefix, id);
        for other in ["probe", "2a", "000000000000002A", "000000000000002a/x"] {
            assert_eq!(parse(&prefix, &Path::from(format!("{root}/{other}"))), None, "{other}");
        }
        let leases = LeasePaths::new(&prefix);
        for folder in [&leases.instances, &leases.rounds, &leases.ended] {
            assert_eq!(parse(&prefix, &entry(folder, id)), None);
            assert_eq!(id_of(folder, &entry(folder, id)), Some(id));
            assert_eq!(id_of(folder, &path), None);
        }
        assert_eq!(parse(&prefix, &Path::from("a/names/00/0000000000000001")), None);
    }
}
