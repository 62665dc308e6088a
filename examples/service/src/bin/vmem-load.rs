//! The load program: puts, gets, ranges, deletes and lists, and compares every body.
//!
//! Invariant: it exits with 0 only if nothing was wrong and no answer was lost.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use vmem_service::load::{Load, Report, run};

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
    /// Loads it so often without and with those clients, in turn, and compares how long reads of
    /// objects took.
    #[arg(long, default_value_t = 0)]
    rounds: u64,
    /// Chooses everything; another one each time by default.
    #[arg(long)]
    seed: Option<u64>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u128() as u64 >> 24);
    println!("seed {seed}");
    let load = Load {
        base: arguments.url,
        clients: arguments.clients.max(1),
        objects: arguments.objects.max(1),
        max_len: arguments.max_len.max(1),
        time: Duration::from_secs(arguments.seconds),
        stalled: arguments.stalled,
        seed,
    };
    let is_right = match arguments.rounds {
        0 => {
            let report = run(&load).await;
            println!("{report}");
            report.is_right()
        }
        rounds => compare(load, rounds).await,
    };
    if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Loads the service without and with clients that do not read, in turn. True if nothing was wrong.
async fn compare(load: Load, rounds: u64) -> bool {
    let mut alone = Report::default();
    let mut beside = Report::default();
    for round in 0..rounds {
        // Objects of their own for each.
        let seed = load.seed + 2 * round;
        let first = run(&Load { stalled: 0, seed, ..load.clone() }).await;
        let second = run(&Load { seed: seed + 1, ..load.clone() }).await;
        println!("{}", ratio(&first, &second));
        alone.add(first);
        beside.add(second);
    }
    println!("without them:\n{alone}\nwith {} of them:\n{beside}", load.stalled);
    println!("all rounds: {}", ratio(&alone, &beside));
    alone.is_right() && beside.is_right()
}

fn ratio(alone: &Report, beside: &Report) -> String {
    let of = |report: &Report| report.gets_quantile_us(0.99);
    let ratio = f64::from(of(beside)) / f64::from(of(alone)).max(1.0);
    format!("99 % of reads within {} us, and {} us beside: {ratio:.2}", of(alone), of(beside))
}
