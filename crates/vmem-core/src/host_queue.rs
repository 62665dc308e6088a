//! Room in object space, and the queue of those who wait for it.
//!
//! Invariant: a request that waits is in the queue, where the evictor sees how much is wanted;
//! it leaves by a slot, by a refusal, by its deadline or by being dropped. Requests are served in
//! the order in which they came, but a smaller one may pass one that does not fit yet, at most
//! `PASSES_MAX` times. Called by whoever needs host memory; served by the actor alone.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::error::VirtualMemoryError;
use crate::host::{HostArena, HostSlot, NoRoom};
use crate::wake::Wake;

/// How often smaller requests may pass the first one that does not fit.
const PASSES_MAX: u32 = 64;

/// Who asks, which decides who goes first and what may be evicted for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Somebody waits for it now.
    Demand,
    /// Ahead of need: never at the cost of what is in use.
    Prefetch,
}

/// A request for room.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    pub(crate) len: usize,
    /// The object that it is for.
    pub(crate) owner: u64,
    pub(crate) class: Class,
    /// The caller goes to disk rather than wait for what is held or pinned.
    pub(crate) may_spill: bool,
}

/// Why there is no slot.
#[derive(Clone, Debug)]
pub(crate) enum Refused {
    /// Nothing can be evicted now, and the caller said that he has another way.
    Spill,
    /// The deadline passed after so long a wait.
    Deadline(Duration),
    /// Something that waiting does not change.
    Error(VirtualMemoryError),
}

/// What waits, as the evictor sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Footprint of all demand requests, in bytes.
    pub(crate) demand_bytes: u64,
    /// Footprint of all prefetch requests, in bytes.
    pub(crate) prefetch_bytes: u64,
    /// The footprint of the smallest prefetch request, in bytes.
    pub(crate) smallest_prefetch: u64,
    /// As `scattered`, for the first prefetch request.
    pub(crate) prefetch_scattered: bool,
    /// The first request would fit by its footprint, but the room lies in partly used spans.
    pub(crate) scattered: bool,
}

impl Wanted {
    pub(crate) fn any(&self) -> bool {
        self.demand_bytes + self.prefetch_bytes > 0
    }
}

struct Waiter {
    ticket: u64,
    need: Need,
    footprint: u64,
    passed: u32,
    reply: oneshot::Sender<Result<HostSlot, Refused>>,
}

#[derive(Default)]
struct Queue {
    next_ticket: u64,
    demand: VecDeque<Waiter>,
    prefetch: VecDeque<Waiter>,
    /// Nobody makes room any more.
    closed: bool,
}

impl Queue {
    fn of(&mut self, class: Class) -> &mut VecDeque<Waiter> {
        match class {
            Class::Demand => &mut self.demand,
            Class::Prefetch => &mut self.prefetch,
        }
    }

    fn len(&self) -> usize {
        self.demand.len() + self.prefetch.len()
    }
}

/// Object space with its queue.
pub(crate) struct HostQueue {
    arena: Arc<HostArena>,
    queue: Mutex<Queue>,
    /// A prefetch gets no room beyond this, in bytes used: it must not cause evictions.
    prefetch_limit_bytes: u64,
    /// Length of the queue, to be read without the lock.
    waiters: AtomicUsize,
    wake: Arc<Wake>,
}

impl HostQueue {
    pub(crate) fn new(arena: Arc<HostArena>, prefetch_limit_bytes: u64, wake: Arc<Wake>) -> Self {
        let waiters = AtomicUsize::new(0);
        HostQueue { arena, queue: Mutex::default(), prefetch_limit_bytes, waiters, wake }
    }

    fn try_alloc(&self, need: Need) -> Result<HostSlot, NoRoom> {
        let footprint = HostArena::footprint(need.len);
        let used = self.arena.used_bytes();
        // One that is larger than the limit by itself gets room while nothing else has any.
        let limit = self.prefetch_limit_bytes.max(footprint);
        if need.class == Class::Prefetch && used + footprint > limit {
            return Err(NoRoom { scattered: false });
        }
        self.arena.try_alloc(need.len, need.owner)
    }

    pub(crate) fn arena(&self) -> &Arc<HostArena> {
        &self.arena
    }

    pub(crate) fn waiters(&self) -> usize {
        self.waiters.load(Ordering::Relaxed)
    }

    /// Room that is there now and that nobody waits for.
    pub(crate) fn try_take(&self, need: Need) -> Option<HostSlot> {
        if self.waiters.load(Ordering::SeqCst) > 0 && !self.may_pass(need) {
            return None;
        }
        self.try_alloc(need).ok()
    }

    /// A newcomer passes the queue only where one who waits could be passed.
    fn may_pass(&self, need: Need) -> bool {
        let footprint = HostArena::footprint(need.len);
        let mut queue = self.queue.lock();
        let ahead = match need.class {
            Class::Demand => queue.demand.iter().map(|waiter| waiter.footprint).min(),
            Class::Prefetch => Some(0),
        };
        match queue.demand.front_mut() {
            None => need.class == Class::Demand,
            Some(front) if front.passed < PASSES_MAX && ahead.is_some_and(|a| footprint < a) => {
                front.passed += 1;
                true
            }
            Some(_) => false,
        }
    }

    /// Room, as soon as there is some.
    ///
    /// # Errors
    ///
    /// See [`Refused`].
    pub(crate) async fn take(&self, need: Need, deadline: Instant) -> Result<HostSlot, Refused> {
        if let Some(slot) = self.try_take(need) {
            return Ok(slot);
        }
        let asked = Instant::now();
        let (ticket, answer) = self.enqueue(need);
        let _leaves_queue = LeavesQueue { queue: self, class: need.class, ticket };
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Refused::Error(VirtualMemoryError::Closed)),
            Err(_) => Err(Refused::Deadline(asked.elapsed())),
        }
    }

    fn enqueue(&self, need: Need) -> (u64, oneshot::Receiver<Result<HostSlot, Refused>>) {
        let (reply, answer) = oneshot::channel();
        let footprint = HostArena::footprint(need.len);
        let mut queue = self.queue.lock();
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        if !queue.closed {
            queue.of(need.class).push_back(Waiter { ticket, need, footprint, passed: 0, reply });
        }
        self.waiters.store(queue.len(), Ordering::SeqCst);
        drop(queue);
        self.wake.add_waiting();
        self.wake.now();
        (ticket, answer)
    }

    /// Gives free room to those who wait, in order.
    pub(crate) fn serve(&self) -> Wanted {
        if self.waiters.load(Ordering::SeqCst) == 0 {
            return Wanted::default();
        }
        // Slots whose receiver has just gone are given back after the lock is.
        let mut unclaimed = Vec::new();
        let mut queue = self.queue.lock();
        let mut wanted = Wanted::default();
        wanted.demand_bytes = self.serve_class(&mut queue.demand, &mut wanted, &mut unclaimed);
        if queue.demand.is_empty() {
            let scattered = wanted.scattered;
            wanted.prefetch_bytes =
                self.serve_class(&mut queue.prefetch, &mut wanted, &mut unclaimed);
            wanted.prefetch_scattered = std::mem::replace(&mut wanted.scattered, scattered);
            let footprints = queue.prefetch.iter().map(|waiter| waiter.footprint);
            wanted.smallest_prefetch = footprints.min().unwrap_or(0);
        }
        self.waiters.store(queue.len(), Ordering::SeqCst);
        drop(queue);
        drop(unclaimed);
        wanted
    }

    fn serve_class(
        &self,
        waiters: &mut VecDeque<Waiter>,
        wanted: &mut Wanted,
        unclaimed: &mut Vec<Result<HostSlot, Refused>>,
    ) -> u64 {
        let mut bytes = 0;
        let mut smallest_blocked = u64::MAX;
        let mut at = 0;
        while at < waiters.len() {
            let waiter = &waiters[at];
            if waiter.reply.is_closed() {
                drop(waiters.remove(at));
                continue;
            }
            let (need, footprint) = (waiter.need, waiter.footprint);
            let passes = at > 0;
            let may_try =
                footprint < smallest_blocked && (!passes || waiters[0].passed < PASSES_MAX);
            match may_try.then(|| self.try_alloc(need)) {
                Some(Ok(slot)) => {
                    if passes {
                        waiters[0].passed += 1;
                    }
                    if let Some(waiter) = waiters.remove(at) {
                        unclaimed.extend(waiter.reply.send(Ok(slot)).err());
                    }
                }
                refused => {
                    if at == 0 {
                        wanted.scattered =
                            matches!(refused, Some(Err(NoRoom { scattered: true, .. })));
                    }
                    smallest_blocked = smallest_blocked.min(footprint);
                    bytes += footprint;
                    at += 1;
                }
            }
        }
        bytes
    }

    /// Nobody makes room any more: those who wait, and those who would, get `Closed`.
    pub(crate) fn close(&self) {
        self.queue.lock().closed = true;
        self.refuse(|_, _| Some(Refused::Error(VirtualMemoryError::Closed)));
    }

    /// Refuses those for whom `verdict` has an answer.
    pub(crate) fn refuse(&self, verdict: impl Fn(&Need, u64) -> Option<Refused>) {
        let mut queue = self.queue.lock();
        for class in [Class::Demand, Class::Prefetch] {
            let waiters = std::mem::take(queue.of(class));
            for waiter in waiters {
                match verdict(&waiter.need, waiter.footprint) {
                    // Nobody may be listening any more, which is as good.
                    Some(refused) => drop(waiter.reply.send(Err(refused))),
                    None => queue.of(class).push_back(waiter),
                }
            }
        }
        self.waiters.store(queue.len(), Ordering::SeqCst);
    }
}

impl std::fmt::Debug for HostQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostQueue").field("waiters", &self.waiters()).finish_non_exhaustive()
    }
}

/// Takes a request out of the queue, however its future ends.
struct LeavesQueue<'a> {
    queue: &'a HostQueue,
    class: Class,
    ticket: u64,
}

impl Drop for LeavesQueue<'_> {
    fn drop(&mut self) {
        let mut queue = self.queue.queue.lock();
        queue.of(self.class).retain(|waiter| waiter.ticket != self.ticket);
        self.queue.waiters.store(queue.len(), Ordering::SeqCst);
        drop(queue);
        self.queue.wake.remove_waiting();
        // Those behind it may fit now.
        self.queue.wake.if_waiting();
    }
}
