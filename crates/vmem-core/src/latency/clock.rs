//! The clock of one read that is not a hit.
//!
//! Invariant: at each moment the read is in one stage: the first of `ORDER` that one of its tasks
//! has entered, or else `Runtime`. So its times never add up to more than it took, also where
//! several tasks serve it at once, and a read that is given up was in the stage in which it then
//! was. Each of its readers is counted in that stage once: its own until it ends, and those that
//! joined it.
//!
//! The clock is a local of the task: what a read waits for need not know whose read it is. Entered
//! by everything that waits; carried into tasks by the calls that spawn them.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;
use tracing::{Id, Span};

use super::{Latencies, ReadStage, ReadTimes};
use crate::console;
use crate::locks::{self, Lock};
use crate::memory_tier::MemoryTier;

/// The stages that are entered: all but `Runtime`.
const ENTERED: usize = ReadStage::ALL.len() - 1;

/// Which stage counts where several tasks of one read are in different ones: what gets on first.
const ORDER: [ReadStage; ENTERED] =
    [ReadStage::Io, ReadStage::Copy, ReadStage::Turn, ReadStage::Space, ReadStage::Gate];

tokio::task_local! {
    static CLOCK: Option<Arc<StageClock>>;
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct StageClock {
    state: Lock<State, { locks::CLOCK }>,
    latencies: Arc<Latencies>,
    started: Instant,
    /// None if it was left out.
    span: Option<Span>,
    row: console::Read,
}

#[derive(Debug)]
struct State {
    /// Tasks that are in each stage.
    entered: [u32; ENTERED],
    /// How long the read was in each, up to `since`.
    spent: [Duration; ENTERED],
    since: Instant,
    readers: u32,
    /// The tier that serves it, once that is known.
    tier: Option<MemoryTier>,
    joined: bool,
    /// The spans of reads that have joined it, with the objects for which they did; only those that
    /// a subscriber wants.
    followers: SmallVec<[(u64, Id); 1]>,
    /// The spans of the migrations that run for it, with their objects. Shared, so that no
    /// subscriber is called under the lock.
    moving: SmallVec<[(u64, Arc<Span>); 1]>,
}

impl State {
    fn stage(&self) -> ReadStage {
        let entered = |stage: &ReadStage| self.entered[*stage as usize] > 0;
        ORDER.into_iter().find(entered).unwrap_or(ReadStage::Runtime)
    }

    fn settle(&mut self) {
        let now = Instant::now();
        let stage = self.stage();
        if let Some(spent) = self.spent.get_mut(stage as usize) {
            *spent += now.saturating_duration_since(self.since);
        }
        self.since = now;
    }
}

/// What a clock says at the end of its read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    pub(crate) times: ReadTimes,
    pub(crate) tier: Option<MemoryTier>,
    pub(crate) joined: bool,
}

impl StageClock {
    /// The clock of a read that begins now, under this span unless that was left out. `title` names
    /// it for tokio-console.
    pub(crate) fn start(
        latencies: &Arc<Latencies>,
        span: Option<Span>,
        title: impl FnOnce() -> String,
    ) -> Arc<Self> {
        let started = Instant::now();
        let state = State {
            entered: [0; ENTERED],
            spent: [Duration::ZERO; ENTERED],
            since: started,
            readers: 1,
            tier: None,
            joined: false,
            followers: SmallVec::new(),
            moving: SmallVec::new(),
        };
        latencies.shift((ReadStage::Runtime, 0), (ReadStage::Runtime, 1));
        let row = console::Read::start(&latencies.row, title);
        let latencies = latencies.clone();
        Arc::new(StageClock { state: Lock::new(state), latencies, started, span, row })
    }

    /// The end of the read for its own caller. Others may still follow its clock.
    pub(crate) fn end(&self) -> Told {
        let told = self.change(|state| {
            state.readers -= 1;
            let mut times = [Duration::ZERO; ReadStage::ALL.len()];
            times[..ENTERED].copy_from_slice(&state.spent);
            let total = state.since.saturating_duration_since(self.started);
            let known = state.spent.iter().sum();
            times[ENTERED] = total.saturating_sub(known);
            Told { times: ReadTimes(times), tier: state.tier, joined: state.joined }
        });
        self.row.ended(|| told.times.longest().as_str());
        told
    }

    fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock();
        state.settle();
        let before = (state.stage(), state.readers);
        let result = change(&mut state);
        let after = (state.stage(), state.readers);
        self.latencies.shift(before, after);
        drop(state);
        if before.0 != after.0 {
            self.row.waits_for(after.0.as_str());
        }
        result
    }

    /// The span of the read; none if it was left out.
    pub(crate) fn span(&self) -> Option<&Span> {
        self.span.as_ref()
    }

    /// Of its span, if a subscriber has that.
    fn id(&self) -> Option<Id> {
        self.span().and_then(Span::id)
    }

    /// `work` of its caller, which tokio-console then lists with the task that runs it.
    pub(crate) fn watch<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        self.row.watch(work)
    }
}

/// The clock of the read that runs this, if one does.
pub(crate) fn current() -> Option<Arc<StageClock>> {
    CLOCK.try_with(Clone::clone).ok().flatten()
}

/// Runs `work` on this clock.
pub(crate) fn on_clock<F: Future>(
    clock: Option<Arc<StageClock>>,
    work: F,
) -> impl Future<Output = F::Output> {
    CLOCK.scope(clock, work)
}

/// `work`, for a task of its own, on the clock of the read that runs this.
pub(crate) fn inherit<F: Future>(work: F) -> impl Future<Output = F::Output> {
    on_clock(current(), work)
}

/// In which trace something is.
#[derive(Debug)]
pub(crate) enum Trace {
    /// In that of the read for which it is done, whose span this is.
    Read(Span),
    /// The span of its read was left out, so it has none either.
    LeftOut,
    /// It is done for no read, or no subscriber wants the spans of reads.
    Own,
}

/// In which trace is what this does.
pub(crate) fn trace() -> Trace {
    match current().map(|clock| clock.span.clone()) {
        Some(Some(span)) if !span.is_disabled() => Trace::Read(span),
        Some(None) => Trace::LeftOut,
        _ => Trace::Own,
    }
}

/// A migration of this object, with this span, has begun for the read that runs this: it follows
/// from all that have joined the read for that object, and from those that will while it runs.
pub(crate) fn moves_under(object: u64, span: &Span) -> Option<Moving> {
    let clock = current().filter(|_| !span.is_disabled())?;
    let shared = Arc::new(span.clone());
    let mut state = clock.state.lock();
    state.moving.push((object, shared.clone()));
    let of_object = state.followers.iter().filter(|(joined, _)| *joined == object);
    let followers: SmallVec<[Id; 1]> = of_object.map(|(_, id)| id.clone()).collect();
    drop(state);
    let moving = Moving { clock, span: shared };
    for follower in followers {
        span.follows_from(follower);
    }
    Some(moving)
}

/// A migration that runs for a read, until this is dropped.
#[derive(Debug)]
pub(crate) struct Moving {
    clock: Arc<StageClock>,
    span: Arc<Span>,
}

impl Drop for Moving {
    fn drop(&mut self) {
        let mut state = self.clock.state.lock();
        state.moving.retain(|(_, moving)| !Arc::ptr_eq(moving, &self.span));
    }
}

/// The read that runs this is served by that tier.
pub(crate) fn served_by(tier: MemoryTier) {
    if let Some(clock) = current() {
        clock.change(|state| state.tier = Some(tier));
    }
}

/// A stage that one task is in, until it is dropped.
#[derive(Debug)]
pub(crate) struct Entered(Arc<StageClock>, ReadStage);

/// Enters a stage, if a read runs this.
pub(crate) fn enter(stage: ReadStage) -> Option<Entered> {
    let clock = current()?;
    clock.change(|state| state.entered[stage as usize] += 1);
    Some(Entered(clock, stage))
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.change(|state| state.entered[self.1 as usize] -= 1);
    }
}

/// A read that waits for the fetch of another one, until this is dropped: it is where that is.
#[derive(Debug)]
pub(crate) struct Following {
    own: Arc<StageClock>,
    other: Arc<StageClock>,
    /// What the other had spent when this began.
    before: [Duration; ENTERED],
}

/// The read that runs this joins the fetch of this object that `other` measures. None if it is its
/// own.
pub(crate) fn follow(object: u64, other: Option<&Arc<StageClock>>) -> Option<Following> {
    let other = other?.clone();
    let own = current().filter(|own| !Arc::ptr_eq(own, &other))?;
    if let (Some(own), Some(other)) = (own.span(), other.span()) {
        own.follows_from(other);
    }
    own.change(|state| state.readers -= 1);
    own.row.waits_for("another read");
    let before = other.change(|state| {
        state.readers += 1;
        state.spent
    });
    if let Some(id) = own.id() {
        let mut state = other.state.lock();
        state.followers.push((object, id.clone()));
        let moving = state.moving.iter().find(|(moved, _)| *moved == object);
        let moving = moving.map(|(_, span)| span.clone());
        drop(state);
        if let Some(moving) = moving {
            moving.follows_from(id);
        }
    }
    Some(Following { own, other, before })
}

impl Drop for Following {
    fn drop(&mut self) {
        let (spent, tier) = self.other.change(|state| {
            state.readers -= 1;
            (state.spent, state.tier)
        });
        if let Some(id) = self.own.id() {
            let mut state = self.other.state.lock();
            let at = state.followers.iter().position(|(_, follower)| *follower == id);
            at.map(|at| state.followers.swap_remove(at));
        }
        self.own.change(|state| {
            state.readers += 1;
            state.joined = true;
            state.tier = state.tier.or(tier);
            for (at, spent) in spent.into_iter().enumerate() {
                state.spent[at] += spent.saturating_sub(self.before[at]);
            }
        });
    }
}
