//! Futures are dropped where they should be.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use tokio::time::sleep;
use vmem_testkit::{Seed, exhaust, exhaust_with, poll_then_drop, poll_wake_then_drop};

use crate::message_of;

/// Three waits, counting those that ended.
async fn three_steps(done: &Cell<u32>) -> u32 {
    for _ in 0..3 {
        sleep(Duration::from_secs(1)).await;
        done.set(done.get() + 1);
    }
    7
}

#[test]
fn each_poll_is_a_step() {
    Seed::simulate("each_poll_is_a_step", |_| async {
        for polls in 0..6 {
            let done = Cell::new(0);
            let output = poll_then_drop(three_steps(&done), polls).await;
            assert_eq!(output, (polls >= 4).then_some(7), "{polls} polls");
            assert_eq!(done.get() as usize, polls.saturating_sub(1).min(3), "{polls} polls");
        }
    });
}

#[test]
fn the_wake_before_the_drop_has_happened() {
    Seed::simulate("the_wake_before_the_drop_has_happened", |_| async {
        let start = tokio::time::Instant::now();
        let done = Cell::new(0);
        assert_eq!(poll_wake_then_drop(three_steps(&done), 2).await, None);
        assert!(start.elapsed() >= Duration::from_secs(2), "the second wait had ended");
        assert_eq!(done.get(), 1, "and its result was not taken");
    });
}

#[test]
fn exhaust_visits_every_point() {
    Seed::simulate("exhaust_visits_every_point", |_| async {
        let done = Cell::new(0);
        let seen = RefCell::new(Vec::new());
        let took = exhaust_with(
            |_| {
                done.set(0);
                three_steps(&done)
            },
            async |polls| seen.borrow_mut().push((polls, done.get())),
        );
        assert_eq!(took.await, 4);
        let points = [(0, 0), (0, 0), (1, 0), (1, 0), (2, 1), (2, 1), (3, 2), (3, 2), (4, 3)];
        assert_eq!(seen.into_inner(), points);
        assert_eq!(exhaust(|_| std::future::ready(())).await, 1);
    });
}

#[test]
fn a_lost_wake_is_reported() {
    let message = message_of(|| {
        Seed::simulate("a_lost_wake_is_reported", |_| async {
            poll_then_drop(std::future::pending::<()>(), 2).await
        })
    });
    assert!(message.contains("pending after poll 1 and not woken"), "{message}");
}
