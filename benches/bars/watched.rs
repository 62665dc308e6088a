//! V1: what it costs to be seen: everything on beside everything off.
//!
//! On is: a subscriber that formats each span and event of vmem from debug on, when they end, into
//! a sink; a recorder for Prometheus, published to and rendered once a second; and the page, with
//! one client that reads its stream over the loopback interface. Off is: none of these. The loads
//! are P1's at 4 KiB, on one thread, and P4's. A store makes as many spans as `spans_per_second`
//! says; a row without a bar says what it costs where each read that is no hit has one.
//!
//! Both sides are one process and one store, whose memory and files are the same; a process of its
//! own for each side has other pages, which at these ratios is more noise than what is looked for.
//! What is global cannot be taken away again: the filter of the subscriber is reloaded, and the
//! recorder gives handles that do nothing. So "off" has both installed and idle. Rounds alternate,
//! and the side that begins does too; each has choices of its own, by the same law. The CPU is that
//! of the whole process, the page's too.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{Registry, reload};
use vmem::VirtualMemory;

use crate::hot::{Ours, Set};
use crate::mixed::{Cost, Mixed};
use crate::report::{Bar, Report, Rounds, process_cpu_ns};

/// The most that being seen may cost.
const BAR: f64 = 1.05;

/// A round, and what is not measured before it.
const LONG: Duration = Duration::from_secs(1);
const SETTLE: Duration = Duration::from_millis(200);

/// What is on in a round.
#[derive(Clone, Copy, Debug)]
struct Parts {
    name: &'static str,
    traces: Option<LevelFilter>,
    metrics: bool,
    page: bool,
}

const DEBUG: Option<LevelFilter> = Some(LevelFilter::DEBUG);
const OFF: Parts = Parts { name: "nothing", traces: None, metrics: false, page: false };
const ALL: Parts = Parts { name: "all", traces: DEBUG, metrics: true, page: true };
/// Each of them alone, for the load that says which of them costs what.
const APART: [Parts; 4] = [
    Parts { name: "traces", traces: DEBUG, ..OFF },
    Parts { name: "a log at info", traces: Some(LevelFilter::INFO), ..OFF },
    Parts { name: "metrics", metrics: true, ..OFF },
    Parts { name: "the page", page: true, ..OFF },
];

/// Everything that watches stores.
struct Watch {
    filter: reload::Handle<Targets, Registry>,
    recording: Arc<AtomicBool>,
    metrics: PrometheusHandle,
}

impl Watch {
    /// For the whole process, and for good; off.
    fn install() -> anyhow::Result<Self> {
        let (targets, filter) = reload::Layer::new(Targets::new());
        let lines = tracing_subscriber::fmt::layer()
            .with_span_events(FmtSpan::CLOSE)
            .with_ansi(false)
            .with_writer(io::sink)
            .with_filter(targets);
        tracing_subscriber::registry().with(lines).try_init()?;
        let recorder = PrometheusBuilder::new()
            .set_buckets(&[1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])?
            .build_recorder();
        let metrics = recorder.handle();
        let recording = Arc::new(AtomicBool::new(false));
        let switched = Switched { recorder, on: recording.clone() };
        metrics::set_global_recorder(switched).map_err(|error| anyhow::anyhow!("{error}"))?;
        vmem::metrics::describe();
        Ok(Watch { filter, recording, metrics })
    }

    /// Until the tasks are dropped and `off` is called.
    async fn on(
        &self,
        parts: Parts,
        vmem: &VirtualMemory,
    ) -> anyhow::Result<JoinSet<anyhow::Result<()>>> {
        let mut tasks = JoinSet::new();
        if let Some(level) = parts.traces {
            self.filter.reload(Targets::new().with_target("vmem", level))?;
        }
        if parts.metrics {
            self.recording.store(true, Ordering::SeqCst);
            tasks.spawn(scrape(vmem.clone(), self.metrics.clone()));
        }
        if parts.page {
            let page = vmem_dashboard::serve(vmem.clone(), ([127, 0, 0, 1], 0)).await?;
            let address = page.address();
            tasks.spawn(async move { Ok(page.run().await?) });
            let mut stream = TcpStream::connect(address).await?;
            let request = format!("GET /stream HTTP/1.1\r\nhost: {address}\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut buf = vec![0; 64 << 10];
            let read = stream.read(&mut buf).await?;
            anyhow::ensure!(buf[..read].starts_with(b"HTTP/1.1 200 "), "the page answers");
            tasks.spawn(async move {
                while stream.read(&mut buf).await? > 0 {}
                Ok(())
            });
        }
        Ok(tasks)
    }

    fn off(&self) -> anyhow::Result<()> {
        self.recording.store(false, Ordering::SeqCst);
        Ok(self.filter.reload(Targets::new())?)
    }
}

/// Publishes and renders the metrics of the store once a second.
async fn scrape(vmem: VirtualMemory, metrics: PrometheusHandle) -> anyhow::Result<()> {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        ticks.tick().await;
        vmem.publish_metrics();
        std::hint::black_box(metrics.render());
    }
}

/// A recorder that can be switched off.
struct Switched {
    recorder: PrometheusRecorder,
    on: Arc<AtomicBool>,
}

impl Switched {
    fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }
}

impl Recorder for Switched {
    fn describe_counter(&self, key: KeyName, unit: Option<Unit>, text: SharedString) {
        self.recorder.describe_counter(key, unit, text);
    }

    fn describe_gauge(&self, key: KeyName, unit: Option<Unit>, text: SharedString) {
        self.recorder.describe_gauge(key, unit, text);
    }

    fn describe_histogram(&self, key: KeyName, unit: Option<Unit>, text: SharedString) {
        self.recorder.describe_histogram(key, unit, text);
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        if self.is_on() { self.recorder.register_counter(key, metadata) } else { Counter::noop() }
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        if self.is_on() { self.recorder.register_gauge(key, metadata) } else { Gauge::noop() }
    }

    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        if self.is_on() {
            self.recorder.register_histogram(key, metadata)
        } else {
            Histogram::noop()
        }
    }
}

pub(crate) fn v1(report: &mut Report, quick: bool, rounds: usize) -> anyhow::Result<()> {
    let watch = Watch::install()?;
    // The machine drifts by more than what is looked for: many short rounds.
    let rounds = 4 * rounds;
    let set = Set { len: 4096, count: 65_536, reads: 200_000 };
    let ours = Ours::with(&set)?;
    let here = Builder::new_current_thread().enable_all().build()?;
    let hits = |long: Duration, seed: u64| {
        let order = set.order(seed);
        let began = Instant::now();
        let cpu = process_cpu_ns();
        let mut reads = 0;
        while began.elapsed() < long {
            here.block_on(ours.round(&order));
            reads += order.len();
        }
        let reads = reads as f64;
        Ok((began.elapsed().as_nanos() as f64 / reads, (process_cpu_ns() - cpu) / reads))
    };
    let store = (&ours.vmem, ours.runtime.handle());
    let bar = Some(BAR);
    alternate(report, &watch, (ALL, bar), format!("hits of {}", set.what()), rounds, store, hits)?;
    drop(ours);
    let mut under_load = |mixed: Mixed, parts: &[Parts], bar| {
        let round = |long, seed| mixed.round(long, seed);
        let store = (&mixed.vmem, mixed.runtime.handle());
        for &parts in parts {
            let what = format!("mixed, {}", mixed.what());
            alternate(report, &watch, (parts, bar), what, rounds, store, round)?;
        }
        mixed.close()
    };
    for len in [4096, 65_536, 1 << 20] {
        let apart: &[Parts] = if len == 4096 { &APART } else { &[] };
        let parts: Vec<_> = [ALL].iter().chain(apart).copied().collect();
        under_load(Mixed::with(len, quick, |config| config)?, &parts, bar)?;
    }
    let each = Mixed::with(4096, quick, |config| config.spans_per_second(u32::MAX))?;
    under_load(each, &[Parts { name: "a span of each read", ..APART[0] }], None)
}

/// Rounds with these parts on and with everything off, in turns.
fn alternate(
    report: &mut Report,
    watch: &Watch,
    (parts, bar): (Parts, Option<f64>),
    what: String,
    rounds: usize,
    (vmem, runtime): (&VirtualMemory, &tokio::runtime::Handle),
    round_of: impl Fn(Duration, u64) -> anyhow::Result<Cost>,
) -> anyhow::Result<()> {
    let mut sides: [[Rounds; 2]; 2] = Default::default();
    for round in 0..=rounds {
        for (nth, side) in [round % 2, 1 - round % 2].into_iter().enumerate() {
            let is_on = side == 0;
            let tasks = if is_on { Some(runtime.block_on(watch.on(parts, vmem))?) } else { None };
            // Each its own choices: what the side before has read is nearer.
            let seed = (2 * round + nth) as u64;
            // The spans that were kept while nobody watched are soon used up.
            round_of(SETTLE, seed)?;
            let cost = round_of(LONG, seed + (1 << 32))?;
            if let Some(mut tasks) = tasks {
                runtime.block_on(tasks.shutdown());
                watch.off()?;
            }
            // The first round warms up.
            if round > 0 {
                sides[side][0].0.push(cost.0);
                sides[side][1].0.push(cost.1);
            }
        }
    }
    let [on, off] = &sides;
    for (nth, unit) in ["ns", "ns CPU"].into_iter().enumerate() {
        let what = format!("{}: {what}", parts.name);
        let ours = &on[nth];
        let theirs = &off[nth];
        report.add(&Bar { id: "V1", what, unit, ours, peer: "off", theirs, bar });
    }
    Ok(())
}
