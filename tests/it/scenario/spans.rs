//! What traces say of reads that are not hits.
//!
//! Invariant: each test has a subscriber of its own thread, on which its store runs too. The spans
//! are those that `docs/seeing.md` names. Not called by other tests.

use std::time::Duration;

use vmem::{ReadOptions, VirtualMemory};
use vmem_testkit::Seen;
use vmem_testkit::sim::{SimConfig, SimDriver, Speed};

use crate::support::{self, DISK, KIB, MIB, bytes};

const LEN: usize = 64 * KIB;
const SLOW: Duration = Duration::from_millis(100);

fn open(threshold: Duration) -> VirtualMemory {
    let speed = Speed { read_latency: SLOW, ..Speed::default() };
    let disk = SimDriver::new(SimConfig { speed, ..SimConfig::default() });
    support::over(disk, 16 * LEN, 64 * MIB as u64, |b| b.slow_read_threshold(threshold))
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
    let sum: u128 = stages.iter().map(|stage| read.fields.number(stage)).sum();
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
