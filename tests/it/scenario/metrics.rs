//! The metrics of the feature `metrics`, as a recorder gets them.
//!
//! Invariant: each test has a recorder of its own thread, on which its store runs too. What is
//! recorded is compared with the table of all metrics, both ways. Not called by other tests.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use metrics_util::MetricKind;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use vmem::metrics::{ALL, Kind};
use vmem::{ReadOptions, VirtualMemory};
use vmem_testkit::sim::{SimConfig, SimDriver, Speed};

use crate::support::{self, DISK, HOST, KIB, MIB, bytes, put_all};

const LEN: usize = 64 * KIB;
const SLOW: Duration = Duration::from_millis(100);

/// What was recorded under this name and these labels; a histogram counts its values.
#[derive(Debug, Default)]
struct Recorded(BTreeMap<(String, BTreeMap<String, String>), (MetricKind, f64)>);

impl Recorded {
    fn of(snapshotter: &Snapshotter) -> Self {
        let mut recorded = Recorded::default();
        for (key, _, _, value) in snapshotter.snapshot().into_vec() {
            let (kind, key) = key.into_parts();
            let labels = key.labels();
            let labels = labels.map(|label| (label.key().to_owned(), label.value().to_owned()));
            let value = match value {
                DebugValue::Counter(count) => count as f64,
                DebugValue::Gauge(value) => value.into_inner(),
                DebugValue::Histogram(values) => {
                    values.iter().map(|value| value.into_inner()).sum()
                }
            };
            recorded.0.insert((key.name().to_owned(), labels.collect()), (kind, value));
        }
        recorded
    }

    fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let pair = |&(key, value): &(&str, &str)| (key.to_owned(), value.to_owned());
        let key = (name.to_owned(), labels.iter().map(pair).collect());
        self.0.get(&key).map(|&(_, value)| value)
    }
}

fn open() -> VirtualMemory {
    let speed = Speed { read_latency: SLOW, ..Speed::default() };
    let disk = SimDriver::new(SimConfig { speed, ..SimConfig::default() });
    support::over(disk, 4 * LEN, 64 * MIB as u64, |builder| builder)
}

#[tokio::test(start_paused = true)]
async fn figures_and_causes_reach_the_recorder() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _recording = metrics::set_default_local_recorder(&recorder);
    let vmem = open();
    let handles = put_all(&vmem, 3, LEN, DISK).await;
    let hot = vmem.put(bytes(9, 1, LEN), HOST).await.unwrap();
    for _ in 0..5 {
        vmem.read(&hot).await.unwrap();
    }
    vmem.read_with(&handles[0], ReadOptions::new().promote(true)).await.unwrap();
    vmem.read_at(&handles[1], 0..100).await.unwrap();
    vmem.demote(&hot, DISK).await.unwrap();
    vmem.publish_metrics();
    // Once more: a counter is set and not added to.
    vmem.publish_metrics();

    let recorded = Recorded::of(&snapshotter);
    let is = |name, labels: &[(&str, &str)], expected: f64| {
        assert_eq!(recorded.value(name, labels), Some(expected), "{name} {labels:?}");
    };
    let stats = vmem.stats();
    let host = [("tier", "host"), ("outcome", "served")];
    is("vmem_reads_total", &host, 5.0);
    is("vmem_reads_total", &[("tier", "disk"), ("outcome", "served")], 2.0);
    is("vmem_reads_total", &[("tier", "none"), ("outcome", "failed")], 0.0);
    is("vmem_tier_used_bytes", &[("tier", "disk")], stats.disk.used_bytes as f64);
    is("vmem_tier_capacity_bytes", &[("tier", "host")], stats.host.capacity_bytes as f64);
    is("vmem_misses_total", &[], 2.0);
    is("vmem_reads_in_stage", &[("stage", "io")], 0.0);
    let read = [("from", "disk"), ("to", "host"), ("cause", "read")];
    is("vmem_moved_bytes_total", &read, LEN as f64);
    is("vmem_migrations_total", &read, 1.0);
    is("vmem_migrations_total", &[("from", "host"), ("to", "disk"), ("cause", "demote")], 1.0);
    // Times are exact to 1/64.
    let waited = recorded.value("vmem_waits_seconds", &[("cause", "io")]).unwrap();
    let exact = 2.0 * SLOW.as_secs_f64();
    assert!((waited - exact).abs() <= exact / 64.0, "{waited} for {exact}: each is published once");
    let link = [("from", "disk"), ("to", "host")];
    is("vmem_link_bytes_total", &link, stats.disk_to_host_bytes as f64);
    let whole = recorded.value("vmem_read_seconds", &[("op", "whole"), ("tier", "disk")]);
    assert!(whole.unwrap() >= SLOW.as_secs_f64() * (1.0 - 1.0 / 64.0));
    vmem.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn table_has_each_metric_with_its_kind_and_labels() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _recording = metrics::set_default_local_recorder(&recorder);
    vmem::metrics::describe();
    let vmem = open();
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    vmem.read_with(&handle, ReadOptions::new().promote(true)).await.unwrap();
    vmem.free(handle).await.unwrap();
    // One that fails: the bytes are damaged below.
    let damaged = damaged_store();
    let handle = damaged.0.put(bytes(2, 1, LEN), DISK).await.unwrap();
    damaged.1.damage(|image| image.flip_bit(100, 1));
    damaged.0.read_with(&handle, ReadOptions::new().promote(true)).await.unwrap_err();
    vmem.publish_metrics();

    let recorded = Recorded::of(&snapshotter);
    for ((name, labels), (kind, _)) in &recorded.0 {
        let metric = ALL.iter().find(|metric| metric.name == name);
        let metric = metric.unwrap_or_else(|| panic!("{name} is not in the table"));
        let expected = match metric.kind {
            Kind::Counter => MetricKind::Counter,
            Kind::Gauge => MetricKind::Gauge,
            _ => MetricKind::Histogram,
        };
        assert_eq!(*kind, expected, "{name}");
        let labels: BTreeSet<_> = labels.keys().map(String::as_str).collect();
        assert_eq!(labels, metric.labels.iter().copied().collect(), "{name}");
    }
    for metric in ALL {
        let is_recorded = recorded.0.keys().any(|(name, _)| name == metric.name);
        assert!(is_recorded, "{} is never recorded", metric.name);
        let is_total = metric.name.ends_with("_total");
        assert_eq!(is_total, metric.kind == Kind::Counter, "{}: by convention", metric.name);
    }
    vmem.close().await.unwrap();
}

fn damaged_store() -> (VirtualMemory, std::sync::Arc<SimDriver>) {
    let disk = SimDriver::new(SimConfig::default());
    (support::over(disk.clone(), 4 * LEN, 64 * MIB as u64, |builder| builder), disk)
}

/// The names of metrics in an expression.
fn named(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
    words.filter(|word| word.starts_with("vmem_"))
}

/// The labels that an expression asks for: those of its matchers and those it sums by.
fn asked(expression: &str) -> BTreeSet<&str> {
    let inside = |from: &'static str, to: char| {
        let parts = expression.split(from).skip(1);
        parts.filter_map(move |part| part.split(to).next()).flat_map(|part| part.split(','))
    };
    let matchers = inside("{", '}').filter_map(|part| part.split(['=', '!']).next());
    matchers.chain(inside("by (", ')')).map(str::trim).collect()
}

/// The metric that a series is of.
fn series_of(word: &str) -> Option<&'static vmem::metrics::Metric> {
    ALL.iter().find(|metric| match metric.kind {
        Kind::Histogram => ["_bucket", "_sum", "_count"]
            .iter()
            .any(|suffix| word.strip_suffix(suffix) == Some(metric.name)),
        _ => metric.name == word,
    })
}

#[test]
fn grafana_shows_metrics_that_exist() {
    let text = include_str!("../../../docs/grafana/vmem.json");
    let dashboard: serde_json::Value = serde_json::from_str(text).expect("valid JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut ids = BTreeSet::new();
    let mut shown = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().expect("a title");
        assert!(ids.insert(panel["id"].as_u64().expect("a number")), "{title}: its number");
        let place = &panel["gridPos"];
        let end = place["x"].as_u64().unwrap() + place["w"].as_u64().unwrap();
        assert!(end <= 24, "{title} is beyond the grid");
        let targets = panel["targets"].as_array().expect("targets");
        assert!(!targets.is_empty(), "{title} shows nothing");
        for target in targets {
            let expression = target["expr"].as_str().expect("an expression");
            let opened = expression.matches(['(', '{', '[']).count();
            assert_eq!(opened, expression.matches([')', '}', ']']).count(), "{expression}");
            let names: Vec<_> = named(expression).collect();
            assert!(!names.is_empty(), "{title}: {expression}");
            for name in names {
                let metric = series_of(name).unwrap_or_else(|| panic!("{title}: no {name}"));
                shown.insert(metric.name);
                for label in asked(expression) {
                    // Those of Prometheus itself, and of its histograms.
                    let is_known = metric.labels.contains(&label)
                        || label == "instance"
                        || label == "le" && metric.kind == Kind::Histogram;
                    // In an expression of two metrics a label may be of the other one.
                    let may_be_of_another = named(expression).count() > 1;
                    assert!(is_known || may_be_of_another, "{title}: {name} has no {label}");
                }
                // Labels in the legend are labels of the metric.
                let legend = target["legendFormat"].as_str().expect("a legend");
                for label in legend.split("{{").skip(1).filter_map(|rest| rest.split("}}").next()) {
                    assert!(metric.labels.contains(&label), "{title}: {name} has no {label}");
                }
            }
        }
    }
    let histograms = ALL.iter().filter(|metric| metric.kind == Kind::Histogram);
    for metric in histograms {
        assert!(shown.contains(metric.name), "{} is on no panel", metric.name);
    }
    assert!(series_of("vmem_waits_seconds").is_none() && series_of("vmem_gone").is_none());
    let labels = asked(r#"sum by (le, tier) (rate(vmem_x{outcome="served",instance=~"a"}[1m]))"#);
    assert_eq!(labels, ["instance", "le", "outcome", "tier"].into());
}
