//! Decorators around completions: each does what it says, and owns what it must.

use std::time::Duration;

use bytes::Bytes;
use futures::future::{FutureExt, join_all};
use tokio::time::Instant;
use vmem_io::driver::{Driver, WriteRun};
use vmem_testkit::decorate::{Span, TraceStep};
use vmem_testkit::{DelayDriver, GateDriver, OpKind, Seed, ThrottleDriver, TraceDriver};

use crate::{Plain, instant_disk, piece, read, run, zeros};

#[test]
fn delays_come_and_reorder() {
    Seed::simulate("delays_come_and_reorder", |seed| async move {
        let range = Duration::from_millis(5)..Duration::from_millis(50);
        let trace = |seed| {
            let range = range.clone();
            async move {
                let delayed = DelayDriver::new(instant_disk(), seed, range);
                let start = Instant::now();
                let writes = (0..20).map(|n| delayed.start_write(run(n * 512, &[1; 512])));
                join_all(writes.map(|write| write.map(|_| start.elapsed()))).await
            }
        };
        let ends = trace(seed).await;
        assert!(ends.iter().all(|end| *end >= range.start), "{ends:?}");
        assert!(!ends.is_sorted(), "20 delays in order: {ends:?}");
        assert_eq!(ends, trace(seed).await, "the same seed, other delays");
    });
}

#[test]
fn the_throttle_holds_its_rate() {
    Seed::simulate("the_throttle_holds_its_rate", |_| async {
        let throttled = ThrottleDriver::new(instant_disk(), 1_000_000);
        let start = Instant::now();
        for n in 0..100 {
            // 100 bytes take a tenth of a tick of the timer.
            let batch =
                (0..100).map(|m| throttled.start_write(run((n * 100 + m) * 100, &[1; 100])));
            join_all(batch).await;
        }
        let took = start.elapsed();
        assert!(took >= Duration::from_secs(1), "1 MB in {took:?} at 1 MB/s");
        assert!(took < Duration::from_millis(1_120), "1 MB in {took:?} at 1 MB/s");
        throttled.set_bytes_per_second(1_000_000_000);
        let start = Instant::now();
        read(&*throttled, 0, 10_000).await.unwrap();
        assert!(start.elapsed() < Duration::from_millis(3));
    });
}

#[test]
fn the_gate_owns_buffers_until_it_lets_go() {
    Seed::simulate("the_gate_owns_buffers_until_it_lets_go", |_| async {
        let gate = GateDriver::new(instant_disk(), &[OpKind::Write]);
        let memory = Bytes::from(vec![7; 512]);
        drop(gate.start_write(vec![WriteRun { offset: 0, parts: vec![memory.clone()] }]));
        gate.wait_held(1).await;
        assert_eq!(read(&*gate, 0, 1).await.unwrap(), [7], "what is held has happened");
        assert!(!memory.is_unique(), "the buffer of a dropped future was let go at the gate");
        let mut closing = gate.close();
        assert!((&mut closing).now_or_never().is_none());
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!((&mut closing).now_or_never().is_none(), "close did not wait for what is held");
        assert_eq!(gate.release_one(), Some(OpKind::Write));
        closing.await.unwrap();
        assert!(memory.is_unique());
        assert_eq!(gate.release_one(), None);
    });
}

#[test]
fn the_gate_releases_in_any_order() {
    Seed::simulate("the_gate_releases_in_any_order", |_| async {
        let gate = GateDriver::new(instant_disk(), &[OpKind::Write, OpKind::Sync]);
        let mut first = gate.start_write(run(0, &[1; 1]));
        let mut second = gate.sync();
        gate.wait_held(2).await;
        assert_eq!(gate.release_last(), Some(OpKind::Sync));
        second.as_mut().await.unwrap();
        assert!((&mut first).now_or_never().is_none());
        gate.open();
        first.await.unwrap();
        gate.start_write(run(0, &[2; 1])).await.unwrap();
        gate.shut(&[OpKind::Read]);
        let reading = gate.start_read(zeros(1), piece(0, 1));
        gate.wait_held(1).await;
        assert_eq!((gate.held(), gate.release_all()), (1, 1));
        assert_eq!(reading.await.0[..], [2]);
    });
}

#[test]
fn the_trace_has_every_call_and_its_end() {
    Seed::simulate("the_trace_has_every_call_and_its_end", |_| async {
        let trace = TraceDriver::new(instant_disk());
        drop(trace.start_write(run(512, &[1; 100])));
        let (_, result) = trace.start_read(zeros(8), piece(1 << 20, 8)).await;
        assert!(result.is_err());
        trace.start_punch(vec![0..512; 1]).await.unwrap();
        trace.close().await.unwrap();
        let span = |offset, len| Span { offset, len };
        assert_eq!(trace.spans(OpKind::Write), [span(512, 100)]);
        assert_eq!(trace.spans(OpKind::Punch), [span(0, 512)]);
        let events = trace.take_events();
        let ends = |call, ok| {
            let end = TraceStep::Ended { ok };
            events.iter().filter(|event| event.call == call && event.step == end).count()
        };
        assert_eq!((ends(0, true), ends(1, false), ends(2, true), ends(3, true)), (1, 1, 1, 1));
        assert_eq!(events.len(), 8);
        assert!(trace.events().is_empty());
    });
}
