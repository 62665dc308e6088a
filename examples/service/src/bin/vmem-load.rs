//! The load program: puts, gets, ranges, deletes and lists, and compares every body.
//!
//! Invariant: it exits with 0 only if nothing was wrong, no answer was lost, and reads beside
//! clients that do not read took no longer than `--max-ratio` allows.

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
    /// Fails if 99 % of reads took longer than this factor beside those clients: the median
    /// of the rounds.
    #[arg(long)]
    max_ratio: Option<f64>,
    /// Chooses everything; another one each time by default.
    #[arg(long)]
    seed: Option<u64>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.max_ratio.is_some() && arguments.rounds.min(arguments.stalled as u64) == 0 {
        eprintln!("--max-ratio compares what --rounds and --stalled load");
        return ExitCode::FAILURE;
    }
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
        rounds => compare(load, rounds, arguments.max_ratio).await,
    };
    if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Loads the service without and with clients that do not read, in turn. True if nothing was wrong
/// and the ratio of the two is at most `max_ratio`.
async fn compare(load: Load, rounds: u64, max_ratio: Option<f64>) -> bool {
    let mut alone = Report::default();
    let mut beside = Report::default();
    let mut ratios = Vec::new();
    for round in 0..rounds {
        // Objects of their own for each.
        let seed = load.seed + 2 * round;
        let first = run(&Load { stalled: 0, seed, ..load.clone() }).await;
        let second = run(&Load { seed: seed + 1, ..load.clone() }).await;
        ratios.push(compared(&first, &second));
        alone.add(first);
        beside.add(second);
    }
    println!("without them:\n{alone}\nwith {} of them:\n{beside}", load.stalled);
    print!("all rounds: ");
    compared(&alone, &beside);
    ratios.sort_by(f64::total_cmp);
    let median = ratios[ratios.len() / 2];
    println!("the median of the rounds: {median:.2}");
    alone.is_right()
        && beside.is_right()
        && max_ratio.is_none_or(|max| is_within(&beside, median, max))
}

/// How often longer reads took beside those clients.
fn compared(alone: &Report, beside: &Report) -> f64 {
    let of = |report: &Report| report.gets_quantile_us(0.99);
    let ratio = f64::from(of(beside)) / f64::from(of(alone)).max(1.0);
    println!("99 % of reads within {} us, and {} us beside: {ratio:.2}", of(alone), of(beside));
    ratio
}

/// Whether the ratio is one that may be, and was measured: most of those clients were there.
fn is_within(beside: &Report, ratio: f64, max: f64) -> bool {
    if beside.stalled_live * 10 < beside.stalled * 9 {
        println!("NOT MEASURED: the service had cut off clients that do not read");
        return false;
    }
    if ratio == 0.0 {
        println!("NOT MEASURED: no read sent bytes");
        return false;
    }
    if ratio > max {
        println!("TOO SLOW: {ratio:.2} is more than {max}");
    }
    ratio <= max
}
