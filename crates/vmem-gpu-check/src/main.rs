//! Checks vmem on a machine with an NVIDIA driver, and no Rust and no network: what vmem assumes of
//! a driver, the scenarios that it must survive, and the bars of its VRAM tier.
//!
//! Invariant: each part runs in a process of its own, for some leave the driver broken behind; and
//! what a part found is written before the next one begins, so that a run that was cut short goes
//! on where it was. With `--emulated` the same parts run on the emulated driver, and no figure is
//! taken. Called by people, and by the tests of this crate.
//!
//! # Layout
//!
//! - `parts`: all parts, by name.
//! - `run`: a part in a process of its own, and the record of what came of it.
//! - `user`: what a user of the store does on the device: kernels, memory, streams.
//! - `contract`: what vmem assumes of the driver.
//! - `scenarios`: what the store must survive.
//! - `bars`: the figures.
//! - `sanitizer`: the scenarios under NVIDIA's memory checker.

mod bars;
mod contract;
mod parts;
mod run;
mod sanitizer;
mod scenarios;
mod user;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Checks vmem on a real card, and says what it saw.
#[derive(Clone, Debug, Parser)]
#[command(version)]
struct Options {
    /// Only parts whose names begin with one of these.
    #[arg(long, value_name = "PART", num_args = 1..)]
    only: Vec<String>,
    /// Lists the parts.
    #[arg(long)]
    list: bool,
    /// The emulated driver in place of a card; figures are not taken.
    #[arg(long)]
    emulated: bool,
    /// Where the record is kept: a line of JSON for each part. What has passed there is not run
    /// again.
    #[arg(long, value_name = "FILE", default_value = "gpu-check.json")]
    json: PathBuf,
    /// Runs what has passed before again.
    #[arg(long)]
    again: bool,
    /// Which card.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// The seed of everything that is random.
    #[arg(long, default_value_t = 11)]
    seed: u64,
    /// The most minutes that the run takes: parts that have not begun by then are skipped, and the
    /// run has failed. By the same command what is left runs later.
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u64).range(..=10_000))]
    minutes: u64,
    /// A folder on the disk that is to be measured; the system's own for temporary files otherwise.
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    /// Runs this part in this process, and prints what it found.
    #[arg(long, value_name = "PART", hide = true)]
    part: Option<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.list {
        for part in parts::all().into_iter().filter(|part| part.on != parts::On::Within) {
            println!("{:<32} {}", part.name, part.about);
        }
        return ExitCode::SUCCESS;
    }
    let outcome = match &options.part {
        Some(name) => run::here(name, &options),
        None => run::all(&options),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gpu-check: {error:#}");
            ExitCode::FAILURE
        }
    }
}
