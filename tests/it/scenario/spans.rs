//! What traces say of reads that are not hits.
//!
//! Invariant: each test has a subscriber of its own thread, on which its store runs too. The spans
//! are those that `docs/seeing.md` names. Not called by other tests.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use vmem::{ReadOptions, VirtualMemory};
use vmem_testkit::sim::{SimConfig, SimDriver, Speed};

use crate::support::{self, DISK, KIB, MIB, bytes};

const LEN: usize = 64 * KIB;
const SLOW: Duration = Duration::from_millis(100);

/// The fields of a span or of an event, as text.
#[derive(Clone, Debug, Default)]
struct Fields(BTreeMap<&'static str, String>);

impl Fields {
    fn number(&self, field: &str) -> u128 {
        self.0[field].parse().expect("a number")
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

#[derive(Clone, Debug)]
struct Span {
    id: u64,
    name: &'static str,
    target: String,
    /// The parent that the span names, rather than the span in which it begins.
    parent: Option<u64>,
    follows: Vec<u64>,
    fields: Fields,
}

/// Events by their messages, and their fields.
type Events = Vec<(String, Fields)>;

/// Everything that was seen.
#[derive(Clone, Debug, Default)]
struct Seen(Arc<Mutex<(Vec<Span>, Events)>>);

impl Seen {
    fn spans(&self, name: &str) -> Vec<Span> {
        self.0.lock().0.iter().filter(|span| span.name == name).cloned().collect()
    }

    fn with(&self, id: &Id, change: impl FnOnce(&mut Span)) {
        let mut seen = self.0.lock();
        // Numbers of spans that were closed are used again.
        if let Some(span) = seen.0.iter_mut().rev().find(|span| span.id == id.into_u64()) {
            change(span);
        }
    }
}

impl<S: Subscriber> Layer<S> for Seen {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, _: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let metadata = attributes.metadata();
        self.0.lock().0.push(Span {
            id: id.into_u64(),
            name: metadata.name(),
            target: metadata.target().to_owned(),
            parent: attributes.parent().map(Id::into_u64),
            follows: Vec::new(),
            fields,
        });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        self.with(id, |span| values.record(&mut span.fields));
    }

    fn on_follows_from(&self, id: &Id, follows: &Id, _: Context<'_, S>) {
        self.with(id, |span| span.follows.push(follows.into_u64()));
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let target = event.metadata().target().to_owned();
        self.0.lock().1.push((target, fields));
    }
}

fn open(threshold: Duration) -> VirtualMemory {
    let speed = Speed { read_latency: SLOW, ..Speed::default() };
    let disk = SimDriver::new(SimConfig { speed, ..SimConfig::default() });
    support::over(disk, 16 * LEN, 64 * MIB as u64, |b| b.slow_read_threshold(threshold))
}

#[tokio::test(start_paused = true)]
async fn span_of_a_read_says_what_it_waited_for() {
    let seen = Seen::default();
    let _watching =
        tracing::subscriber::set_default(tracing_subscriber::registry().with(seen.clone()));
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
        assert_eq!(read.fields.0[field], expected, "{read:?}");
    }
    assert_eq!(read.fields.number("io_us"), SLOW.as_micros());
    let stages = ["space_us", "turn_us", "io_us", "copy_us", "gate_us", "runtime_us"];
    let sum: u128 = stages.iter().map(|stage| read.fields.number(stage)).sum();
    let total = read.fields.number("total_us");
    // Each is rounded down to a microsecond.
    assert!(sum <= total && sum + 6 > total, "{sum} of {total}");

    let migrations = seen.spans("migration");
    let by_read = migrations.iter().find(|span| span.fields.0["cause"] == "read");
    let by_read = by_read.expect("the read loads the object");
    assert_eq!(by_read.follows, [read.id], "the migration follows from its read");
    assert_eq!(by_read.parent, Some(read.id), "and is in its trace");

    let events = seen.0.lock().1.clone();
    let told: Vec<_> = events.iter().filter(|(target, _)| target == "vmem::read").collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].1.0["message"].contains("io 100.0ms"), "{told:?}");
    vmem.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn read_below_the_threshold_causes_no_event() {
    let seen = Seen::default();
    let _watching =
        tracing::subscriber::set_default(tracing_subscriber::registry().with(seen.clone()));
    let vmem = open(2 * SLOW);
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    vmem.read(&handle).await.unwrap();
    assert_eq!(seen.spans("read").len(), 1);
    assert!(seen.0.lock().1.iter().all(|(target, _)| target != "vmem::read"));
    vmem.close().await.unwrap();
}
