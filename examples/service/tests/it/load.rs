//! Many clients that compare every body; a client in Python.
//!
//! `VMEM_STRESS_SECONDS`, 3 by default.

use std::process::Command;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use vmem::{MemoryTier, PutOptions};
use vmem_service::load::{Load, Stalled, Worker, run};

use crate::limits::BOUND;
use crate::support::Served;

/// A load of clients that do not read, and of no others.
fn stalled_alone(served: &Served, stalled: usize) -> Load {
    Load {
        base: format!("http://{}", served.service.local_addr()),
        clients: 0,
        objects: 1,
        max_len: 1,
        stalled,
        time: Duration::ZERO,
        seed: 5,
    }
}

/// The service cut such clients off after its `write_timeout`, and the second half of a long load
/// had none of them. They ask anew.
#[tokio::test]
async fn clients_that_do_not_read_ask_anew_when_they_are_cut_off() {
    let served = Served::start(|config| {
        config.limits.write_timeout = Duration::from_millis(700);
        config.limits.max_requests = 3;
    })
    .await;
    let stalled = Stalled::open(&served.http, &stalled_alone(&served, 3)).await.unwrap();
    let all_cut_off = async {
        while stalled.cut_off() < 6 {
            sleep(Duration::from_millis(20)).await;
        }
        // The places are theirs again.
        while served.get("/objects", &[]).await.status != 503 {}
    };
    timeout(BOUND, all_cut_off).await.expect("each is cut off and asks anew");
    stalled.end().await;
    served.stop().await;
}

#[tokio::test]
async fn clients_that_do_not_read_are_counted_at_the_end() {
    let served = Served::start(|_| {}).await;
    let report = run(&stalled_alone(&served, 5)).await;
    assert_eq!((report.stalled, report.stalled_live), (5, 5), "{report}");
    assert!(report.to_string().contains("5 of 5 clients that do not read"), "{report}");
    served.stop().await;
}

/// Only the request was sent, and a refusal of it went unread.
#[tokio::test]
async fn refused_clients_that_do_not_read_are_an_error_of_the_load() {
    let served = Served::start(|config| config.limits.max_requests = 2).await;
    let why = Stalled::open(&served.http, &stalled_alone(&served, 3)).await.unwrap_err();
    assert!(why.contains("503"), "{why}");
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn load_program_fails_above_the_ratio() {
    let served = Served::start(|_| {}).await;
    let base = format!("http://{}", served.service.local_addr());
    for (ratio, code, said) in [("1e9", 0, "the median of"), ("1e-9", 1, "TOO SLOW")] {
        let mut program = Command::new(env!("CARGO_BIN_EXE_vmem-load"));
        program.arg(&base).args(["--seconds", "1", "--clients", "2"]);
        program.args(["--rounds", "1", "--stalled", "2", "--max-ratio", ratio]);
        let output = tokio::task::spawn_blocking(move || program.output().unwrap());
        let output = timeout(BOUND, output).await.expect("the load ends").unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(said) && text.contains("2 of 2 clients"), "{text}");
    }
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_clients_read_what_they_stored() {
    let seconds = std::env::var("VMEM_STRESS_SECONDS").map_or(3, |text| text.parse().unwrap());
    // Little enough that short responses are copied and streamed.
    let served = Served::start(|config| config.limits.max_copied = 1 << 20).await;
    let load = Load {
        base: format!("http://{}", served.service.local_addr()),
        clients: 16,
        objects: 16,
        max_len: 400_000,
        stalled: 20,
        time: Duration::from_secs(seconds),
        seed: 1,
    };
    let report = run(&load).await;
    println!("{report}");
    assert!(report.wrong.is_empty() && report.lost == 0, "{report}");
    assert!(report.compared > 16, "{report}");
    served.stop().await;
}

#[tokio::test]
async fn bytes_that_differ_are_reported_as_wrong() {
    let served = Served::start(|_| {}).await;
    let load = Load {
        base: String::new(),
        clients: 1,
        objects: 1,
        max_len: 1000,
        stalled: 0,
        time: Duration::ZERO,
        seed: 3,
    };
    let mut worker = Worker::new(served.http.clone(), 0, &load);
    let store = served.service.store();
    let entry = loop {
        worker.step().await.unwrap();
        if let Ok(entry) = store.entry("load/3/0/0").await {
            break entry;
        }
    };
    worker.check_all().await;
    assert!(worker.report.wrong.is_empty(), "{}", worker.report);
    // One byte more of the same version, and then another version.
    let options = PutOptions::new(MemoryTier::Host).metadata(entry.metadata.clone());
    let more = vec![0; entry.len as usize + 1];
    store.put_named_with(&entry.name, more, options).await.unwrap();
    worker.check_all().await;
    assert!(worker.report.wrong.iter().any(|why| why.contains("bytes for")), "{}", worker.report);
    worker.report.wrong.clear();
    store.remove_named(&entry.name).await.unwrap();
    worker.check_all().await;
    assert!(worker.report.wrong.iter().any(|why| why.contains("may be")), "{}", worker.report);
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_in_python_is_served() {
    let has_python =
        Command::new("python3").arg("--version").output().is_ok_and(|ran| ran.status.success());
    if !has_python {
        eprintln!("SKIPPED: there is no python3 here, so no client but ours was tried");
        return;
    }
    let served = Served::start(|_| {}).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/client.py");
    let port = served.service.local_addr().port().to_string();
    let ran = tokio::task::spawn_blocking(move || {
        Command::new("python3").args([script, &port]).output().unwrap()
    });
    let output = ran.await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let faults = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("all as stored"), "{text}{faults}");
    served.stop().await;
}
