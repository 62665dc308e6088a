//! The evictor of one tier: serves the waiters, plans what is evicted for them, starts the tasks.
//!
//! Invariant: it evicts no more than the plan says. The plan has no more than the waiters need
//! beyond what is free and what is leaving, or, once the high watermark was crossed, what lies
//! above the low one. A look for victims is one pass of the policy, which ends; a new one begins
//! only once something has happened. Run by the actor, between two sleeps; it never waits.

mod stuck;

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::look::{Look, Spares};
use super::plan::{Plan, Situation, Stop, Victim, plan};
use super::tiers::{Cleaning, Evicting, Window};
use super::{Ended, Took};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::migrate::CopyFate;
use crate::object::{GatePass, Object, Shared};
use crate::policy::Probe;
use crate::stats::add;
use crate::storage::TierError;
use crate::task::spawn_into;
use crate::tier::{Neighbours, Refused, Space, TierState, Wanted};

/// Batches that are written at once.
const BATCHES_MAX: usize = 4;
/// Payload of one batch, in bytes, unless one object alone has more.
pub(super) const BATCH_BYTES: u64 = 1024 * 1024;
/// Objects in one batch.
pub(super) const BATCH_OBJECTS: usize = 512;
/// Objects of the cold end that are written back early, to be clean when they go.
const CLEANED_OBJECTS: usize = 256;
/// Entries that background order-keeping handles in one turn.
const SETTLE_STEPS: usize = 1024;
/// After the file system said that it has no space, or failed several times in a row, it is left
/// alone for so long.
const DISK_REST: Duration = Duration::from_millis(50);
/// Moves within the tier for one look. What they free is seen at once, so a need for more is a sign
/// that they do not help.
const COMPACTIONS_MAX: usize = 256;
/// Batches that fail in a row before the disk is taken for broken: one failure concerns one
/// batch, which is tried again elsewhere on the disk.
const FAILURES_MAX: u32 = 8;

/// The state of the evictor of one tier between two turns.
pub(super) struct Evictor<T> {
    tier: T,
    batches: usize,
    /// Footprint that the batches in flight will free, in bytes.
    leaving_bytes: u64,
    is_above_mark: bool,
    /// The order of eviction is behind the accesses.
    unsettled: bool,
    look: Look,
    /// What the neighbours of the plan are to make free.
    window: Window,
    /// Since there was nothing to be written early.
    has_evicted: bool,
    disk_rests_until: Option<Instant>,
    /// Batches that failed since one was written.
    failures: u32,
    /// Something may be there to do then, although nothing happens.
    wakes_at: Option<Instant>,
}

/// The outcome of one attempt to evict an object.
enum Step<L> {
    Freed,
    /// It has to be written first.
    Write(L),
    /// It is held, read or being changed.
    Busy,
    /// The disk has no space for it.
    NoDisk,
    /// Nothing is written for a while.
    Rests,
}

impl<T: Evicting> Evictor<T> {
    pub(super) fn new(tier: T) -> Self {
        Evictor {
            tier,
            batches: 0,
            leaving_bytes: 0,
            is_above_mark: false,
            unsettled: false,
            look: Look::default(),
            window: Window::default(),
            has_evicted: false,
            disk_rests_until: None,
            failures: 0,
            wakes_at: None,
        }
    }

    /// A batch has ended.
    pub(super) fn ended(&mut self, leaves_bytes: u64, took: Took) {
        self.batches -= 1;
        self.leaving_bytes -= leaves_bytes;
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

    /// When there may be something to do although nothing happens.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        self.wakes_at
    }

    /// Fails all waiters: the tier serves no more requests.
    pub(super) fn refuse_all(&mut self, shared: &Shared, error: &VirtualMemoryError) {
        self.wakes_at = None;
        let queue = &self.tier.state(shared).queue;
        queue.refuse(|_, _| Some(Refused::Error(error.clone())));
    }

    /// Serves the waiters, and starts the evictions that make space. True if there is more to do at
    /// once; `woken` says that something has happened since the last turn.
    pub(super) fn turn(
        &mut self,
        shared: &Shared,
        tasks: &mut JoinSet<Ended>,
        woken: bool,
    ) -> bool {
        let state = self.tier.state(shared);
        if woken || crate::planted!("look-reset") {
            self.look = Look::default();
        }
        // Without waiters what is held does not matter, and is not added up.
        let held = if state.queue.len() == 0 { 0 } else { state.unevictable_bytes() };
        let wanted = state.queue.serve(held);
        self.wakes_at = wanted.unblocks_at;
        let situation = self.situation(state, wanted);
        self.is_above_mark = situation.is_above_mark;
        let deficit = situation.deficit_bytes();
        let mut more = false;
        if deficit > 0 && self.batches < BATCHES_MAX {
            more = self.make_space(shared, tasks, &situation, deficit);
        } else if deficit == 0 {
            self.write_back_early(shared, tasks);
        }
        self.settle(shared) || more
    }

    fn situation(&self, state: &TierState<T::Space>, wanted: Wanted) -> Situation {
        let capacity_bytes = state.space().capacity_bytes();
        let mut situation = Situation {
            wanted,
            capacity_bytes,
            // A budget may change between the looks at it.
            used_bytes: (state.space().used_bytes() + state.space().coming_bytes())
                .min(capacity_bytes),
            leaving_bytes: self.leaving_bytes,
            marks: state.marks.within(capacity_bytes),
            is_above_mark: self.is_above_mark,
        };
        situation.is_above_mark = situation.is_still_above();
        situation
    }

    /// Frees, or starts to write, up to `target` bytes. True if there is more to do at once.
    fn make_space(
        &mut self,
        shared: &Shared,
        tasks: &mut JoinSet<Ended>,
        situation: &Situation,
        target: u64,
    ) -> bool {
        let wanted = &situation.wanted;
        let may_compact = wanted.is_scattered() && self.look.compactions < COMPACTIONS_MAX;
        if may_compact && !crate::planted!("compaction") && self.tier.compact(shared) {
            self.look.compactions += 1;
            return true;
        }
        let Plan { victims, stop } = self.plan(shared, situation, target);
        let planned = victims.len();
        let progress = self.carry_out(shared, tasks, victims);
        self.look.neighbours_stay |= wanted.is_scattered() && !progress;
        if progress {
            self.tier.state(shared).set_blocked_by_holds(false);
            return true;
        }
        match stop {
            // Without waiters the rest can be looked at once there is one.
            Stop::Bound => wanted.any() || planned > 0,
            Stop::Enough => true,
            Stop::Nothing if planned > 0 => true,
            Stop::Nothing => {
                let stuck = self.why_stuck(shared);
                self.refuse_hopeless(shared, wanted, stuck);
                false
            }
        }
    }

    fn plan(&mut self, shared: &Shared, situation: &Situation, target: u64) -> Plan {
        let wanted = &situation.wanted;
        let spares = situation.spares_hot().then(|| match wanted.spares_since {
            // A budget that shrinks spares nothing.
            Some(since) => Spares { since, unused: since < u64::MAX },
            None => Spares { since: self.tier.spared_since(shared, wanted), unused: false },
        });
        self.look.spare(spares);
        let neighbours = if wanted.is_scattered() && !self.look.neighbours_stay {
            let Neighbours { objects, window } = self.tier.neighbours(shared, wanted);
            let mut found: Vec<_> = objects.into_iter().filter_map(|id| shared.find(id)).collect();
            // There may be space elsewhere for some of them: for those that were used last.
            found.sort_by_cached_key(|object| Reverse(object.stamp()));
            let spared = |object: &Arc<Object>| {
                let since = |spares: Spares| object.stamp() >= spares.since;
                spares.is_some_and(|spares| since(spares) || self.tier.is_spared(object, spares))
            };
            // All of them or none: some would be no use.
            match found.iter().any(spared) {
                true => Vec::new(),
                false => {
                    self.window.addresses = window;
                    found.iter().map(|object| self.tier.victim(object)).collect()
                }
            }
        } else {
            Vec::new()
        };
        if neighbours.is_empty() && wanted.is_scattered() && wanted.spares_since.is_some() {
            // Others would go for nothing.
            return Plan { victims: neighbours, stop: Stop::Nothing };
        }
        let space = self.tier.state(shared).space();
        if wanted.is_scattered() && space.coming_bytes() > 0 {
            // Since it was refused. The next turn sees it.
            return Plan { victims: Vec::new(), stop: Stop::Enough };
        }
        // What else is wanted is for the next turn, which may need what lies together too.
        let apart = neighbours.is_empty() || !space.needs_together(wanted.first());
        let target = if apart { target } else { 0 };
        let Evictor { tier, look, .. } = self;
        let plan = plan(target, neighbours, &mut || look.next(tier, shared));
        self.unsettled |= std::mem::take(&mut self.look.is_hurried);
        plan
    }

    /// Takes these objects out, as far as that goes without waiting. True if any of them goes.
    fn carry_out(
        &mut self,
        shared: &Shared,
        tasks: &mut JoinSet<Ended>,
        victims: Vec<Victim>,
    ) -> bool {
        let mut batch = Vec::new();
        let mut leaves_bytes = 0;
        let mut freed = false;
        let mut window = std::mem::take(&mut self.window);
        for victim in victims {
            let pass = shared.find(victim.id).and_then(|object| object.try_gate_quietly());
            match pass.map_or(Step::Busy, |pass| self.take(shared, pass, &mut window)) {
                Step::Freed => freed = true,
                Step::Write(leaving) => {
                    leaves_bytes += victim.footprint;
                    batch.push(leaving);
                }
                Step::Busy => {}
                Step::NoDisk => self.look.clean_only = true,
                Step::Rests => self.look.rest(),
            }
        }
        let progress = freed || !batch.is_empty();
        self.has_evicted |= progress;
        self.launch(shared, tasks, batch, leaves_bytes, CopyFate::Drop);
        progress
    }

    /// Takes one object out, as far as that goes without waiting; out of the window alone, if there
    /// is space elsewhere.
    fn take(&self, shared: &Shared, pass: GatePass, window: &mut Window) -> Step<T::Leaving> {
        // The plan is a moment old.
        if !self.tier.may_leave(pass.object()) {
            return Step::Busy;
        }
        let pass = match self.tier.move_out(pass, window) {
            Ok(leaving) => return Step::Write(leaving),
            Err(pass) => pass,
        };
        let object = pass.object();
        if self.tier.is_written_first(object) {
            if self.disk_rests_until.is_some_and(|until| Instant::now() < until) {
                return Step::Rests;
            }
            return self.take_dirty(pass);
        }
        if !self.tier.drop_clean(&pass) {
            return Step::Busy;
        }
        add(&shared.counters.evictions, 1);
        add(&shared.counters.clean_drops, 1);
        Step::Freed
    }

    /// An object that the tier below does not have.
    fn take_dirty(&self, pass: GatePass) -> Step<T::Leaving> {
        match self.tier.prepare(pass) {
            Ok(leaving) => leaving.map_or(Step::Freed, Step::Write),
            Err(error) => {
                if !matches!(error, TierError::Full { .. }) {
                    tracing::warn!(target: "vmem::actor", ?error, "the tier below refuses space");
                }
                Step::NoDisk
            }
        }
    }

    fn launch(
        &mut self,
        shared: &Shared,
        tasks: &mut JoinSet<Ended>,
        batch: Vec<T::Leaving>,
        leaves_bytes: u64,
        fate: CopyFate,
    ) {
        if batch.is_empty() {
            return;
        }
        self.batches += 1;
        self.leaving_bytes += leaves_bytes;
        let deadline = shared.deadline();
        let (name, cause) = match fate {
            CopyFate::Keep => ("vmem-write-back", MigrationCause::WriteBack),
            CopyFate::Drop | CopyFate::Detach => ("vmem-evict", MigrationCause::Evict),
        };
        let tier = self.tier.state(shared).tier;
        let written = T::write(batch, fate, cause, deadline);
        spawn_into(tasks, name, async move {
            let took = written.await;
            Ended::Evicted { tier, leaves_bytes, took }
        });
    }

    /// Writes what is dirty at the cold end, so that most victims are clean when space is needed.
    fn write_back_early(&mut self, shared: &Shared, tasks: &mut JoinSet<Ended>) {
        let state = self.tier.state(shared);
        let is_resting = self.disk_rests_until.is_some_and(|until| Instant::now() < until);
        let Some(cleaning) = self.tier.cleans_early(shared) else { return };
        let Cleaning { above_bytes, cold_bytes, after_evictions } = cleaning;
        let is_due = self.has_evicted || !after_evictions;
        if self.batches > 0 || is_resting || !is_due || state.space().used_bytes() <= above_bytes {
            return;
        }
        let mut cold = Vec::new();
        state.order.lock().coldest(CLEANED_OBJECTS, &mut |id| cold.extend(shared.find(id)));
        // The order is behind the accesses, and what was used since is likely to change again.
        cold.sort_by_cached_key(|object| object.stamp());
        let mut batch = Vec::new();
        let mut payload = 0;
        let mut seen = 0;
        let mut met_dirty = false;
        for object in cold {
            if seen >= cold_bytes || payload >= BATCH_BYTES {
                break;
            }
            let victim = self.tier.victim(&object);
            seen += victim.footprint;
            if victim.payload.is_none() {
                continue;
            }
            met_dirty = true;
            let Some(pass) = object.try_gate_quietly() else { continue };
            if self.tier.victim(&object).payload.is_none() || !self.tier.may_clean(&object) {
                continue;
            }
            let Ok(Some(leaving)) = self.tier.prepare(pass) else { break };
            payload += T::payload(&leaving);
            batch.push(leaving);
        }
        self.has_evicted &= met_dirty;
        self.launch(shared, tasks, batch, 0, CopyFate::Keep);
    }

    /// One slice of bringing the order of eviction up to the accesses. True if more is left.
    fn settle(&mut self, shared: &Shared) -> bool {
        if self.unsettled {
            let tier = &self.tier;
            let mut order = tier.state(shared).order.lock();
            self.unsettled = order.settle(SETTLE_STEPS, &mut |id| {
                shared.find(id).map_or(Probe::Gone, |object| tier.probe(&object, u64::MAX))
            });
        }
        self.unsettled
    }
}
