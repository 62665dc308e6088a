//! The load program: puts, gets, ranges, deletes and lists, and compares every body.
//!
//! Invariant: it exits with 0 only if nothing was wrong and no answer was lost.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use vmem_service::load::{Load, run};

/// Loads a service and compares every body.
#[derive(Debug, Parser)]
struct Arguments {
    /// The service.
    #[arg(default_value = "http://127.0.0.1:8080")]
    url: String,
    /// For how long.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Clients at once.
    #[arg(long, default_value_t = 32)]
    clients: usize,
    /// Objects of each client.
    #[arg(long, default_value_t = 32)]
    objects: usize,
    /// The largest object, in bytes.
    #[arg(long, default_value_t = 256 << 10)]
    max_len: usize,
    /// Clients besides them that ask for a large object and do not read it.
    #[arg(long, default_value_t = 0)]
    stalled: usize,
    /// Chooses everything; another one each time by default.
    #[arg(long)]
    seed: Option<u64>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u128() as u64 >> 24);
    println!("seed {seed}");
    let report = run(&Load {
        base: arguments.url,
        clients: arguments.clients.max(1),
        objects: arguments.objects.max(1),
        max_len: arguments.max_len.max(1),
        time: Duration::from_secs(arguments.seconds),
        stalled: arguments.stalled,
        seed,
    })
    .await;
    println!("{report}");
    if report.wrong.is_empty() && report.lost == 0 && report.requests() > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
