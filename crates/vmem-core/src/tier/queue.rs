//! Space in one tier, and the queue of the waiters for it.
//!
//! Invariant: a request that waits is in the queue, where the evictor sees how much is wanted; it
//! leaves by a grant, by a refusal, by its deadline or by being dropped, and holds nothing until
//! then. A grant lies in a parcel until its caller comes, and goes back if it does not
//! (`parcel.rs`).
//!
//! Requests are served in the order in which they came. A smaller one may pass one that does not
//! fit yet, at most `PASSES_MAX` times; then it waits for that one, but no longer than `BLOCK_MAX`,
//! if pins and holds keep the large one from being served anyway: then as many may pass again. A
//! request for several objects is granted whole or not at all. Prefetches are served while no
//! demand waits that eviction can serve; what spares more than they do stands behind neither, and
//! is refused instead.
//!
//! Called by migrations and public calls; served by the actor alone.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::locks::{self, Lock};
use futures::FutureExt;
use tokio::time::Instant;

use super::need::{Answer, Served};
use super::waiters::{BLOCK_MAX, Turn, Waiter, Waiters};
use super::{Class, Grant, Need, NoSpace, Refused, Space, Wanted};
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::latency::{self, ReadStage};
use crate::memory_tier::MemoryTier;
use crate::notice::Notices;
use crate::parcel::{Delivery, Parcel, Unclaimed, Unkept, parcel};
use crate::wake::Wake;

/// The space of one tier with its queue.
pub(crate) struct Queue<S: Space> {
    space: S,
    waiters: Lock<Waiters<S>, { locks::WAITERS }>,
    /// A prefetch gets no space beyond this, in bytes used: it must not cause evictions.
    prefetch_limit_bytes: u64,
    /// Length of the queue, to be read without the lock.
    len: AtomicUsize,
    wake: Arc<Wake>,
    unclaimed: Arc<Unclaimed>,
    notices: Notices,
}

/// Answers that are sent where no lock is held.
type Answers<S> = Vec<(Delivery<Answer<S>>, Answer<S>)>;

impl<S: Space> Queue<S> {
    pub(crate) fn new(
        tier: MemoryTier,
        space: S,
        prefetch_limit_bytes: u64,
        wake: Arc<Wake>,
        unclaimed: Arc<Unclaimed>,
    ) -> Self {
        let waiters = Lock::new(Waiters::new());
        let len = AtomicUsize::new(0);
        let notices = Notices::new(tier);
        Queue { space, waiters, prefetch_limit_bytes, len, wake, unclaimed, notices }
    }

    /// What operators learn of the tier.
    pub(crate) fn notices(&self) -> &Notices {
        &self.notices
    }

    pub(crate) fn space(&self) -> &S {
        &self.space
    }

    /// How many requests wait.
    pub(crate) fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// What a request takes, in bytes.
    pub(crate) fn footprint(&self, need: &Need) -> u64 {
        let footprints = need.objects.iter().map(|&(len, _)| self.space.footprint(len));
        footprints.fold(0, u64::saturating_add)
    }

    fn try_grant(&self, need: &Need) -> Result<Grant<S>, NoSpace> {
        if need.class == Class::Prefetch {
            let footprint = self.footprint(need);
            // A prefetch that alone exceeds the limit gets space while nothing else has any.
            let limit = self.prefetch_limit_bytes.max(footprint);
            if self.space.used_bytes() + footprint > limit {
                return Err(NoSpace::scattered(false));
            }
        }
        let mut grant = Grant::<S>::new();
        for &(len, owner) in &need.objects {
            match self.space.try_take(len, owner) {
                Ok(slot) => grant.push(slot),
                Err(why) => {
                    // Quietly: the actor would wake itself for ever.
                    grant.into_iter().for_each(|slot| self.space.put_back(slot));
                    return Err(why);
                }
            }
        }
        assert!(grant.len() == need.objects.len(), "a grant has space for each object, or is none");
        Ok(grant)
    }

    /// Space that is free now, unless a waiter comes first.
    pub(crate) fn try_take(&self, need: &Need) -> Option<Grant<S>> {
        if need.objects.is_empty() {
            return Some(Grant::<S>::new());
        }
        if self.len.load(Ordering::SeqCst) > 0 && !self.may_pass(need) {
            return None;
        }
        let grant = self.try_grant(need).ok()?;
        self.count_pass();
        Some(grant)
    }

    /// Whether a newcomer that takes so much, in bytes, may pass those that wait, if any do; one
    /// that does is counted with `count_pass`.
    pub(crate) fn lets_pass(&self, footprint: u64) -> bool {
        self.len.load(Ordering::SeqCst) == 0 || self.may_pass_with(footprint)
    }

    /// A newcomer passes the queue only where one that waits could be passed.
    fn may_pass(&self, need: &Need) -> bool {
        need.class == Class::Demand && self.may_pass_with(self.footprint(need))
    }

    fn may_pass_with(&self, footprint: u64) -> bool {
        let mut waiters = self.waiters.lock();
        let smallest = waiters.demand.iter().map(|waiter| waiter.footprint).min();
        let Some(front) = waiters.demand.front_mut() else { return true };
        smallest.is_some_and(|smallest| footprint < smallest) && front.may_be_passed()
    }

    /// Counts a new request that was granted space before the waiters.
    pub(crate) fn count_pass(&self) {
        if self.len.load(Ordering::SeqCst) > 0
            && let Some(front) = self.waiters.lock().demand.front_mut()
        {
            front.pass();
        }
    }

    /// Space, as soon as there is some.
    ///
    /// # Errors
    ///
    /// See [`Refused`].
    pub(crate) async fn take(&self, need: &Need, deadline: &Deadline) -> Answer<S> {
        if need.objects.is_empty() {
            return Ok(Grant::<S>::new());
        }
        if let Some(grant) = self.try_take(need) {
            return Ok(grant);
        }
        if need.spares_since.is_none() {
            let pressure = || (self.footprint(need), self.space.used_bytes(), self.len() + 1);
            self.notices.pressure(pressure);
        }
        let _stage = latency::enter(ReadStage::Space);
        let mut ticket = None;
        loop {
            let (reply, parcel) = parcel();
            let waiting = self.enqueue(need, deadline, &mut ticket, reply);
            match deadline.bound(parcel.claim()).await {
                Ok(Ok(answer)) => return answer,
                // It was granted, and the caller did not come: it keeps its place in the queue.
                Ok(Err(Unkept::Recalled)) => drop(waiting),
                Ok(Err(Unkept::Abandoned)) => {
                    return Err(Refused::Error(VirtualMemoryError::Closed));
                }
                Err(Late) => return late_answer::<S>(&parcel, deadline),
            }
        }
    }

    fn enqueue(
        &self,
        need: &Need,
        deadline: &Deadline,
        ticket: &mut Option<u64>,
        reply: Delivery<Answer<S>>,
    ) -> Waiting<'_, S> {
        let footprint = self.footprint(need);
        let mut waiters = self.waiters.lock();
        let ticket = *ticket.get_or_insert_with(|| {
            waiters.next_ticket += 1;
            waiters.next_ticket
        });
        let turn = Turn::of(need);
        if !waiters.closed {
            let deadline = *deadline;
            let waiter = Waiter {
                ticket,
                need: need.clone(),
                footprint,
                passed: 0,
                blocks_since: None,
                deadline,
                reply,
            };
            let queue = waiters.of(turn);
            let place = queue.partition_point(|before| before.ticket < ticket);
            let behind = queue.get(place);
            assert!(behind.is_none_or(|behind| behind.ticket > ticket), "a request stands once");
            queue.insert(place, waiter);
        }
        self.len.store(waiters.len(), Ordering::SeqCst);
        drop(waiters);
        self.wake.add_waiting();
        self.wake.now();
        Waiting { queue: self, turn, ticket }
    }

    /// Grants free space to the waiters, in order. At least `held_bytes` of the tier cannot be
    /// evicted now.
    pub(crate) fn serve(&self, held_bytes: u64) -> Wanted {
        if self.len.load(Ordering::SeqCst) == 0 {
            return Wanted::default();
        }
        let reach = self.space.capacity_bytes().saturating_sub(held_bytes);
        let mut answers = Answers::<S>::new();
        let mut waiters = self.waiters.lock();
        let demand = self.serve_class(&mut waiters.demand, reach, &mut answers);
        let mut wanted = Wanted {
            demand_bytes: demand.bytes,
            first_demand: demand.first,
            scattered: demand.scattered,
            out_of_reach: demand.out_of_reach,
            unblocks_at: demand.unblocks_at,
            ..Wanted::default()
        };
        let none_demanded = demand.bytes == 0 && !demand.coming;
        if none_demanded {
            let prefetch = self.serve_class(&mut waiters.prefetch, reach, &mut answers);
            wanted.add_prefetches(&prefetch);
        }
        if none_demanded && waiters.prefetch.is_empty() {
            let sparing = self.serve_class(&mut waiters.sparing, reach, &mut answers);
            wanted.add_sparing(&sparing);
        } else if !crate::planted!("gather-waits") {
            let sparing = std::mem::take(&mut waiters.sparing);
            answers.extend(sparing.into_iter().map(|waiter| (waiter.reply, Err(Refused::Spill))));
        }
        self.len.store(waiters.len(), Ordering::SeqCst);
        drop(waiters);
        self.answer(answers);
        wanted
    }

    fn serve_class(
        &self,
        waiters: &mut VecDeque<Waiter<S>>,
        reach: u64,
        answers: &mut Answers<S>,
    ) -> Served {
        let mut served = Served::default();
        let most_bytes = self.space.most_bytes();
        let mut blocked: Option<usize> = None;
        // Whether there is one that objects are evicted for first.
        let mut is_led = false;
        let mut at = 0;
        while at < waiters.len() {
            let waiter = &waiters[at];
            if waiter.reply.is_unwanted() {
                drop(waiters.remove(at));
                continue;
            }
            if let Some(refused) = waiter.refusal(reach, most_bytes) {
                answers.extend(waiters.remove(at).map(|waiter| (waiter.reply, Err(refused))));
                continue;
            }
            let footprint = waiter.footprint;
            let may_try = match blocked {
                None => true,
                Some(first) => footprint < served.smallest && waiters[first].may_be_passed(),
            };
            match may_try.then(|| self.try_grant(&waiters[at].need)) {
                Some(Ok(grant)) => {
                    if let Some(first) = blocked {
                        waiters[first].pass();
                    }
                    answers.extend(waiters.remove(at).map(|waiter| (waiter.reply, Ok(grant))));
                }
                refused => {
                    served.smallest = match blocked {
                        None => footprint,
                        Some(_) => served.smallest.min(footprint),
                    };
                    let waiter = &waiters[at];
                    if blocked.is_none() {
                        blocked = Some(at);
                        served.lead(waiter);
                        let until = waiter.blocks_since.map(|since| since + BLOCK_MAX);
                        served.unblocks_at = until.filter(|until| *until > Instant::now());
                    }
                    let is_planted = crate::planted!("behind-out-of-reach") && blocked != Some(at);
                    match refused {
                        // What eviction cannot serve is not evicted for.
                        _ if footprint > reach => served.out_of_reach += 1,
                        Some(Err(why)) if !is_led && !is_planted => {
                            (is_led, blocked) = (true, Some(at));
                            served.lead(waiter);
                            served.wait_for(why, footprint);
                        }
                        // Nothing is evicted yet for what needs neighbours later.
                        _ if !crate::planted!("pages-and-more")
                            && self.space.needs_together(footprint) => {}
                        _ => served.bytes += footprint,
                    }
                    at += 1;
                }
            }
        }
        assert!(served.bytes == 0 || at > 0, "what is wanted is wanted by one that still waits");
        served
    }

    fn answer(&self, answers: Answers<S>) {
        for (reply, answer) in answers {
            let counted = answer.is_ok().then_some(&self.unclaimed);
            // A grant whose caller has gone is given back here.
            drop(reply.deliver(answer, counted));
        }
    }

    /// Closes the queue: waiters, and later requests that would wait, get `Closed`.
    pub(crate) fn close(&self) {
        self.waiters.lock().closed = true;
        if !crate::planted!("closed-untold") {
            self.refuse(|_, _| Some(Refused::Error(VirtualMemoryError::Closed)));
            assert!(self.len() == 0, "nothing waits in a closed queue");
        }
    }

    /// Space is made again after [`close`](Self::close).
    pub(crate) fn open_again(&self) {
        self.waiters.lock().closed = false;
    }

    /// Fails the waiters for which `verdict` has an answer.
    pub(crate) fn refuse(&self, verdict: impl Fn(&Need, u64) -> Option<Refused>) {
        let mut answers = Answers::<S>::new();
        let mut waiters = self.waiters.lock();
        for turn in Turn::ALL {
            for waiter in std::mem::take(waiters.of(turn)) {
                match verdict(&waiter.need, waiter.footprint) {
                    Some(refused) => answers.push((waiter.reply, Err(refused))),
                    None => waiters.of(turn).push_back(waiter),
                }
            }
        }
        self.len.store(waiters.len(), Ordering::SeqCst);
        drop(waiters);
        self.answer(answers);
    }
}

/// The grant may have come with the deadline.
fn late_answer<S: Space>(parcel: &Parcel<Answer<S>>, deadline: &Deadline) -> Answer<S> {
    match parcel.claim().now_or_never() {
        Some(Ok(answer)) => answer,
        _ => Err(Refused::Deadline(deadline.waited())),
    }
}

impl<S: Space> std::fmt::Debug for Queue<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("len", &self.len()).finish_non_exhaustive()
    }
}

/// Takes a request out of the queue, however its future ends.
struct Waiting<'a, S: Space> {
    queue: &'a Queue<S>,
    turn: Turn,
    ticket: u64,
}

impl<S: Space> Drop for Waiting<'_, S> {
    fn drop(&mut self) {
        let mut waiters = self.queue.waiters.lock();
        let before = waiters.len();
        waiters.of(self.turn).retain(|waiter| waiter.ticket != self.ticket);
        assert!(before - waiters.len() <= 1, "a request stood in the queue once");
        self.queue.len.store(waiters.len(), Ordering::SeqCst);
        drop(waiters);
        self.queue.wake.remove_waiting();
        // Those behind it may fit now.
        self.queue.wake.if_waiting();
    }
}
