//! The evictor: how much must leave host memory, and what goes.
//!
//! Invariant: it takes no more than is asked: what those who wait need beyond what is free and
//! what is on its way out, or, once the high watermark was crossed, what lies above the low one.
//! A victim is taken by its gate, so it is never one that is pinned, read, in flight or
//! being written. Run by the actor, between two sleeps; it never waits.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Ended, spawn_into};
use crate::disk::DiskError;
use crate::events::MigrationCause;
use crate::migrate::{Down, Victim, move_room_down, write_down};
use crate::object::{GatePass, Object};
use crate::policy::{Pass, Pick, Probe, STEPS_MAX};
use crate::shared::Shared;
use crate::stats::add;
use crate::tier::{Class, Refused, Wanted};

/// Batches that are on their way down at once.
const BATCHES_MAX: usize = 4;
/// Payload of one batch, in bytes, unless one object alone has more.
const BATCH_BYTES: u64 = 1024 * 1024;
/// Objects in one batch.
const BATCH_OBJECTS: usize = 512;
/// Victims that are tried in one turn.
const TRIES_MAX: usize = 1024;
/// Objects of the cold end that are kept clean ahead of need.
const WRITE_AHEAD_OBJECTS: usize = 256;
/// Entries that background order-keeping handles in one turn.
const SETTLE_STEPS: usize = 1024;
/// After the file system said that it has no space, or failed several times in a row, it is left alone
/// for so long.
const DISK_REST: Duration = Duration::from_millis(50);
/// An object that was used within this time never makes way for a prefetch, in nanoseconds.
const HOT_NS: u64 = 1_000_000_000;
/// It is looked for what has cooled down at most this often.
const COOLS_MIN: Duration = Duration::from_millis(20);

/// Batches that fail in a row before the disk is taken for broken: one failure is the matter of one batch,
/// which is tried again elsewhere on the disk.
const FAILURES_MAX: u32 = 8;

/// Whether the disk took a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Took {
    All,
    /// It has no space for it.
    NoSpace,
    /// It failed otherwise.
    Failed,
}

/// The state of the evictor between two turns.
#[derive(Debug, Default)]
pub(super) struct Evictor {
    batches: usize,
    /// Footprint that the batches in flight will free, in bytes.
    reclaiming_bytes: u64,
    /// The high watermark was crossed and the low one not reached yet.
    above_mark: bool,
    /// The order of eviction is behind the accesses.
    unsettled: bool,
    /// Entries that were looked at since the last wake-up, or the last success, for nothing.
    fruitless: usize,
    /// The look for victims since the last wake-up.
    pass: Pass,
    /// It has met something that the disk has no room for: what is clean can go all the same.
    clean_only: bool,
    disk_rests_until: Option<Instant>,
    /// Batches that failed since one went down.
    failures: u32,
    /// A prefetch waits, and all that could make way for it is too hot until then.
    cools_at: Option<Instant>,
    /// A request keeps others from passing it until then.
    unblocks_at: Option<Instant>,
}

/// What became of one attempt to free memory.
enum Step {
    /// So many bytes are free now.
    Freed(u64),
    /// It has to be written first.
    Write(Victim, u64),
    /// Somebody is at it.
    Busy,
    /// The disk has no room for it.
    NoDisk,
    /// The backend is broken or closed.
    Failed(DiskError),
}

/// What became of one round.
#[derive(Debug, PartialEq, Eq)]
enum Round {
    Progress,
    /// The bound on work was reached: more in the next turn.
    Bounded,
    /// Nothing can be taken but what is pinned, held or busy.
    Nothing,
    /// What could be taken is too hot to make way for a prefetch.
    TooHot,
    /// What could be taken finds no room below.
    DiskFull,
}

impl Evictor {
    /// A batch has ended.
    pub(super) fn ended(&mut self, reclaims_bytes: u64, took: Took) {
        self.batches -= 1;
        self.reclaiming_bytes -= reclaims_bytes;
        self.failures = match took {
            Took::All => 0,
            Took::Failed => self.failures + 1,
            Took::NoSpace => FAILURES_MAX,
        };
        if self.failures >= FAILURES_MAX {
            self.failures = 0;
            self.disk_rests_until = Some(Instant::now() + DISK_REST);
        }
    }

    /// Serves those who wait, and starts what makes room. True if there is more to do at once;
    /// `woken` says that something has happened since the last turn.
    pub(super) fn turn(
        &mut self,
        shared: &Shared,
        tasks: &mut JoinSet<Ended>,
        woken: bool,
    ) -> bool {
        if woken {
            self.fruitless = 0;
            (self.pass, self.clean_only) = (Pass::default(), false);
            self.cools_at = None;
        }
        let wanted = shared.host.serve(shared.host_holds());
        self.unblocks_at = wanted.unblocks_at;
        let deficit = self.deficit(shared, &wanted);
        let mut more = false;
        if deficit > 0 && self.batches < BATCHES_MAX {
            match self.round(shared, tasks, deficit, &wanted) {
                Round::Progress => {
                    shared.blocked_by_holds.store(false, Ordering::SeqCst);
                    more = true;
                }
                Round::Bounded => more = true,
                stuck => self.refuse_hopeless(shared, &wanted, stuck),
            }
        } else if deficit == 0 {
            self.write_ahead(shared, tasks);
        }
        self.settle(shared) || more
    }

    /// Bytes to take out of host memory beyond what is already going.
    fn deficit(&mut self, shared: &Shared, wanted: &Wanted) -> u64 {
        let arena = shared.host.space();
        let used = arena.used_bytes();
        let free = arena.capacity_bytes().saturating_sub(used);
        let mut deficit = wanted.demand_bytes.min(arena.capacity_bytes()).saturating_sub(free);
        if wanted.demand_bytes > 0 && wanted.scattered {
            deficit = deficit.max(1);
        }
        if wanted.demand_bytes == 0 && wanted.prefetch_bytes > 0 {
            let room = shared.limits.high_bytes.saturating_sub(used);
            let next = wanted.prefetch_bytes.min(BATCH_BYTES.max(wanted.smallest_prefetch));
            deficit = next.saturating_sub(room);
            if wanted.prefetch_scattered {
                deficit = deficit.max(wanted.smallest_prefetch);
            }
        }
        if used > shared.limits.high_bytes {
            self.above_mark = true;
        } else if used.saturating_sub(self.reclaiming_bytes) <= shared.limits.low_bytes {
            self.above_mark = false;
        }
        if self.above_mark {
            deficit = deficit.max(used - shared.limits.low_bytes.min(used));
        }
        deficit.saturating_sub(self.reclaiming_bytes)
    }

    /// Frees, or starts to write, up to `target` bytes.
    fn round(
        &mut self,
        shared: &Shared,
        tasks: &mut JoinSet<Ended>,
        target: u64,
        wanted: &Wanted,
    ) -> Round {
        let spare_hot = wanted.demand_bytes == 0 && !self.above_mark;
        let scattered = if wanted.scattered { self.scattered_owners(shared) } else { Vec::new() };
        let mut scattered = scattered.into_iter();
        let mut batch = Vec::new();
        let (mut freed, mut payload, mut reclaims) = (0, 0, 0);
        let mut round = Round::Bounded;
        for _ in 0..TRIES_MAX {
            if freed + reclaims >= target || payload >= BATCH_BYTES || batch.len() >= BATCH_OBJECTS
            {
                break;
            }
            let id = match scattered.next() {
                Some(id) => id,
                None => match self.pick(shared, spare_hot) {
                    Some(id) => id,
                    None => {
                        round = self.found_nothing(shared, wanted);
                        if self.clean_only && round == Round::Nothing {
                            round = Round::DiskFull;
                        }
                        break;
                    }
                },
            };
            let pass = shared.find(id).and_then(|object| object.try_gate_quietly());
            match pass.map_or(Step::Busy, |pass| self.take(shared, pass)) {
                Step::Freed(bytes) => freed += bytes,
                Step::Write(victim, bytes) => {
                    reclaims += bytes;
                    payload += victim.payload();
                    batch.push(victim);
                }
                Step::Busy => self.fruitless = self.fruitless.saturating_add(1),
                Step::NoDisk => self.clean_only = true,
                Step::Failed(error) => {
                    tracing::warn!(target: "vmem::actor", ?error, "the disk refuses space");
                    self.clean_only = true;
                }
            }
        }
        let progress = freed > 0 || !batch.is_empty();
        if progress {
            self.fruitless = 0;
        }
        self.launch(shared, tasks, batch, reclaims, Down::Drop, MigrationCause::Evict);
        if progress { Round::Progress } else { round }
    }

    /// The next victim of the policy, if a bounded look finds one.
    fn pick(&mut self, shared: &Shared, spare_hot: bool) -> Option<u64> {
        let clean_only = self.clean_only;
        let pick = shared.policy.lock().victim(&mut self.pass, &mut |id| {
            if clean_only && needs_disk(shared, id) { Probe::Unfit } else { probe(shared, id) }
        });
        match pick {
            Pick::Victim { id, hurried } => {
                self.unsettled |= hurried;
                let hot_since = shared.now().saturating_sub(HOT_NS);
                let stamp = shared.find(id).map_or(0, |object| object.stamp());
                if !spare_hot || stamp <= hot_since {
                    return Some(id);
                }
                // The coldest is too hot to make way, and so is the rest.
                let cools_in = Duration::from_nanos(stamp - hot_since).max(COOLS_MIN);
                self.cools_at = Some(Instant::now() + cools_in);
                self.fruitless = usize::MAX;
            }
            Pick::Retry => self.unsettled = true,
            Pick::Empty => self.fruitless = usize::MAX,
        }
        None
    }

    /// Whether a look that found nothing was a look at everything.
    fn found_nothing(&self, shared: &Shared, wanted: &Wanted) -> Round {
        let mut all = shared.policy.lock().len() + STEPS_MAX;
        if !wanted.any() {
            // Nobody waits: the rest can be looked at when somebody does.
            all = all.min(TRIES_MAX);
        }
        match self.cools_at {
            _ if self.fruitless <= all => Round::Bounded,
            Some(_) => Round::TooHot,
            None => Round::Nothing,
        }
    }

    /// Owners of a span whose pages a request needs that fits by its bytes.
    fn scattered_owners(&self, shared: &Shared) -> Vec<u64> {
        let immovable = |id: u64| {
            let busy = |object: &Object| {
                object.pins() > 0 || object.copy.readers() > 0 || object.is_changing()
            };
            shared.find(id).is_none_or(|object| busy(&object) || !object.has_host_room())
        };
        shared.host.space().sparsest_span(&immovable).unwrap_or_default()
    }

    /// Takes one object out of host memory, as far as that goes without waiting.
    fn take(&self, shared: &Shared, pass: GatePass) -> Step {
        let object = pass.object().clone();
        if object.pins() > 0 || object.copy.readers() > 0 || !object.has_host_room() {
            return Step::Busy;
        }
        let footprint = crate::host::HostArena::footprint(object.len);
        if object.is_dirty() || object.has_spare() {
            if self.disk_rests_until.is_some_and(|until| Instant::now() < until) {
                return Step::NoDisk;
            }
            return self.take_dirty(&object, pass, footprint);
        }
        match object.drop_clean_copy(&pass) {
            Some(copy) => {
                drop(copy);
                add(&shared.counters.evictions, 1);
                add(&shared.counters.clean_drops, 1);
                Step::Freed(footprint)
            }
            None => Step::Busy,
        }
    }

    fn take_dirty(&self, object: &Object, pass: GatePass, footprint: u64) -> Step {
        let refused = if object.has_spare() {
            move_room_down(&pass).map(|()| Step::Freed(footprint))
        } else {
            match Victim::prepare(pass) {
                Ok(victim) => Ok(Step::Write(victim, footprint)),
                Err((_pass, error)) => Err(error),
            }
        };
        refused.unwrap_or_else(|error| match error {
            DiskError::Full { .. } => Step::NoDisk,
            other => Step::Failed(other),
        })
    }

    fn launch(
        &mut self,
        shared: &Shared,
        tasks: &mut JoinSet<Ended>,
        batch: Vec<Victim>,
        reclaims_bytes: u64,
        down: Down,
        cause: MigrationCause,
    ) {
        if batch.is_empty() {
            return;
        }
        self.batches += 1;
        self.reclaiming_bytes += reclaims_bytes;
        let deadline = shared.deadline();
        let name = if down == Down::Keep { "vmem-write-back" } else { "vmem-evict" };
        spawn_into(tasks, name, async move {
            let outcome = write_down(batch, down, cause, &deadline).await;
            let took = match outcome {
                Ok(()) => Took::All,
                Err(DiskError::Full { .. }) => Took::NoSpace,
                Err(_) => Took::Failed,
            };
            Ended::Evicted { reclaims_bytes, took }
        });
    }

    /// Answers those whom no amount of waiting for the evictor would help.
    fn refuse_hopeless(&self, shared: &Shared, wanted: &Wanted, stuck: Round) {
        if !wanted.any() || self.batches > 0 {
            return;
        }
        shared.blocked_by_holds.store(stuck == Round::Nothing, Ordering::SeqCst);
        shared.host.refuse(|need, footprint| match (need.class, &stuck) {
            (Class::Prefetch, Round::DiskFull) => Some(Refused::Error(shared.host_full(footprint))),
            (Class::Prefetch, _) => None,
            (Class::Demand, _) if need.may_spill => Some(Refused::Spill),
            (Class::Demand, Round::DiskFull) => Some(Refused::Error(shared.host_full(footprint))),
            (Class::Demand, _) => None,
        });
    }

    /// Writes what is dirty at the cold end, so that most victims are clean when room is needed.
    fn write_ahead(&mut self, shared: &Shared, tasks: &mut JoinSet<Ended>) {
        let resting = self.disk_rests_until.is_some_and(|until| Instant::now() < until);
        if self.batches > 0
            || resting
            || shared.host.space().used_bytes() <= shared.limits.low_bytes
        {
            return;
        }
        let band = shared.limits.high_bytes - shared.limits.low_bytes;
        let mut cold = Vec::new();
        shared.policy.lock().coldest(WRITE_AHEAD_OBJECTS, &mut |id| cold.push(id));
        let (mut batch, mut payload, mut seen) = (Vec::new(), 0, 0);
        for object in cold.into_iter().filter_map(|id| shared.find(id)) {
            if seen >= band || payload >= BATCH_BYTES {
                break;
            }
            seen += crate::host::HostArena::footprint(object.len);
            if !object.is_dirty() {
                continue;
            }
            let Some(pass) = object.try_gate_quietly() else { continue };
            if !object.is_dirty() {
                continue;
            }
            let Ok(victim) = Victim::prepare(pass) else { break };
            payload += victim.payload();
            batch.push(victim);
        }
        self.launch(shared, tasks, batch, 0, Down::Keep, MigrationCause::WriteBack);
    }

    /// One slice of bringing the order of eviction up to the accesses. True if more is left.
    fn settle(&mut self, shared: &Shared) -> bool {
        if self.unsettled {
            let mut policy = shared.policy.lock();
            self.unsettled = policy.settle(SETTLE_STEPS, &mut |id| probe(shared, id));
        }
        self.unsettled
    }

    /// When there may be something to do although nothing happens.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        self.cools_at.into_iter().chain(self.unblocks_at).min()
    }
}

/// Whether an object cannot leave host memory without new space on disk.
fn needs_disk(shared: &Shared, id: u64) -> bool {
    shared.find(id).is_some_and(|object| object.is_dirty() || object.has_spare())
}

/// How an object stands, for the policy.
fn probe(shared: &Shared, id: u64) -> Probe {
    let Some(object) = shared.find(id) else { return Probe::Gone };
    if object.pins() > 0 {
        Probe::Pinned
    } else if object.copy.readers() > 0 || object.is_changing() {
        Probe::Busy { stamp: shared.now() }
    } else {
        Probe::Evictable { stamp: object.stamp(), touches: object.take_touches() }
    }
}
