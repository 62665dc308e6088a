//! A client that compares every body with what it stored.
//!
//! Invariant: a body follows from its name and version alone, so that any process can say whether
//! it is whole, and which version it is. What a name may have is known after lost answers too: each
//! outcome that is possible. Called by the load program and by tests.

mod http;
mod report;
mod stalled;
mod worker;

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

pub use http::{Answer, Http, Lost};
pub use report::Report;
pub use stalled::Stalled;
pub use worker::Worker;

/// What a load is.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where the service is, such as `http://127.0.0.1:8080`.
    pub base: String,
    /// Clients at once, each with objects of its own.
    pub clients: usize,
    /// Objects of each client.
    pub objects: usize,
    /// The largest object, in bytes.
    pub max_len: usize,
    /// Clients besides them that ask for a large object and do not read it.
    pub stalled: usize,
    /// For how long.
    pub time: Duration,
    /// Chooses everything.
    pub seed: u64,
}

/// Runs a load, reads every object once more, and deletes them.
pub async fn run(load: &Load) -> Report {
    let http = Http::new(&load.base);
    let stalled = match Stalled::open(&http, load).await {
        Ok(stalled) => stalled,
        Err(why) => return Report { wrong: vec![why], ..Report::default() },
    };
    let began = Instant::now();
    let clients = (0..load.clients).map(|number| {
        let mut worker = Worker::new(http.clone(), number, load);
        let time = load.time;
        tokio::spawn(async move {
            while began.elapsed() < time {
                if let Err(lost) = worker.step().await {
                    worker.report.lose(&lost);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            worker.report.seconds = began.elapsed().as_secs_f64();
            worker.check_all().await;
            worker.delete_all().await;
            worker.report
        })
    });
    let mut total = Report::default();
    for client in clients.collect::<Vec<_>>() {
        match client.await {
            Ok(report) => total.add(report),
            Err(_) => total.wrong.push("a client of the load panicked".to_owned()),
        }
    }
    total.stalled = load.stalled;
    total.stalled_live = stalled.end().await;
    total
}

/// The bytes of a version of an object, at most `max_len`; small ones are more frequent.
pub fn body_of(name: &str, version: u64, max_len: usize) -> Vec<u8> {
    let mut seed = 0xcbf2_9ce4_8422_2325_u64 ^ version.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for byte in name.bytes() {
        seed = (seed ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let mut rng = SmallRng::seed_from_u64(seed);
    let most = rng.random_range(0..=max_len);
    let mut bytes = vec![0; rng.random_range(0..=most)];
    rng.fill_bytes(&mut bytes);
    bytes
}
