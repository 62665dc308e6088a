//! Checks of operations that end otherwise than by being awaited, and of what they own.
//!
//! Invariant: an operation owns its memory and its [`Keep`] until it has ended, and no longer.
//! Called by the suite.

use std::sync::{Arc, Weak};

use rand::Rng;
use vmem_core::backend::IoBuf;
use vmem_io::driver::{Driver, Keep, ReadPiece, WriteRun, is_closed};

use super::tools::{arrives, block, fetch, put, round, run, start_punch, start_read, start_write};
use crate::conformance::{aligned_buf, assert_ok, settle, watched_bytes, within};
use crate::{Pattern, Seed, poll_then_drop};

/// An operation starts with the call: a future that is never polled writes all the same.
pub async fn starts_at_the_call(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let data = Pattern::new(seed.value(), 1).bytes(0, 4 * block);
    put(driver, 0, &vec![0; data.len()]).await;
    drop(start_write(driver, vec![run(driver, 0, &data)]));
    arrives(driver, "a write whose future was dropped unpolled", 0, &data).await;
}

/// Futures dropped after any number of polls: writes arrive whole, reads do no harm.
pub async fn dropped_futures(seed: Seed, driver: &dyn Driver) {
    let len = round(65_536, block(driver));
    let mut rng = seed.fork("dropped futures").rng();
    put(driver, 0, &vec![0; 8 * len]).await;
    for n in 0..32 {
        let offset = rng.random_range(0..8) * len as u64;
        let data = Pattern::new(seed.value(), n).bytes(offset, len);
        let polls = rng.random_range(0..4);
        let reading = || {
            let (buf, start) = aligned_buf(len, block(driver));
            let range = start..start + len;
            start_read(driver, buf, vec![ReadPiece { offset, range }])
        };
        drop(reading());
        poll_then_drop(reading(), polls).await;
        let writing = start_write(driver, vec![run(driver, offset, &data)]);
        poll_then_drop(writing, polls).await;
        arrives(driver, "a write whose future was dropped", offset, &data).await;
    }
}

/// The memory of a write is let go when it has ended, with its future dropped or not.
pub async fn buffers_come_back(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let data = Pattern::new(seed.value(), 1).bytes(0, block);
    for dropped in [false, true] {
        let (memory, watch) = watched_bytes(&data, block);
        let writing = start_write(driver, vec![WriteRun { offset: 0, parts: vec![memory] }]);
        match dropped {
            true => drop(writing),
            false => assert_ok("a write", within("a write", writing).await),
        }
        settle("the memory of a write is let go", async || watch.strong_count() == 0).await;
    }
}

/// `close` waits for what is in flight, and what comes later is an error and no hang.
pub async fn closes(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let data = Pattern::new(seed.value(), 1).bytes(0, 16 * block);
    let (memory, watch) = watched_bytes(&data, block);
    let watched = start_write(driver, vec![WriteRun { offset: 0, parts: vec![memory] }]);
    let writing = start_write(driver, vec![run(driver, 0, &data)]);
    assert_ok("close", within("close", driver.close()).await);
    // A result that was not taken yet may hold the memory; an operation that goes on holds it
    // longer.
    drop(watched);
    let mut turns = 0..10_000;
    while watch.strong_count() > 0 && turns.next().is_some() {
        tokio::task::yield_now().await;
    }
    assert_eq!(watch.strong_count(), 0, "close did not wait for a write that was in flight");
    assert_ok("a write before close", within("a write before close", writing).await);
    let (buf, result) = fetch(driver, 0, block).await;
    let closed = result.as_ref().is_err_and(is_closed);
    assert!(closed, "a read after close: {result:?}");
    assert_eq!(buf.len(), block, "a read after close kept the buffer");
    let late = [
        ("write", start_write(driver, vec![run(driver, 0, &data)])),
        ("punch", start_punch(driver, vec![0..block as u64; 1])),
        ("sync", driver.sync()),
    ];
    for (what, late) in late {
        let result = within("a call after close", late).await;
        let closed = result.as_ref().is_err_and(is_closed);
        assert!(closed, "{what} after close: {result:?}");
    }
    // Whether a second close is an error is left open; it ends.
    let _ok_or_not = within("a second close", driver.close()).await;
}

/// What an operation keeps comes back with its result, good or bad, and is dropped if its waiter
/// has gone.
pub async fn keeps_come_back(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let data = Pattern::new(seed.value(), 1).bytes(0, block);
    let runs = || vec![run(driver, 0, &data)];
    let piece = |offset| vec![ReadPiece { offset, range: 0..block }];
    let buf = || IoBuf::from_vec(vec![0; block]);
    let (keep, watch) = watched_keep();
    let (keep, result) = within("a write", driver.write(runs(), keep)).await;
    assert_ok("a write", result);
    assert_kept("a write", keep, &watch);
    for offset in [0, 1 << 30] {
        let (keep, watch) = watched_keep();
        let (_, keep, _) = within("a read", driver.read(buf(), piece(offset), keep)).await;
        assert_kept("a read", keep, &watch);
    }
    let (keep, watch) = watched_keep();
    let (keep, result) = within("a punch", driver.punch(Vec::new(), keep)).await;
    assert_ok("a punch of nothing", result);
    assert_kept("a punch", keep, &watch);
    for kind in 0..3 {
        let (keep, watch) = watched_keep();
        match kind {
            0 => drop(driver.write(runs(), keep)),
            1 => drop(driver.read(buf(), piece(0), keep)),
            _ => drop(driver.punch(vec![0..block as u64; 1], keep)),
        }
        settle("what a dropped future kept is let go", async || watch.strong_count() == 0).await;
    }
}

fn watched_keep() -> (Keep, Weak<()>) {
    let life = Arc::new(());
    let watch = Arc::downgrade(&life);
    (Keep::new(life), watch)
}

#[track_caller]
fn assert_kept(what: &str, keep: Keep, watch: &Weak<()>) {
    assert_eq!(watch.strong_count(), 1, "{what} let go of what it was to keep");
    assert!(keep.take::<Arc<()>>().is_some(), "{what} gave something else back");
}
