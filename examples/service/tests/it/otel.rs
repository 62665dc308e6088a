//! The spans that a collector gets, and a collector that is not there.
//!
//! The program is the real one, so that its layers and filters are. A collector has all spans once
//! the program has ended. No test asserts how long anything takes.

use std::fs::File;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Method, StatusCode};
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use parking_lot::Mutex;
use prost::Message;
use rustix::process::Signal;
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use vmem_service::load::{Answer, Http};

use crate::limits::BOUND;
use crate::support::Program;

/// The span of each caller.
const CALLER: &str = "00f067aa0ba902b7";
const LEN: usize = 100_000;

/// Everything that was sent to a collector, as it was sent.
#[derive(Clone, Default)]
struct Collector {
    address: String,
    requests: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    /// How often it is to refuse what is sent, from now on.
    refusals: Arc<AtomicU32>,
}

impl Collector {
    async fn start() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let collector = Collector { address, ..Collector::default() };
        let routes = axum::Router::new().route("/v1/traces", post(collect));
        let routes = routes.with_state(collector.clone());
        tokio::spawn(async move { axum::serve(listener, routes).await });
        collector
    }

    /// The spans of a trace, by their name.
    fn spans(&self, trace: &str, name: &str) -> Vec<Span> {
        let requests = self.requests.lock();
        let resources = requests.iter().flat_map(|request| &request.resource_spans);
        let scopes = resources.flat_map(|resource| &resource.scope_spans);
        let spans = scopes.flat_map(|scope| &scope.spans);
        let found = spans.filter(|span| hex(&span.trace_id) == trace && span.name == name);
        found.cloned().collect()
    }
}

async fn collect(State(collector): State<Collector>, body: Bytes) -> StatusCode {
    let left = |refusals: u32| refusals.checked_sub(1);
    if collector.refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).is_ok() {
        return StatusCode::INTERNAL_SERVER_ERROR;
    }
    collector.requests.lock().push(ExportTraceServiceRequest::decode(body).unwrap());
    StatusCode::OK
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The value of an attribute, as text.
fn attribute(attributes: &[KeyValue], key: &str) -> String {
    let found = attributes.iter().find(|attribute| attribute.key == key);
    match found.and_then(|found| found.value.clone()).and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => panic!("{key} is {other:?} in {attributes:?}"),
    }
}

/// The program, with a log and with spans for this collector.
fn start(directory: &Path, collector: &str, variables: &[(&str, &str)]) -> Program {
    Program::with(directory, |command| {
        let log = File::options().append(true).create(true).open(directory.join("log"));
        command
            .env("VMEM_SERVICE_OTLP__ENDPOINT", collector)
            .env("RUST_LOG", "info")
            .envs(variables.iter().copied())
            .stderr(log.unwrap());
    })
}

/// The lines of the log with this text.
fn logged(directory: &Path, text: &str) -> Vec<String> {
    let log = std::fs::read_to_string(directory.join("log")).unwrap();
    log.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
}

/// A request in a trace of its own, with secrets in a query and in headers.
async fn ask(program: &Program, method: Method, trace: &str, body: Option<Vec<u8>>) -> Answer {
    let parent = format!("00-{trace}-{CALLER}-01");
    let len = body.as_ref().map_or(0, Vec::len).to_string();
    let headers = [
        ("traceparent", &*parent),
        ("authorization", "Bearer hidden"),
        ("cookie", "session=hidden"),
        ("baggage", "user=hidden"),
        ("tracestate", "vendor=hidden"),
        ("content-length", &len),
    ];
    let body = body.map_or_else(Body::empty, Body::from);
    let http = Http::new(&program.base);
    let answer = http.send(method, "/objects/a/b?token=hidden", &headers, body);
    timeout(BOUND, answer).await.expect("no request waits for the collector").unwrap()
}

/// Ends the program as an operator does; one that does not end fails.
async fn ended(program: &mut Program) -> ExitStatus {
    program.signal(Signal::TERM);
    let ending = async {
        loop {
            if let Some(status) = program.child.try_wait().unwrap() {
                return status;
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(BOUND, ending).await.expect("the program ends")
}

#[tokio::test]
async fn request_and_its_reads_are_in_the_trace_of_the_caller() {
    let collector = Collector::start().await;
    let directory = tempfile::tempdir().unwrap();
    let [put, cold, promoting, hit] = ["a", "b", "c", "d"].map(|digit| digit.repeat(32));

    let mut program = start(directory.path(), &collector.address, &[]);
    let answer = ask(&program, Method::PUT, &put, Some(vec![7; LEN])).await;
    assert_eq!(answer.status, 201);
    assert!(ended(&mut program).await.success());
    // The next process has nothing in memory, and promotes at the second read.
    let mut program = start(directory.path(), &collector.address, &[]);
    for trace in [&cold, &promoting, &hit] {
        let answer = ask(&program, Method::GET, trace, None).await;
        assert!(answer.status == 200 && answer.body == vec![7; LEN], "{answer:?}");
    }
    assert!(ended(&mut program).await.success());

    let statuses = [(&put, "201"), (&cold, "200"), (&promoting, "200"), (&hit, "200")];
    for (trace, status) in statuses {
        let requests = collector.spans(trace, "request");
        assert_eq!(requests.len(), 1, "{requests:?}");
        assert_eq!(hex(&requests[0].parent_span_id), CALLER);
        assert_eq!(requests[0].kind, SpanKind::Server as i32);
        assert_eq!(attribute(&requests[0].attributes, "path"), "/objects/a/b");
        assert_eq!(attribute(&requests[0].attributes, "status"), status);
    }
    for trace in [&cold, &promoting] {
        let reads = collector.spans(trace, "read");
        assert_eq!(reads.len(), 1, "{reads:?}");
        assert_eq!(reads[0].parent_span_id, collector.spans(trace, "request")[0].span_id);
        let of_read = |key| attribute(&reads[0].attributes, key);
        assert_eq!([of_read("tier"), of_read("outcome")], ["disk", "served"]);
        let stages = ["space", "turn", "io", "copy", "gate", "runtime"];
        assert!(stages.contains(&&*of_read("cause")), "{reads:?}");
        let times = ["total_us", "io_us", "runtime_us"];
        assert!(times.iter().all(|time| of_read(time).parse::<u64>().is_ok()), "{reads:?}");
    }
    assert_eq!(collector.spans(&hit, "read"), [], "a hit has no span");

    let read = &collector.spans(&promoting, "read")[0];
    let migrations = collector.spans(&promoting, "migration");
    assert_eq!(migrations.len(), 1, "{migrations:?}");
    let links: Vec<_> = migrations[0].links.iter().map(|link| &link.span_id).collect();
    assert_eq!((links, &migrations[0].parent_span_id), (vec![&read.span_id], &read.span_id));
    let fields =
        ["from", "to", "cause", "bytes"].map(|key| attribute(&migrations[0].attributes, key));
    assert_eq!(fields, ["disk", "host", "read", "100000"]);

    let sent = collector.requests.lock();
    let resource = sent[0].resource_spans[0].resource.as_ref().unwrap();
    assert_eq!(attribute(&resource.attributes, "service.name"), "vmem-service");
    assert!(!format!("{sent:?}").contains("hidden"), "{sent:?}");
    assert_eq!(logged(directory.path(), "vmem::read"), [""; 0], "the log has its own filter");
}

#[tokio::test]
async fn probes_and_scrapes_are_not_sent() {
    let collector = Collector::start().await;
    let directory = tempfile::tempdir().unwrap();
    let mut program = start(directory.path(), &collector.address, &[("RUST_LOG", "trace")]);
    let http = Http::new(&program.base);
    for path in ["/healthz", "/readyz", "/metrics", "/dashboard/", "/dashboard/snapshot"] {
        for parent in [String::new(), format!("00-{}-{CALLER}-01", "b".repeat(32))] {
            let headers = [("traceparent", &*parent)];
            let answer = http.send(Method::GET, path, &headers, Body::empty()).await.unwrap();
            assert_eq!(answer.status, 200, "{path}");
        }
    }
    // What has a trace of its own, and is sent after them.
    ask(&program, Method::GET, &"a".repeat(32), None).await;
    assert!(ended(&mut program).await.success());
    assert_eq!(collector.spans(&"a".repeat(32), "request").len(), 1);
    let requests = collector.requests.lock();
    let resources = requests.iter().flat_map(|request| &request.resource_spans);
    let scopes = resources.flat_map(|resource| &resource.scope_spans);
    let names: Vec<_> = scopes.flat_map(|scope| &scope.spans).map(|span| &span.name).collect();
    assert_eq!(names.iter().filter(|name| **name == "request").count(), 1, "{names:?}");
}

/// The log has everything that is logged, with secrets in headers, queries and in the environment.
#[tokio::test]
async fn log_has_no_secret() {
    let collector = Collector::start().await;
    let directory = tempfile::tempdir().unwrap();
    let loud = [
        ("RUST_LOG", "trace"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20hidden"),
        ("OTEL_BSP_SCHEDULE_DELAY", "1"),
    ];
    let mut program = start(directory.path(), &collector.address, &loud);
    let trace = "a".repeat(32);
    ask(&program, Method::PUT, &trace, Some(b"hidden bytes".repeat(1000))).await;
    for _ in 0..3 {
        ask(&program, Method::GET, &trace, None).await;
    }
    ask(&program, Method::PATCH, &trace, None).await;
    while collector.requests.lock().is_empty() {
        sleep(Duration::from_millis(5)).await;
    }
    assert!(ended(&mut program).await.success());
    assert!(!logged(directory.path(), "/objects/a/b").is_empty(), "requests are logged");
    assert!(!logged(directory.path(), "TRACE").is_empty(), "so is what libraries say");
    assert_eq!(logged(directory.path(), "hidden"), [""; 0]);
}

#[tokio::test]
async fn outage_of_the_collector_is_logged_once() {
    let collector = Collector::start().await;
    collector.refusals.store(3, Ordering::Relaxed);
    let directory = tempfile::tempdir().unwrap();
    let at_once = [("OTEL_BSP_SCHEDULE_DELAY", "1")];
    let mut program = start(directory.path(), &collector.address, &at_once);
    while collector.requests.lock().is_empty() {
        ask(&program, Method::GET, &"a".repeat(32), None).await;
    }
    assert!(ended(&mut program).await.success());
    assert_eq!(collector.refusals.load(Ordering::Relaxed), 0, "three batches were refused");
    let lines = logged(directory.path(), "collector");
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].contains("500 Internal Server Error"), "{lines:?}");
    assert!(lines[1].contains("takes spans again"), "{lines:?}");
}

#[tokio::test]
async fn silent_collector_delays_no_request() {
    // It accepts connections, as far as a client sees, and answers nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", silent.local_addr().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let small = [
        ("OTEL_BSP_SCHEDULE_DELAY", "1"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "4"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2"),
        // Far longer than a test may take.
        ("VMEM_SERVICE_OTLP__TIMEOUT", "100000s"),
    ];
    let program = start(directory.path(), &address, &small);
    for _ in 0..50 {
        assert_eq!(ask(&program, Method::GET, &"a".repeat(32), None).await.status, 404);
    }
    let lines = logged(directory.path(), "SpanDroppingStarted");
    assert_eq!(lines.len(), 1, "spans beyond the queue are dropped: {lines:?}");
}

#[tokio::test]
async fn absent_collector_does_not_keep_the_program_from_its_end() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = silent.local_addr().map(|address| (address, Some(silent))).unwrap();
    let refusing = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for (address, _listener) in [silent, (refusing, None)] {
        let directory = tempfile::tempdir().unwrap();
        // Sent one after the other, the spans would take longer than a test may.
        let one = [("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1"), ("VMEM_SERVICE_OTLP__TIMEOUT", "1s")];
        let mut program = start(directory.path(), &format!("http://{address}"), &one);
        let answer = ask(&program, Method::PUT, &"a".repeat(32), Some(vec![7; LEN])).await;
        assert_eq!(answer.status, 201);
        for _ in 0..2 * BOUND.as_secs() {
            ask(&program, Method::GET, &"a".repeat(32), None).await;
        }
        assert!(ended(&mut program).await.success());
        assert_eq!(logged(directory.path(), "all is durable").len(), 1);
    }
}

#[tokio::test]
async fn trace_that_the_caller_does_not_sample_is_not_sent() {
    let collector = Collector::start().await;
    let directory = tempfile::tempdir().unwrap();
    let none = [("VMEM_SERVICE_OTLP__SAMPLE_RATIO", "0")];
    let mut program = start(directory.path(), &collector.address, &none);
    let http = Http::new(&program.base);
    let [sampled, unsampled] = ["a", "b"].map(|digit| digit.repeat(32));
    for parent in [format!("00-{sampled}-{CALLER}-01"), format!("00-{unsampled}-{CALLER}-00")] {
        let headers = [("traceparent", &*parent)];
        http.send(Method::GET, "/objects/a", &headers, Body::empty()).await.unwrap();
    }
    http.send(Method::GET, "/objects/begun-here", &[], Body::empty()).await.unwrap();
    assert!(ended(&mut program).await.success());
    assert_eq!(collector.spans(&sampled, "request").len(), 1);
    assert_eq!(collector.spans(&unsampled, "request"), []);
    let sent = format!("{:?}", collector.requests.lock());
    assert!(!sent.contains("begun-here"), "{sent}");
}
