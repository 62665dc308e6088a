//! A store that is watched in every way: by its figures, a subscriber, a recorder and a page.
//!
//! Invariant: a test has a subscriber and a recorder of its own thread, on which its store and its
//! page run too. The page is asked in HTTP over pipes in memory: a paused clock stands still while
//! it answers. Called by the tests of causes.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use axum::serve::Listener;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use vmem::backend::Backends;
use vmem::{
    Capabilities, Promotion, ReadStage, SlowRead, VMemHandle, VirtualMemory, VirtualMemoryConfig,
};
use vmem_io::DiskTier;
use vmem_testkit::sim::{SimConfig, SimDriver, Speed};
use vmem_testkit::{Pattern, Seen};

pub(crate) const KIB: usize = 1024;
pub(crate) const MIB: usize = 1024 * KIB;
pub(crate) const SLOW: Duration = Duration::from_millis(100);
const STAGING: usize = 128 * KIB;

/// See the module's documentation.
pub(crate) struct Watched {
    pub(crate) vmem: VirtualMemory,
    seen: Seen,
    metrics: PrometheusHandle,
    page: Page,
    /// Until they are dropped, the thread is watched.
    _guards: (tracing::subscriber::DefaultGuard, metrics::LocalRecorderGuard<'static>),
}

impl Watched {
    /// A store with this many bytes of object space over a disk that takes so long for each read.
    /// It promotes only when asked to.
    pub(crate) fn open(space: usize, read_latency: Duration) -> Watched {
        let (seen, subscribed) = Seen::watch();
        // A recorder lives as long as its thread may record.
        let recorder = Box::leak(Box::new(PrometheusBuilder::new().build_recorder()));
        let metrics = recorder.handle();
        let recording = metrics::set_default_local_recorder(recorder);
        vmem::metrics::describe();
        let vmem = store(space, read_latency);
        let page = Page::of(&vmem);
        Watched { vmem, seen, metrics, page, _guards: (subscribed, recording) }
    }

    /// The slowest read was of this object, and everything names this as its cause.
    pub(crate) async fn slowest(&self, handle: &VMemHandle, cause: ReadStage) -> SlowRead {
        let reads = self.vmem.stats().slow_reads();
        let slowest = reads.first().expect("a read was slow").clone();
        assert_eq!((slowest.handle, slowest.cause()), (handle.id(), cause), "{slowest}");
        self.assert_traced(&slowest, cause);
        self.assert_recorded(cause);
        self.assert_shown(&slowest, cause).await;
        slowest
    }

    /// Both the span of this read and the event of a slow one name the cause.
    fn assert_traced(&self, read: &SlowRead, cause: ReadStage) {
        let total = read.times.total().as_micros();
        let spans = self.seen.spans("read");
        let of_read = spans.iter().find(|span| {
            let fields = &span.fields;
            fields.number("handle") == u128::from(read.handle) && fields.number("total_us") == total
        });
        let span = of_read.unwrap_or_else(|| panic!("no span of {read}: {spans:?}"));
        assert_eq!((span.target, span.level), ("vmem::read", tracing::Level::DEBUG));
        assert_eq!(span.fields.text("cause"), cause.as_str(), "{span:?}");
        for stage in ReadStage::ALL {
            let field = format!("{stage}_us");
            // Nothing is said of a stage in which it was not.
            let is_said = !span.fields.text(&field).is_empty();
            let spent = if is_said { span.fields.number(&field) } else { 0 };
            assert_eq!(spent, read.times.of(stage).as_micros(), "{stage} of {span:?}");
        }
        let events = self.seen.events("vmem::read");
        let text = format!("slow: {read}");
        let of_read = events.iter().find(|event| event.fields.text("message") == text);
        let event = of_read.unwrap_or_else(|| panic!("no event of {read}: {events:?}"));
        assert_eq!(event.level, tracing::Level::WARN);
        assert_eq!(event.fields.text("cause"), cause.as_str(), "{event:?}");
        assert_eq!(event.fields.number("handle"), u128::from(read.handle));
    }

    /// Seconds that reads have waited, by cause, as a scrape has them.
    fn waited(&self) -> BTreeMap<String, f64> {
        self.vmem.publish_metrics();
        let text = self.metrics.render();
        let sums = text.lines().filter_map(|line| line.strip_prefix("vmem_waits_seconds_sum{"));
        sums.map(|rest| {
            let (labels, sum) = rest.rsplit_once("} ").expect("labels and a value");
            let cause = labels.strip_prefix("cause=\"").and_then(|rest| rest.strip_suffix('"'));
            (cause.expect("one label").to_owned(), sum.parse().expect("a number"))
        })
        .collect()
    }

    /// Most of the time that reads have waited is of this cause.
    fn assert_recorded(&self, cause: ReadStage) {
        let waited = self.waited();
        let most = waited.iter().max_by(|a, b| a.1.total_cmp(b.1)).expect("reads have waited");
        assert_eq!(most.0, cause.as_str(), "{waited:?}");
    }

    /// The page shows this read first, by either of its routes.
    async fn assert_shown(&self, read: &SlowRead, cause: ReadStage) {
        let mut shown = vec![self.page.snapshot().await];
        shown.extend(self.page.stream(2).await);
        for snapshot in shown {
            let first = &snapshot["slowest"][0];
            assert_eq!(first["handle"], read.handle, "{first}");
            assert_eq!(first["cause"], cause.as_str(), "{first}");
            assert_eq!(first["tier"], read.tier.to_string(), "{first}");
            for stage in ReadStage::ALL {
                let spent = read.times.of(stage).as_micros() as u64;
                assert_eq!(first["stages"][stage.as_str()], spent, "{stage} of {first}");
            }
        }
    }

    /// How many reads the page shows in this stage, at this moment.
    pub(crate) async fn now_in(&self, stage: ReadStage) -> u64 {
        self.page.now_in(stage).await
    }

    /// What the page shows.
    pub(crate) async fn shown(&self) -> Value {
        self.page.snapshot().await
    }

    /// No read is under way, and the page says so.
    pub(crate) async fn assert_idle(&self) {
        let stats = self.vmem.stats();
        for stage in ReadStage::ALL {
            assert_eq!(stats.reads_in(stage), 0, "reads that have ended count no more");
            assert_eq!(self.now_in(stage).await, 0, "{stage}");
        }
    }
}

/// A page over a store, served by the runtime that it was made in.
pub(crate) struct Page(mpsc::UnboundedSender<DuplexStream>);

impl Page {
    pub(crate) fn of(vmem: &VirtualMemory) -> Page {
        let (page, pipes) = mpsc::unbounded_channel();
        let router = vmem_dashboard::router(vmem.clone());
        tokio::spawn(async move { axum::serve(Pipes(pipes), router).await });
        Page(page)
    }

    /// How many reads the page shows in this stage, at this moment.
    pub(crate) async fn now_in(&self, stage: ReadStage) -> u64 {
        let snapshot = self.snapshot().await;
        snapshot["reads"]["now"][stage.as_str()].as_u64().expect("a number of reads")
    }

    /// What `/snapshot` answers.
    async fn snapshot(&self) -> Value {
        let mut pipe = self.ask("/snapshot").await;
        let mut answer = String::new();
        pipe.read_to_string(&mut answer).await.expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        serde_json::from_str(body).expect("JSON")
    }

    /// The first events of `/stream`: one for the page that comes, others from the feed.
    async fn stream(&self, count: usize) -> Vec<Value> {
        let mut pipe = self.ask("/stream").await;
        let mut answer = String::new();
        let mut buf = vec![0; 64 * KIB];
        while answer.matches("\n\n").count() < count {
            let read = pipe.read(&mut buf).await.expect("the stream goes on");
            assert!(read > 0, "the stream goes on");
            answer += std::str::from_utf8(&buf[..read]).expect("text");
        }
        let events = answer.lines().filter_map(|line| line.strip_prefix("data: "));
        events.map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }

    async fn ask(&self, path: &str) -> DuplexStream {
        let (mut here, there) = tokio::io::duplex(64 * KIB);
        self.0.send(there).expect("the page is served");
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        here.write_all(request.as_bytes()).await.expect("the page reads");
        here
    }
}

fn store(space: usize, read_latency: Duration) -> VirtualMemory {
    let speed = Speed { read_latency, queue_depth: 1024, ..Speed::default() };
    let disk = SimDriver::new(SimConfig { speed, ..SimConfig::default() });
    let config = VirtualMemoryConfig::builder()
        .host_capacity((space + STAGING) as u64)
        .staging_capacity(STAGING as u64)
        .promotion(Promotion::Never)
        .wait_timeout(20 * SLOW)
        // Each read is slow enough for an event.
        .slow_read_threshold(Duration::from_nanos(1))
        .spans_per_second(u32::MAX);
    let backends = Backends {
        remote: None,
        host_capacity_bytes: (space + STAGING) as u64,
        disk: DiskTier::new(disk, 64 * MIB as u64),
        catalog: None,
        devices: Vec::new(),
        capabilities: Capabilities::new("of the test".into(), "not in this test".into()),
    };
    let config = config.build().expect("a valid configuration");
    VirtualMemory::with_backends(&config, backends).expect("opens")
}

/// The bytes of an object.
pub(crate) fn bytes(object: u64, len: usize) -> Vec<u8> {
    Pattern::new(object, 1).bytes(0, len).into()
}

/// Connections that are made in this process.
struct Pipes(mpsc::UnboundedReceiver<DuplexStream>);

impl Listener for Pipes {
    type Io = DuplexStream;
    type Addr = ();

    async fn accept(&mut self) -> (DuplexStream, ()) {
        match self.0.recv().await {
            Some(pipe) => (pipe, ()),
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}
