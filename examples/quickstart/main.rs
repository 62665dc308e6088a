//! Stores a directory under a small memory budget, reads it back, and compares every byte.
//!
//! ```text
//! cargo run --release --example quickstart [-- DIR] [--host 64MiB] [--seed 1] ...
//! ```
//!
//! Read it in this order: `main.rs` opens a store and runs three phases, `store.rs` puts files
//! into it, `reads.rs` reads them back in several ways, `work.rs` compares. The rest is for show:
//! `options.rs`, `files.rs`, `tally.rs`, `moves.rs`, `display.rs`, `summary.rs`.

mod display;
mod files;
mod moves;
mod options;
mod reads;
mod store;
mod summary;
mod tally;
mod work;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytesize::ByteSize;
use clap::Parser;
use vmem::VirtualMemory;

use crate::display::{Display, say};
use crate::files::Found;
use crate::moves::Moves;
use crate::options::Options;
use crate::summary::End;
use crate::tally::{Goal, Tally};
use crate::work::Work;

/// How often to look whether the store is empty at the end, 50 ms apart.
const EMPTY_TRIES: u32 = 100;

fn main() -> ExitCode {
    let outcome = prepare(Options::parse());
    outcome.unwrap_or_else(|error| {
        eprintln!("quickstart: {error:#}");
        ExitCode::from(2)
    })
}

fn prepare(options: Options) -> anyhow::Result<ExitCode> {
    let dir = options.directory()?;
    let found = files::find(&dir, options.max.0)?;
    let files = found.files.len();
    let bytes = ByteSize(found.bytes);
    say(&format!("{}: {files} files, {bytes}; seed {}", dir.display(), options.seed));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(run(&options, found));
    // A file on a dead network mount must not keep the program from ending.
    runtime.shutdown_background();
    outcome
}

async fn run(options: &Options, found: Found) -> anyhow::Result<ExitCode> {
    let vmem = vmem::open(options.config(found.bytes)?).await.context("cannot open the store")?;
    say(&vmem.capabilities().to_string());

    let tally = Arc::new(Tally::default());
    let (moves, listener) = Moves::listen(&vmem);
    let display = Display::start(vmem.clone(), tally.clone(), moves.clone());
    let work = Work { vmem: vmem.clone(), tally: tally.clone(), tasks: options.tasks };

    // Dropping the phases half way is all that it takes to cancel them.
    let end = tokio::select! {
        () = phases(&work, options, &found) => End::Complete,
        _ = tokio::signal::ctrl_c() => End::Interrupted,
    };

    let stats = vmem.stats();
    tally.end(&stats);
    display.abort();
    drop(display.await);
    drop(work);
    if !is_empty_soon(&vmem).await {
        tally.failed.push(format!("bytes are left that no handle owns: {:?}", vmem.stats()));
    }
    if let Err(error) = vmem.close().await {
        tally.failed.push(format!("closing the store: {error}"));
    }
    listener.abort();

    summary::print(&tally, &moves, &stats);
    Ok(summary::conclude(&tally, &found, &stats, end))
}

/// Stores everything, reads at random for a while, and compares every byte at the end.
async fn phases(work: &Work, options: &Options, found: &Found) {
    for entry in &found.unreadable {
        work.tally.unreadable.push(entry.clone());
    }
    let begin = |name, goal| work.tally.begin(name, goal, &work.vmem.stats());

    begin("store", Goal::Bytes(found.bytes));
    let stored = work.store(found.files.clone()).await;

    begin("read", Goal::Time(options.seconds));
    work.read_skewed(&stored, options.seconds, options.seed).await;

    begin("sweep", Goal::Bytes(work.tally.bytes_stored.get()));
    work.sweep(&stored).await;
}

/// Whether every tier is empty, now that all handles are gone. The bytes that cancelled tasks were
/// comparing when Ctrl-C came are dropped with their threads, a moment later.
async fn is_empty_soon(vmem: &VirtualMemory) -> bool {
    for _ in 0..EMPTY_TRIES {
        let stats = vmem.stats();
        if stats.host.used_bytes == 0 && stats.disk.used_bytes == 0 {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    false
}
