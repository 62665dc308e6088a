//! What a console is sent by a store under the load of the example.
//!
//! Invariant: it asks over the wire, as tokio-console does, of a real store, and asserts no times.
//! Called by `.ci/run`, with `--cfg tokio_unstable`: without it nothing is sent.

#![cfg(tokio_unstable)]

mod seen;

use std::path::Path;
use std::time::Duration;

use console_api::instrument::InstrumentRequest;
use console_api::instrument::instrument_client::InstrumentClient;
use tokio::sync::oneshot;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use seen::{Read, Seen};

/// Nothing takes nearly as long: what was not sent by then is never sent.
const HANGS: Duration = Duration::from_secs(120);

/// What a console must be sent, and whether it was.
type Expected = (&'static str, fn(&Seen) -> bool);

const EXPECTED: [Expected; 10] = [
    ("host memory as a resource that fills", |seen| fills(seen, "host")),
    ("the disk as a resource that fills", |seen| fills(seen, "disk")),
    ("bytes that readers hold", |seen| {
        seen.values("reads", "held").iter().any(|held| *held != "0.0 MiB")
    }),
    ("requests that wait for host memory", |seen| {
        let waiters = seen.values("host", "waiters");
        waiters.iter().any(|count| count.parse::<u64>().is_ok_and(|count| count > 0))
    }),
    ("how many migrations are under way", |seen| {
        seen.values("reads", "migrations").iter().any(|count| count.parse::<u64>().is_ok())
    }),
    ("the stages of reads that are under way", |seen| {
        seen.values("reads", "now").iter().any(|now| now.contains(" space"))
    }),
    ("a task of the store by its name", |seen| seen.task_named("vmem-actor").is_some()),
    ("migrations with object, cause and bytes", |seen| {
        ["prefetch", "read"].into_iter().all(|cause| is_moved(seen, cause))
    }),
    ("a read that waits for space, and its task", |seen| waiting_reads(seen).next().is_some()),
    ("the end of such a read, and in which stage it was longest", |seen| {
        let mostly = "nothing, was mostly space";
        waiting_reads(seen).any(|read| read.has_ended && read.stages.contains(mostly))
    }),
];

/// Whether what a tier is filled with was seen to change.
fn fills(seen: &Seen, tier: &str) -> bool {
    let fill = seen.values(tier, "fill");
    let is_whole = |fill: &&str| fill.contains("% of ") && fill.ends_with(" MiB");
    fill.len() > 1 && fill.iter().all(is_whole)
}

/// Whether an object of the load went from the disk to host memory for this cause, to the end.
fn is_moved(seen: &Seen, cause: &str) -> bool {
    seen.tasks().any(|task| {
        let is = |name: &str, value: &str| task.fields.get(name).is_some_and(|is| is == value);
        let Some(object) = task.fields.get("object") else { return false };
        is("kind", "migration")
            && is("task.name", &format!("disk to host: {cause} {object}"))
            && is("cause", cause)
            && is("bytes", "524288")
            && object.starts_with("model/layer-")
            && task.has_ended
    })
}

/// The reads of the task that looks stuck that waited for space.
fn waiting_reads(seen: &Seen) -> impl Iterator<Item = &Read> {
    let stuck = seen.task_named("reader that looks stuck");
    seen.reads().filter(move |read| {
        stuck.is_some()
            && read.task == stuck
            && read.object.starts_with("model/layer-")
            && read.stages.contains("space")
    })
}

#[test]
fn console_is_sent_what_fills_what_moves_and_what_waits() {
    let folder = tempfile::tempdir().expect("a folder for the socket");
    let socket = folder.path().join("console");
    tracing_subscriber::registry().with(vmem_console::layer(socket.clone())).init();

    let mut seen = Seen::default();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let (end, ended) = oneshot::channel::<()>();
        let mut load = tokio::spawn(vmem_console::run(async { drop(ended.await) }));
        tokio::select! {
            _ = tokio::time::timeout(HANGS, watch(&socket, &mut seen)) => {}
            outcome = &mut load => panic!("the load ended early: {outcome:?}"),
        }
        drop(end);
        load.await.expect("the load does not panic").expect("the load does not fail");
    });
    let lacking = lacking(&seen);
    assert!(lacking.is_empty(), "the console was not sent {lacking:#?}, but {seen:?}");
    assert_eq!(seen.lost(), 0, "events were lost");
}

fn lacking(seen: &Seen) -> Vec<&'static str> {
    let lacking = EXPECTED.iter().filter(|(_, was_sent)| !was_sent(seen));
    lacking.map(|(what, _)| *what).collect()
}

/// Adds what is sent until nothing lacks.
async fn watch(socket: &Path, seen: &mut Seen) {
    let address = format!("unix:{}", socket.display());
    let mut client = loop {
        match InstrumentClient::connect(address.clone()).await {
            Ok(client) => break client,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let updates = client.watch_updates(InstrumentRequest {}).await.expect("updates are sent");
    let mut updates = updates.into_inner();
    while !lacking(seen).is_empty() {
        let update = updates.message().await.expect("an update is whole");
        seen.add(update.expect("updates do not end before the load"));
    }
}
