//! Commits: the next generation of each name that changes, created once.
//!
//! Invariant: a generation is put only over one that the caller was shown, confirmed no longer than
//! half the grace ago, and only where there is none. All changes are applied in memory before the
//! first is put. Called by the catalog.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::{StreamExt, TryStreamExt, stream};
use tokio::time::Instant;
use vmem_core::{VirtualMemoryError, planted};

use super::attempt::Attempt;
use super::body::{BODY_LEN_MAX, Object, encode};
use super::changes::{Changes, State, refused};
use super::generations::{Generation, Known};
use super::inner::Inner;
use super::lookup::{contended, generation};
use super::places::Place;
use crate::error::RequestError;
use crate::lease::Held;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Names of one commit that are put at once.
const AT_ONCE: usize = 32;
/// Generations that are tried to be created before a commit gives up.
const ROUNDS_MAX: usize = 4;

/// Applies the changes.
///
/// # Errors
///
/// Those of `Catalog::commit`.
pub(super) async fn commit(inner: Arc<Inner>, changes: Changes, given: Option<Held>) -> Result<()> {
    inner.saw_id(changes.last_id());
    inner.leased("commit").await?;
    let began = Instant::now();
    let bases = bases(&inner, &changes).await?;
    if began.elapsed() > inner.client.options().grace / 2 {
        // What they lead to may be deleted by now, unless they are still the newest.
        return Err(contended("commit", "the object store answers too late"));
    }
    let before = bases.iter().map(|(name, (_, state))| (name.clone(), state.clone())).collect();
    let mut objects = Vec::new();
    let mut tombstones = Vec::new();
    for (name, state) in changes.apply(before, &inner.paths)? {
        let base = bases.get(&name).map_or(Generation::NONE, |(base, _)| *base);
        match state {
            State::Object(object) => objects.push(Next { name, base, object: Some(object) }),
            State::Absent => tombstones.push(Next { name, base, object: None }),
            State::Unread => {}
        }
    }
    let places = objects.iter().flat_map(|next| next.object.iter().flat_map(|it| &it.places));
    let led_to: HashSet<_> = places.flatten().map(Place::segment_id).collect();
    let held = inner.hold(led_to)?;
    // The names that lose an object last: after a crash it has two names rather than none.
    let mut attempts = put_all(&inner, objects).await?;
    attempts.extend(put_all(&inner, tombstones).await?);
    attempts.into_iter().for_each(Attempt::acknowledge);
    given.into_iter().chain(held).for_each(Held::settle);
    Ok(())
}

/// What a name is to stand for.
struct Next {
    name: Arc<str>,
    /// What the caller was shown.
    base: Generation,
    /// None for a tombstone.
    object: Option<Object>,
}

/// What the names of a commit stand for, as the caller was shown it.
type Bases = BTreeMap<Arc<str>, (Generation, State)>;

async fn bases(inner: &Inner, changes: &Changes) -> Result<Bases> {
    let to_read = changes.to_read();
    let bases = stream::iter(changes.names()).map(|name| {
        let is_read = to_read.contains(&name);
        async move {
            let known = known(inner, &name).await?;
            known.check(&name, known.base)?;
            let state = match known.base.object {
                None => State::Absent,
                Some(_) if !is_read => State::Unread,
                Some(_) => State::Object(read_base(inner, &name, &known).await?),
            };
            Ok::<_, VirtualMemoryError>((name, (known.base, state)))
        }
    });
    bases.buffer_unordered(AT_ONCE).try_collect().await
}

/// What is known of a name, looked up if that is too old.
async fn known(inner: &Inner, name: &Arc<str>) -> Result<Known> {
    if let Some(known) = inner.generations.lock().get(name)
        && is_fresh(inner, known)
    {
        return Ok(known.clone());
    }
    confirmed(inner, name).await
}

/// What is known of a name once it was looked up.
async fn confirmed(inner: &Inner, name: &Arc<str>) -> Result<Known> {
    inner.confirm(name).await?;
    let known = inner.generations.lock().get(name).cloned();
    known.ok_or_else(|| contended("commit", "the name was forgotten"))
}

fn is_fresh(inner: &Inner, known: &Known) -> bool {
    if planted!("bucket-old-news") {
        return !known.is_unknown();
    }
    !known.is_unknown() && known.confirmed.elapsed() < inner.client.options().grace / 2
}

/// The object that the caller was last shown.
async fn read_base(inner: &Inner, name: &Arc<str>, known: &Known) -> Result<Object> {
    let number = known.base.number;
    let Some(bytes) = inner.read(name, number).await? else {
        // It was superseded long ago.
        confirmed(inner, name).await?.check(name, known.base)?;
        return Err(contended("commit", "what the name stood for was deleted"));
    };
    let object = inner.decode(name, number, &bytes)?.object;
    object.ok_or_else(|| contended("commit", "what the name stood for has gone"))
}

/// Puts the next generation of each of these names; all are tried.
///
/// # Errors
///
/// That of a name of which the outcome is unknown, if there is one, and else the first. What was
/// put is unknown then, since it is a part of no commit.
async fn put_all(inner: &Arc<Inner>, all: Vec<Next>) -> Result<Vec<Attempt>> {
    let puts = all.into_iter().map(|next| put(inner, next));
    let outcomes: Vec<_> = stream::iter(puts).buffered(AT_ONCE).collect().await;
    let mut made = Vec::new();
    let mut failures = Vec::new();
    for outcome in outcomes {
        match outcome {
            Ok(attempt) => made.extend(attempt),
            Err(failure) => failures.push(failure),
        }
    }
    failures.sort_by_key(|failure| !failure.is_unknown);
    match failures.into_iter().next() {
        Some(failure) => Err(failure.error),
        None => Ok(made),
    }
}

/// Why a generation was not put, as far as that is known.
struct Failure {
    error: VirtualMemoryError,
    is_unknown: bool,
}

impl From<VirtualMemoryError> for Failure {
    fn from(error: VirtualMemoryError) -> Self {
        Failure { error, is_unknown: false }
    }
}

/// Puts the next generation of a name; none for a tombstone where there is nothing.
async fn put(
    inner: &Arc<Inner>,
    Next { name, base, object }: Next,
) -> std::result::Result<Option<Attempt>, Failure> {
    for _ in 0..ROUNDS_MAX {
        let known = known(inner, &name).await?;
        known.check(&name, base)?;
        if object.is_none() && known.newest.object.is_none() {
            return Ok(None);
        }
        if let Some(attempt) = put_over(inner, &name, object.as_ref(), &known).await? {
            return Ok(Some(attempt));
        }
    }
    Err(contended("commit", "others change the name all the time").into())
}

/// Creates the next generation of a name; none if there is another there, which is known then.
async fn put_over(
    inner: &Arc<Inner>,
    name: &Arc<str>,
    object: Option<&Object>,
    known: &Known,
) -> std::result::Result<Option<Attempt>, Failure> {
    inner.check_lease("commit")?;
    let version = object.map(|object| (object.record.id, object.record.version));
    let attempt = Attempt::begin(inner, name, known, version);
    let Generation { number, token, .. } = attempt.generation;
    let body = encode(name, number, token, object);
    if body.len() as u64 > BODY_LEN_MAX {
        attempt.refuse();
        return Err(refused("an object with more chunks than one body has").into());
    }
    let path = inner.paths.generation(name, number);
    let is_ambiguous = AtomicBool::new(false);
    let stalled = |error: &RequestError| {
        is_ambiguous.fetch_or(error.is_ambiguous(), Ordering::Relaxed);
    };
    let created = if planted!("bucket-overwrite") {
        inner.client.put(&path, &[body], stalled).await
    } else {
        inner.client.create(&path, &body, stalled).await
    };
    match created {
        Ok(()) => Ok(Some(attempt)),
        Err(RequestError::Exists) => settle(inner, name, attempt, is_ambiguous.into_inner()).await,
        Err(error) => {
            let is_unknown = is_ambiguous.into_inner();
            if !is_unknown {
                attempt.refuse();
            }
            Err(Failure { error: error.of_catalog("commit"), is_unknown })
        }
    }
}

/// Finds out which attempt made the generation that exists: this one, by an earlier try whose
/// outcome was lost, or another.
async fn settle(
    inner: &Arc<Inner>,
    name: &Arc<str>,
    attempt: Attempt,
    is_ambiguous: bool,
) -> std::result::Result<Option<Attempt>, Failure> {
    let number = attempt.generation.number;
    let unknown = |error| Failure { error, is_unknown: true };
    let Some(bytes) = inner.read(name, number).await.map_err(unknown)? else {
        // A conflict of two creates that both failed, or a generation that was deleted meanwhile.
        if is_ambiguous {
            return Err(unknown(contended("commit", "an earlier try may still arrive")));
        }
        attempt.refuse();
        inner.confirm(name).await?;
        return Ok(None);
    };
    let body = match inner.decode(name, number, &bytes) {
        Ok(body) => body,
        Err(error) => {
            // This attempt has written no other format; what is damaged may be its own.
            let is_foreign = matches!(error, VirtualMemoryError::UnknownFormat { .. });
            if is_foreign {
                attempt.refuse();
            }
            return Err(Failure { error, is_unknown: !is_foreign });
        }
    };
    let there = generation(number, &body);
    let is_own = there.token == attempt.generation.token && !planted!("bucket-own-token");
    if is_own {
        return Ok(Some(attempt));
    }
    // It was the newest after the one before it; by now there may be later ones.
    let confirmed = attempt.confirmed;
    attempt.refuse();
    inner.generations.lock().confirm(name, there, confirmed);
    Ok(None)
}
