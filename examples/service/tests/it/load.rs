//! Many clients that compare every body; a client in Python.
//!
//! `VMEM_STRESS_SECONDS`, 3 by default.

use std::process::Command;
use std::time::Duration;

use vmem::{MemoryTier, PutOptions};
use vmem_service::load::{Load, Worker, run};

use crate::support::Served;

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
