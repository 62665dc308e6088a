//! Reads that host memory does not serve.
//!
//! Invariant: whatever such a read takes (space, staging, extents, a place on a link) belongs to a
//! task of the runtime, or lies in a parcel from which it can be taken back. The caller's future
//! holds the parcel, and bytes that are its own. Called by `read.rs`.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};

use super::read::is_copied;
use super::timed::{Read, timed_unless};
use super::{Result, VirtualMemory};
use crate::chunk::{chunk_count, chunks_of};
use crate::copy::{Found, ReadGuard};
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::host::HostArena;
use crate::latency::{self, ReadOp};
use crate::migrate::{self, Job, request_fetch};
use crate::object::{FREE_BYTES, Object, Shared};
use crate::parcel::{Unkept, parcel_on};
use crate::promotion;
use crate::stats::add;
use crate::tier::Class;

/// How often a reader lets others run while a copy is locked, before it waits for the gate.
const YIELDS_MAX: u32 = 3;

/// A read of a part waits so much of its time, and no longer than this, for the object to be
/// promoted.
const PROMOTION_SHARE: u32 = 4;
const PROMOTION_MAX: Duration = Duration::from_secs(1);

/// A read with its options resolved.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) class: Class,
    pub(super) promote: Option<bool>,
    /// The caller has another way where host memory has no space.
    pub(super) may_spill: bool,
    /// The caller keeps the bytes, in object space: see `max_held`.
    pub(super) keeps: bool,
    pub(super) deadline: Deadline,
}

impl Asked {
    /// What the caller will hold if it gets all of the object, in bytes of footprint, if others may
    /// have to wait for it.
    fn to_hold(&self, object: &Object) -> u64 {
        if self.keeps { Shared::to_hold(object.len) } else { 0 }
    }
}

impl VirtualMemory {
    /// The whole object.
    pub(super) fn read_slowly<'a>(
        &'a self,
        object: &'a Arc<Object>,
        how: Asked,
    ) -> BoxFuture<'a, Result<Bytes>> {
        let read = Read::of(ReadOp::Whole, object, object.len);
        timed_unless(read, self.whole(object, how), Bytes::is_empty).boxed()
    }

    async fn whole(&self, object: &Arc<Object>, how: Asked) -> Result<Bytes> {
        if object.len == 0 {
            return Ok(Bytes::new());
        }
        self.shared.check_fits_host(object.len)?;
        let mut stay = how.promote;
        let mut counted = false;
        let mut locked = 0;
        loop {
            match object.copy.acquire(&self.shared.copies) {
                Found::Copy(guard) => {
                    let guard = if !how.keeps || self.shared.may_keep(&guard) {
                        Some(guard)
                    } else {
                        drop(guard);
                        self.kept(object, &how).await?
                    };
                    if let Some(guard) = guard {
                        object.touch();
                        return Ok(guard.into_bytes());
                    }
                }
                Found::Locked => self.wait_for_lock(object, &mut locked, &how).await?,
                Found::Nothing => {
                    if !std::mem::replace(&mut counted, true) {
                        let by_rule = self.miss(object, chunk_count(object.len));
                        stay = stay.or(Some(by_rule));
                    }
                    // Here rather than in the task, which others would join and wait for.
                    drop(self.shared.promise(how.to_hold(object), &how.deadline).await?);
                    let outcome = self.join_flight(object, &how, stay == Some(true)).await;
                    if let Some(outcome) = outcome {
                        return outcome;
                    }
                    self.check_open()?;
                }
            }
        }
    }

    /// Counts a read that host memory did not serve; says whether it promotes the object.
    pub(super) fn miss(&self, object: &Arc<Object>, chunks: usize) -> bool {
        add(&self.shared.counters.misses, 1);
        object.touch();
        let moved = object.count_moved(chunks).into();
        let whole = chunk_count(object.len) as u64;
        promotion::promotes(self.shared.limits.promotion, moved, whole)
    }

    /// A task writes to the copy, or takes it away: that takes a memory copy.
    async fn wait_for_lock(
        &self,
        object: &Arc<Object>,
        locked: &mut u32,
        how: &Asked,
    ) -> Result<()> {
        *locked += 1;
        if *locked > YIELDS_MAX {
            object.gate_opened(&how.deadline).await?;
        }
        tokio::task::yield_now().await;
        Ok(())
    }

    /// Joins the read in flight, or starts one. `None` if it is to be asked again.
    async fn join_flight(
        &self,
        object: &Arc<Object>,
        how: &Asked,
        stay: bool,
    ) -> Option<Result<Bytes>> {
        if let Some(damage) = object.damage() {
            return Some(Err(damage));
        }
        if object.is_dead() {
            return Some(Err(object.not_found()));
        }
        let mut reply = None;
        let (flight, started) = object.join_or_start(|| {
            let (delivery, flight) = parcel_on(latency::current());
            reply = Some(delivery);
            flight
        });
        if let Some(reply) = reply {
            let mut job = Job::new(object.clone(), MigrationCause::Read, how.deadline);
            (job.class, job.stay, job.may_spill) = (how.class, stay, how.may_spill);
            job.to_hold = how.to_hold(object);
            request_fetch(job, flight.downgrade(), reply);
        }
        let late = || how.deadline.error("reading from a slower tier");
        let _following = latency::follow(object.id, flight.clock());
        let again = match how.deadline.bound_answer(flight.share()).await {
            // It was asked for with an earlier deadline, or with another way to go.
            Ok(Ok(Err(
                VirtualMemoryError::AllPinned { .. }
                | VirtualMemoryError::TimedOut { .. }
                | VirtualMemoryError::TierFull { .. },
            ))) if !started && !how.deadline.is_past() => true,
            Ok(Ok(outcome)) => return Some(outcome),
            Ok(Err(Unkept::Recalled | Unkept::Abandoned)) => !how.deadline.is_past(),
            Err(Late) => false,
        };
        if !again {
            return Some(Err(late()));
        }
        object.end_flight(&flight.downgrade());
        None
    }

    /// The current host copy, if there still is one once readers hold less than they may.
    async fn kept(&self, object: &Arc<Object>, how: &Asked) -> Result<Option<ReadGuard>> {
        let promise = self.shared.promise(Shared::to_hold(object.len), &how.deadline).await?;
        let found = object.copy.acquire(&self.shared.copies);
        drop(promise);
        Ok(match found {
            Found::Copy(guard) => Some(guard),
            Found::Locked | Found::Nothing => None,
        })
    }

    /// A part of an object that is not in host memory, or that has to wait for other readers.
    pub(super) fn part_slowly<'a>(
        &'a self,
        object: &'a Arc<Object>,
        range: Range<usize>,
        how: Asked,
        copy_small: Option<usize>,
    ) -> BoxFuture<'a, Result<Bytes>> {
        let read = Read::of(ReadOp::Part, object, range.len());
        timed_unless(read, self.part(object, range, how, copy_small), Bytes::is_empty).boxed()
    }

    async fn part(
        &self,
        object: &Arc<Object>,
        range: Range<usize>,
        how: Asked,
        copy_small: Option<usize>,
    ) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let is_small = range.len() <= FREE_BYTES;
        let how = Asked { keeps: !is_small, ..how };
        let copied = is_copied(range.len(), object.len, copy_small);
        let copied = || copied || (is_small && self.shared.readers_hold_all());
        if object.copy.is_some()
            && how.keeps
            && let Some(guard) = self.kept(object, &how).await?
        {
            object.touch();
            return Ok(guard.into_bytes().slice(range));
        }
        if let Some(whole) = self.promoted(object, &range, &how).await? {
            let part = whole.slice(range);
            return Ok(if copied() { Bytes::copy_from_slice(&part) } else { part });
        }
        loop {
            let shared = &self.shared;
            let class = how.class;
            let deadline = how.deadline;
            let part = migrate::read_part(object.clone(), range.clone(), copied(), class, deadline);
            let parcel = shared.spawn_for_caller("vmem-read", part);
            let answer = shared.answer(&parcel, &deadline, "reading a part").await?;
            if let Some(part) = answer {
                return Ok(part.into_bytes());
            }
            self.check_open()?;
        }
    }

    /// All bytes of an object of which a part is to be read, if the rule, or the caller, promotes
    /// it with this read, and host memory has space for it.
    pub(super) async fn promoted(
        &self,
        object: &Arc<Object>,
        range: &Range<usize>,
        how: &Asked,
    ) -> Result<Option<Bytes>> {
        let by_rule = self.miss(object, chunks_of(range).len());
        if !how.promote.unwrap_or(by_rule) || !self.shared.fits_host(object.len) {
            return Ok(None);
        }
        let explicit = how.promote == Some(true);
        let mut how = Asked { promote: Some(true), may_spill: !explicit, ..how.clone() };
        if !explicit {
            how.deadline = how.deadline.share(PROMOTION_SHARE, PROMOTION_MAX);
        }
        match self.whole(object, how).await {
            Ok(whole) => Ok(Some(whole)),
            // The part needs less.
            Err(
                VirtualMemoryError::TierFull { .. }
                | VirtualMemoryError::AllPinned { .. }
                | VirtualMemoryError::TimedOut { .. },
            ) if !explicit => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Several objects at once.
    pub(super) async fn many_slowly(&self, objects: Vec<Arc<Object>>) -> Result<Vec<Bytes>> {
        let mut seen = std::collections::HashSet::new();
        let distinct = objects.iter().filter(|object| seen.insert(object.id));
        let footprint = |object: &Arc<Object>| HostArena::footprint(object.len);
        let mut all_bytes = 0_u64;
        let mut to_hold = 0_u64;
        for object in distinct {
            all_bytes = all_bytes.saturating_add(footprint(object));
            to_hold = to_hold.saturating_add(Shared::to_hold(object.len));
        }
        self.shared.host.check_fits(all_bytes)?;
        // Then what is large is taken by the task too, in whose turn it is.
        let in_turn = self.shared.readers_hold_all();
        let in_turn = |object: &Object| in_turn && object.len > FREE_BYTES;
        let deadline = self.shared.deadline();
        let objects: Arc<[_]> = objects
            .into_iter()
            .map(|object| {
                let stay = !object.copy.is_some() && self.miss(&object, chunk_count(object.len));
                (object, stay)
            })
            .collect();
        // First those that are missing. The others are looked at again when these have come; if one
        // of them has left meanwhile, all are asked for at once.
        let missing =
            objects.iter().filter(|(object, _)| !object.copy.is_some() || in_turn(object));
        let mut asked: Arc<[_]> = missing.cloned().collect();
        loop {
            let set = migrate::read_set(self.shared.clone(), asked.clone(), to_hold, deadline);
            let parcel = self.shared.spawn_for_caller("vmem-read-many", set);
            let answer = self.shared.answer(&parcel, &deadline, "reading several objects").await?;
            if let Some(read) = answer {
                if let Some(all) = self.with_hits(&objects, &asked, read) {
                    return Ok(all);
                }
                asked = objects.clone();
            }
            self.check_open()?;
        }
    }

    /// The bytes of each object of a set, of which these were asked for and have been read; the
    /// others are in host memory still, or there is none.
    fn with_hits(
        &self,
        objects: &[(Arc<Object>, bool)],
        asked: &[(Arc<Object>, bool)],
        read: Vec<Bytes>,
    ) -> Option<Vec<Bytes>> {
        let mut read = asked.iter().zip(read).peekable();
        let mut all = Vec::with_capacity(objects.len());
        for (object, _) in objects {
            let was_read = read.next_if(|((one, _), _)| Arc::ptr_eq(one, object));
            all.push(match was_read {
                Some((_, bytes)) => bytes,
                None => self.hit(object)?.into_bytes(),
            });
        }
        Some(all)
    }
}
