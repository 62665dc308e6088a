//! What traces say of reads that are not hits.
//!
//! Invariant: each test has a subscriber of its own thread, on which its store runs too. The spans
//! are those that `docs/seeing.md` names. Not called by other tests.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tracing::{Instrument, Span};
use vmem::{ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryConfigBuilder};
use vmem_testkit::Seen;
use vmem_testkit::sim::{SimConfig, SimDriver, Speed};

use crate::support::{self, DISK, HOST, KIB, MIB, bytes};

const LEN: usize = 64 * KIB;
const SLOW: Duration = Duration::from_millis(100);

fn open(threshold: Duration) -> VirtualMemory {
    open_with(|b| b.slow_read_threshold(threshold))
}

fn open_with(
    configure: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
) -> VirtualMemory {
    let speed = Speed { read_latency: SLOW, ..Speed::default() };
    let disk = SimDriver::new(SimConfig { speed, ..SimConfig::default() });
    support::over(disk, 16 * LEN, 64 * MIB as u64, configure)
}

#[tokio::test(start_paused = true)]
async fn span_of_a_read_says_what_it_waited_for() {
    let (seen, _watching) = Seen::watch();
    let vmem = open(SLOW / 2);
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    vmem.read_with(&handle, ReadOptions::new().promote(true)).await.unwrap();
    // A hit, which leaves no trace.
    vmem.read(&handle).await.unwrap();

    let reads = seen.spans("read");
    assert_eq!(reads.len(), 1, "{reads:?}");
    let read = &reads[0];
    assert_eq!(read.target, "vmem::read");
    assert_eq!(read.fields.number("handle"), u128::from(handle.id()));
    assert_eq!(read.fields.number("bytes"), LEN as u128);
    let words = [("op", "whole"), ("tier", "disk"), ("outcome", "served"), ("cause", "io")];
    for (field, expected) in words {
        assert_eq!(read.fields.text(field), expected, "{read:?}");
    }
    assert_eq!(read.fields.number("io_us"), SLOW.as_micros());
    let stages = ["space_us", "turn_us", "io_us", "copy_us", "gate_us", "runtime_us"];
    // Of a stage that it was not in nothing is said.
    let spent =
        |stage: &&str| (!read.fields.text(stage).is_empty()).then(|| read.fields.number(stage));
    let sum: u128 = stages.iter().filter_map(spent).sum();
    assert_eq!(read.fields.text("gate_us"), "");
    let total = read.fields.number("total_us");
    // Each is rounded down to a microsecond.
    assert!(sum <= total && sum + 6 > total, "{sum} of {total}");

    let migrations = seen.spans("migration");
    let by_read = migrations.iter().find(|span| span.fields.text("cause") == "read");
    let by_read = by_read.expect("the read loads the object");
    assert_eq!(by_read.follows, [read.id], "the migration follows from its read");
    assert_eq!(by_read.parent, Some(read.id), "and is in its trace");

    let told = seen.events("vmem::read");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].fields.text("message").contains("io 100.0ms"), "{told:?}");
    vmem.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn read_below_the_threshold_causes_no_event() {
    let (seen, _watching) = Seen::watch();
    let vmem = open(2 * SLOW);
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    vmem.read(&handle).await.unwrap();
    assert_eq!(seen.spans("read").len(), 1);
    assert!(seen.events("vmem::read").is_empty());
    vmem.close().await.unwrap();
}

/// The span of a service's request.
fn request() -> Span {
    tracing::info_span!(target: "service", "request")
}

fn id_of(span: &Span) -> u64 {
    span.id().expect("somebody watches").into_u64()
}

#[tokio::test(start_paused = true)]
async fn windows_of_a_stream_are_in_the_trace_of_the_request() {
    let (seen, _watching) = Seen::watch();
    let vmem = open(SLOW * 100);
    let handle = vmem.put(bytes(1, 1, 16 * LEN), DISK).await.unwrap();
    let request = request();
    let mut reader = vmem.reader(&handle, ..);
    let mut all = Vec::new();
    reader.read_to_end(&mut all).instrument(request.clone()).await.unwrap();
    assert_eq!(all.len(), 16 * LEN);

    let windows = seen.spans("read");
    assert!(windows.len() > 1, "a stream of several windows: {windows:?}");
    for window in &windows {
        assert_eq!(window.fields.text("op"), "stream");
        assert_eq!(window.parent, Some(id_of(&request)), "{window:?}");
    }
    vmem.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn migrations_follow_from_the_request_that_asked_for_them() {
    let (seen, _watching) = Seen::watch();
    let vmem = open(SLOW * 100);
    let mut asked = Vec::new();
    for seed in 0..4 {
        let handle = vmem.put(bytes(seed, 1, LEN), DISK).await.unwrap();
        asked.push((handle, request()));
    }
    let [promoted, pinned, prefetched, demoted] = &asked[..] else { unreachable!() };
    vmem.promote(&promoted.0, HOST).instrument(promoted.1.clone()).await.unwrap();
    let pin = vmem.pin(&pinned.0, HOST).instrument(pinned.1.clone()).await.unwrap();
    prefetched.1.in_scope(|| vmem.prefetch(&prefetched.0, HOST)).await.unwrap();
    vmem.write(&demoted.0, &bytes(9, 1, LEN)[..]).await.unwrap();
    vmem.promote(&demoted.0, HOST).await.unwrap();
    vmem.demote(&demoted.0, DISK).instrument(demoted.1.clone()).await.unwrap();

    let of = |(handle, _): &(VMemHandle, Span), cause: &str| {
        let all = seen.spans("migration").into_iter();
        let mut all = all.filter(|span| {
            span.fields.number("handle") == u128::from(handle.id())
                && span.fields.text("cause") == cause
        });
        all.next().unwrap_or_else(|| panic!("{cause}: {:?}", seen.spans("migration")))
    };
    for (asked, cause) in [(promoted, "promote"), (pinned, "promote"), (demoted, "demote")] {
        let migration = of(asked, cause);
        assert_eq!(migration.follows, [id_of(&asked.1)], "{migration:?}");
        assert_eq!(migration.parent, Some(id_of(&asked.1)), "{migration:?}");
    }
    // It has a span of its own, which does not keep that of its asker open.
    let prefetch = &seen.spans("prefetch")[0];
    assert_eq!(prefetch.follows, [id_of(&prefetched.1)], "{prefetch:?}");
    assert_eq!(prefetch.parent, None, "{prefetch:?}");
    let migration = of(prefetched, "prefetch");
    assert_eq!(migration.follows, [prefetch.id], "{migration:?}");
    assert_eq!(migration.parent, Some(prefetch.id), "{migration:?}");
    drop(pin);
    vmem.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn migration_follows_from_every_read_that_joins() {
    let (seen, _watching) = Seen::watch();
    let vmem = open(SLOW * 100);
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    let promote = ReadOptions::new().promote(true);
    let reads = (0..3).map(|nth| {
        let read = vmem.read_with(&handle, promote.clone());
        async move {
            // The last one joins while the object is being copied.
            tokio::time::sleep(if nth == 2 { SLOW / 2 } else { Duration::ZERO }).await;
            read.await.unwrap();
        }
    });
    futures::future::join_all(reads).await;

    let reads: BTreeSet<_> = seen.spans("read").iter().map(|read| read.id).collect();
    assert_eq!(reads.len(), 3, "{reads:?}");
    let migrations = seen.spans("migration");
    let by_read = migrations.iter().find(|span| span.fields.text("cause") == "read").unwrap();
    assert_eq!(by_read.follows.iter().copied().collect::<BTreeSet<_>>(), reads, "{by_read:?}");
    let joined = seen.spans("read").into_iter().filter(|read| !read.follows.is_empty());
    assert_eq!(joined.count(), 2, "those that join follow from the first one");
    vmem.close().await.unwrap();
}

/// Reads all of these from disk at once, and brings them to host memory.
async fn bring(vmem: &VirtualMemory, handles: &[VMemHandle]) {
    let reads = handles.iter().map(|h| vmem.read_with(h, ReadOptions::new().promote(true)));
    for read in futures::future::join_all(reads).await {
        read.unwrap();
    }
}

/// A subscriber takes longer for a span than a small read does: a storm of reads has as many as the
/// rate says, whole, and what was left out is counted.
#[tokio::test(start_paused = true)]
async fn spans_beyond_the_rate_are_left_out_and_counted() {
    for (rate, traced) in [(0, 0), (1, 1), (4, 4), (u32::MAX, 10)] {
        let (seen, _watching) = Seen::watch();
        let vmem = open_with(|b| b.spans_per_second(rate));
        let handles = support::put_all(&vmem, 12, LEN, DISK).await;
        let before = seen.spans("migration").len();
        bring(&vmem, &handles[..10]).await;
        let reads = seen.spans("read");
        assert_eq!(reads.len(), traced, "of ten at {rate} a second");
        assert!(reads.iter().all(|read| read.fields.text("left_out").is_empty()), "{reads:?}");
        // The migrations of those alone, however many more there are.
        let own: BTreeSet<_> = reads.iter().map(|read| Some(read.id)).collect();
        let brought = seen.spans("migration").split_off(before);
        let parents: Vec<_> = brought.iter().map(|migration| migration.parent).collect();
        assert_eq!(parents.len(), traced, "{parents:?}");
        assert_eq!(parents.into_iter().collect::<BTreeSet<_>>(), own);

        // What was not used is kept for a second, and no longer.
        tokio::time::sleep(Duration::from_secs(100)).await;
        bring(&vmem, &handles[10..]).await;
        let later = seen.spans("read").split_off(traced);
        let left_out: Vec<_> = later.iter().map(|read| read.fields.text("left_out")).collect();
        let expected: &[&str] = match rate {
            0 => &[],
            1 => &["9"],
            4 => &["6", ""],
            _ => &["", ""],
        };
        assert_eq!(left_out, expected, "at {rate} a second");
        vmem.close().await.unwrap();
    }
}

/// Prefetches and what runs in the background have a rate of their own.
#[tokio::test(start_paused = true)]
async fn spans_of_prefetches_are_left_out_beyond_the_rate_too() {
    let (seen, _watching) = Seen::watch();
    let vmem = open_with(|b| b.spans_per_second(3));
    let handles = support::put_all(&vmem, 10, LEN, DISK).await;
    // Those of the puts are due by then.
    tokio::time::sleep(Duration::from_secs(100)).await;
    let before = seen.spans("migration").len();
    let prefetches: Vec<_> = handles.iter().map(|handle| vmem.prefetch(handle, HOST)).collect();
    for prefetch in prefetches {
        prefetch.await.unwrap();
    }
    let traced: BTreeSet<_> = seen.spans("prefetch").iter().map(|span| Some(span.id)).collect();
    assert_eq!(traced.len(), 3, "at three a second, at once");
    // What moves for these has a span, and nothing else: none is without its prefetch.
    let moved = seen.spans("migration").split_off(before);
    assert_eq!(moved.len(), 3, "{moved:?}");
    assert_eq!(moved.iter().map(|span| span.parent).collect::<BTreeSet<_>>(), traced);
    assert_eq!(vmem.stats().spans_left_out, 7);
    vmem.read(&handles[0]).await.unwrap();
    assert!(seen.spans("read").is_empty(), "a hit");
    vmem.close().await.unwrap();
}

/// One prefetch of very many objects is no way around the rate, and others wait for it no longer
/// than seconds.
#[tokio::test(start_paused = true)]
async fn parts_of_one_prefetch_have_a_bound_too() {
    let (seen, _watching) = Seen::watch();
    let vmem = open_with(|b| b.spans_per_second(3));
    let handles = support::put_all(&vmem, 16, LEN / 4, DISK).await;
    tokio::time::sleep(Duration::from_secs(100)).await;
    let before = seen.spans("migration").len();
    vmem.prefetch_many(&handles, HOST).await.unwrap();
    let moved = seen.spans("migration").len() - before;
    assert!((3..10).contains(&moved), "{moved} of 16 at three a second");
    tokio::time::sleep(Duration::from_secs(2)).await;
    vmem.demote(&handles[0], DISK).await.unwrap();
    vmem.prefetch(&handles[0], HOST).await.unwrap();
    assert_eq!(seen.spans("prefetch").len(), 2, "the next one has a span again");
    vmem.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn flush_of_all_is_in_the_trace_of_its_request() {
    let (seen, _watching) = Seen::watch();
    let vmem = open(SLOW * 100);
    let handle = vmem.put(bytes(1, 1, 4 * LEN), DISK).await.unwrap();
    vmem.promote(&handle, HOST).await.unwrap();
    let flushed = request();
    async {
        vmem.write(&handle, bytes(1, 2, 4 * LEN)).await.unwrap();
        vmem.flush_all().await.unwrap();
    }
    .instrument(flushed.clone())
    .await;
    let migrations = seen.spans("migration");
    let flushes: Vec<_> =
        migrations.iter().filter(|span| span.fields.text("cause") == "flush").collect();
    assert!(!flushes.is_empty(), "{migrations:?}");
    for migration in flushes {
        assert_eq!(migration.parent, Some(id_of(&flushed)), "{migration:?}");
    }
    vmem.close().await.unwrap();
}
