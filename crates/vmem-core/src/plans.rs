//! Orders that repeat, and how far their users have come.
//!
//! Invariant: a plan is here from its start until its user drops it or the store is closed, and its
//! task ends then. Leases, gathers and promotions tell it what they use; the planned prefetches
//! follow.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// An order of objects that repeats. Its steps are counted through all repetitions.
#[derive(Debug)]
pub(crate) struct Order {
    /// By place, in bytes.
    lens: Vec<u64>,
    /// The places of each object, in ascending order.
    places: HashMap<u64, SmallVec<[usize; 1]>>,
    bytes_early: u64,
    at: Mutex<At>,
    moved: Notify,
}

/// How far an order has come.
#[derive(Debug, Default)]
struct At {
    /// The step after the one that was used last.
    next: u64,
    last: Option<u64>,
}

impl Order {
    /// Of objects by id, with their lengths: some at least.
    pub(crate) fn new(objects: impl Iterator<Item = (u64, u64)>, bytes_early: u64) -> Self {
        let mut lens = Vec::new();
        let mut places: HashMap<u64, SmallVec<[usize; 1]>> = HashMap::new();
        for (place, (id, len)) in objects.enumerate() {
            lens.push(len);
            places.entry(id).or_default().push(place);
        }
        assert!(!lens.is_empty(), "an order has objects");
        Order { lens, places, bytes_early, at: Mutex::default(), moved: Notify::new() }
    }

    /// Moves on behind the next place of the object. Told again of the object that was used last it
    /// moves only if that comes next once more.
    pub(crate) fn used(&self, id: u64) {
        let Some(places) = self.places.get(&id) else { return };
        let count = self.lens.len();
        let mut at = self.at.lock();
        let place = self.place(at.next);
        let steps = |&to: &usize| (to + count - place) % count;
        let Some(skipped) = places.iter().map(steps).min() else { return };
        if at.last == Some(id) && skipped > 0 {
            return;
        }
        *at = At { next: at.next + skipped as u64 + 1, last: Some(id) };
        drop(at);
        self.moved.notify_one();
    }

    /// When it has moved since this was last asked.
    pub(crate) async fn moved(&self) {
        self.moved.notified().await;
    }

    /// The place of a step.
    pub(crate) fn place(&self, step: u64) -> usize {
        (step % self.lens.len() as u64) as usize
    }

    /// The steps that come next: what is prefetched early, at least one, and no place twice.
    pub(crate) fn window(&self) -> Range<u64> {
        let next = self.at.lock().next;
        let mut bytes = 0_u64;
        let mut end = next;
        while end < next + self.lens.len() as u64 {
            bytes = bytes.saturating_add(self.lens[self.place(end)]);
            if end > next && bytes > self.bytes_early {
                break;
            }
            end += 1;
        }
        next..end
    }
}

/// The plans of a store.
#[derive(Debug, Default)]
pub(crate) struct Plans {
    /// How many follow the use of devices, for stores that have none.
    count: AtomicUsize,
    plans: RwLock<Vec<Plan>>,
}

#[derive(Debug)]
struct Plan {
    order: Arc<Order>,
    /// The device whose use it follows, if it is one.
    follows: Option<usize>,
    task: AbortHandle,
}

impl Plans {
    /// One more, which is carried out by a task.
    pub(crate) fn add(&self, order: Arc<Order>, follows: Option<usize>, task: AbortHandle) {
        self.change(|plans| plans.push(Plan { order, follows, task }));
    }

    /// A plan is not wanted any more.
    pub(crate) fn end(&self, order: &Arc<Order>) {
        self.end_those(|plan| Arc::ptr_eq(&plan.order, order));
    }

    /// The store is being closed.
    pub(crate) fn end_all(&self) {
        self.end_those(|_| true);
    }

    fn end_those(&self, which: impl Fn(&Plan) -> bool) {
        self.change(|plans| {
            plans.iter().filter(|plan| which(plan)).for_each(|plan| plan.task.abort());
            plans.retain(|plan| !which(plan));
        });
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Plan>)) {
        let mut plans = self.plans.write();
        change(&mut plans);
        let follow = plans.iter().filter(|plan| plan.follows.is_some()).count();
        self.count.store(follow, Ordering::Release);
    }

    /// Whether any plan follows the use of devices.
    pub(crate) fn follow(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }

    /// An object is used on this device.
    pub(crate) fn used(&self, device: usize, id: u64) {
        if !self.follow() {
            return;
        }
        let plans = self.plans.read();
        let follow = plans.iter().filter(|plan| plan.follows == Some(device));
        follow.for_each(|plan| plan.order.used(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(ids: &[u64], bytes_early: u64) -> Order {
        Order::new(ids.iter().map(|&id| (id, 10)), bytes_early)
    }

    fn places(order: &Order) -> Vec<usize> {
        order.window().map(|step| order.place(step)).collect()
    }

    #[test]
    fn window_is_what_comes_next_and_has_the_bytes() {
        let order = order(&[7, 8, 9, 10], 25);
        assert_eq!(order.window(), 0..2);
        order.used(9);
        assert_eq!(order.window(), 3..5);
        assert_eq!(places(&order), [3, 0]);
        order.used(3);
        assert_eq!(order.window(), 3..5, "it knows no such object");
        order.used(10);
        assert_eq!(order.window(), 4..6, "the next repetition has other steps");
    }

    #[test]
    fn window_has_one_at_least_and_no_place_twice() {
        assert_eq!(order(&[1, 2, 3], 0).window(), 0..1);
        let all = order(&[1, 2, 3], u64::MAX);
        assert_eq!(all.window(), 0..3);
        all.used(1);
        assert_eq!(all.window(), 1..4, "what was used comes again at the end");
        let one = order(&[1], 100);
        one.used(1);
        assert_eq!(one.window(), 1..2);
    }

    #[test]
    fn use_that_is_told_twice_is_one() {
        let order = order(&[1, 2, 1, 3, 3], 10);
        order.used(1);
        order.used(1);
        assert_eq!(places(&order), [1]);
        order.used(2);
        order.used(1);
        assert_eq!(places(&order), [3]);
        order.used(3);
        order.used(3);
        assert_eq!(places(&order), [0], "it comes twice in a row");
        order.used(3);
        assert_eq!(places(&order), [0]);
    }
}
