//! Clocks, histograms and the list, on a paused clock.

use std::time::SystemTime;

use tokio::time::advance;
use tracing::Span;

use super::*;
use crate::error::VirtualMemoryError;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn latencies() -> Arc<Latencies> {
    Latencies::new(Duration::MAX)
}

fn none_is_under_way(latencies: &Latencies) -> bool {
    ReadStage::ALL.into_iter().all(|stage| latencies.in_stage(stage) == 0)
}

#[tokio::test(start_paused = true)]
async fn times_of_overlapping_tasks_add_up_to_the_total() {
    let all = latencies();
    let clock = StageClock::start(&all, Some(Span::none()), String::new);
    on_clock(Some(clock.clone()), async {
        advance(ms(1)).await;
        let space = enter(ReadStage::Space);
        advance(ms(10)).await;
        // Another task of the same read has got further: that counts.
        let io = enter(ReadStage::Io);
        assert_eq!((all.in_stage(ReadStage::Io), all.in_stage(ReadStage::Space)), (1, 0));
        advance(ms(100)).await;
        drop(io);
        advance(ms(1000)).await;
        drop(space);
    })
    .await;
    served_by(MemoryTier::Disk);
    let told = clock.end();
    assert_eq!(told.tier, None, "said outside of the read");
    assert_eq!(told.times.of(ReadStage::Runtime), ms(1));
    assert_eq!(told.times.of(ReadStage::Space), ms(1010));
    assert_eq!(told.times.of(ReadStage::Io), ms(100));
    assert_eq!((told.times.total(), told.times.longest()), (ms(1111), ReadStage::Space));
    assert!(none_is_under_way(&all));
}

#[tokio::test(start_paused = true)]
async fn stage_that_is_not_left_counts_up_to_the_end() {
    let all = latencies();
    let clock = StageClock::start(&all, Some(Span::none()), String::new);
    let gate = on_clock(Some(clock.clone()), async { enter(ReadStage::Gate) }).await;
    advance(ms(7)).await;
    // The caller gives up; the task waits on.
    assert_eq!(clock.end().times.of(ReadStage::Gate), ms(7));
    assert!(none_is_under_way(&all));
    drop(gate);
    assert!(none_is_under_way(&all));
}

#[tokio::test(start_paused = true)]
async fn follower_gets_the_times_since_it_joined() {
    let all = latencies();
    let first = StageClock::start(&all, Some(Span::none()), String::new);
    let io = on_clock(Some(first.clone()), async {
        served_by(MemoryTier::Disk);
        assert!(follow(1, Some(&first)).is_none(), "a read does not follow itself");
        enter(ReadStage::Io)
    })
    .await;
    advance(ms(30)).await;
    let second = StageClock::start(&all, Some(Span::none()), String::new);
    on_clock(Some(second.clone()), async {
        let following = follow(1, Some(&first));
        assert!(following.is_some());
        assert_eq!(all.in_stage(ReadStage::Io), 2, "both are where the fetch is");
        advance(ms(5)).await;
        // The first caller gives up; its fetch goes on for the other.
        first.end();
        assert_eq!(all.in_stage(ReadStage::Io), 1);
        advance(ms(5)).await;
        drop(following);
        advance(ms(1)).await;
    })
    .await;
    let told = second.end();
    assert_eq!(told.times.of(ReadStage::Io), ms(10));
    assert_eq!(told.times.of(ReadStage::Runtime), ms(1));
    assert!(told.joined && told.tier == Some(MemoryTier::Disk));
    drop(io);
    assert!(none_is_under_way(&all));
}

#[test]
fn histogram_is_off_by_a_thirty_second_at_most() {
    let histograms = Histograms::default();
    let empty = histograms.of(ReadOp::Whole, MemoryTier::Disk).snapshot();
    assert_eq!((empty.count(), empty.quantile(0.5)), (0, None));
    for micros in 1..=1000 {
        histograms.of(ReadOp::Whole, MemoryTier::Disk).record(Duration::from_micros(micros));
    }
    let all = histograms.of(ReadOp::Whole, MemoryTier::Disk).snapshot();
    assert_eq!(all.count(), 1000);
    for (fraction, micros) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
        let found = all.quantile(fraction).expect("reads").as_secs_f64() * 1e6;
        assert!(found >= micros && found <= micros * (1.0 + 1.0 / 32.0), "{fraction}: {found}");
    }
    assert_eq!(all.quantile(1.5), None);
    histograms.of(ReadOp::Whole, MemoryTier::Disk).record(Duration::MAX);
    let later = histograms.of(ReadOp::Whole, MemoryTier::Disk).snapshot();
    assert_eq!((later.since(&all).count(), later.merged(&all).count()), (1, 2001));
    assert_eq!(empty.merged(&all).count(), 1000);
    // Each kind and tier has its own.
    let device = MemoryTier::of_device(255);
    histograms.of(ReadOp::Stream, device).record(ms(1));
    assert_eq!(histograms.of(ReadOp::Stream, device).snapshot().count(), 1);
    assert_eq!(histograms.of(ReadOp::Stream, MemoryTier::Vram).snapshot().count(), 0);
}

fn read(handle: u64, took: Duration) -> SlowRead {
    let mut times = ReadTimes::default();
    times.0[ReadStage::Turn as usize] = took;
    SlowRead {
        handle,
        name: None,
        objects: 1,
        bytes: 4096,
        op: ReadOp::Part,
        tier: MemoryTier::Disk,
        times,
        outcome: ReadOutcome::Failed(VirtualMemoryError::Closed),
        joined: false,
        ended: SystemTime::now(),
    }
}

#[tokio::test(start_paused = true)]
async fn list_keeps_the_slowest_and_forgets_the_old() {
    let slowest = Slowest::new();
    for n in 0..100 {
        // Neither in order nor in reverse.
        let took = ms((n * 37) % 100);
        slowest.offer(took, || read(n, took));
    }
    let totals = |list: Vec<SlowRead>| -> Vec<_> {
        list.iter().map(|read| read.times.total().as_millis() as u64).collect()
    };
    assert_eq!(totals(slowest.list()), (68..100).rev().collect::<Vec<_>>());
    slowest.offer(ms(68), || panic!("no slower than the list"));
    advance(Duration::from_secs(301)).await;
    slowest.offer(ms(1), || read(1, ms(1)));
    assert_eq!(totals(slowest.list()), [1], "the others are old");
    let shown = read(7, ms(2)).to_string();
    assert_eq!(shown, "object 7, 4096 bytes from disk (part), failed: 2.0ms, turn 2.0ms");
}
