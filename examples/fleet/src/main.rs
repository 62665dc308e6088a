//! Three stores over one bucket, each a process with an empty disk: one writes, two follow.
//!
//! ```text
//! scripts/with-moto.sh cargo run -p vmem-fleet     # over a server that speaks the protocol of S3
//! cargo run -p vmem-fleet                          # over a folder
//! ```
//!
//! Invariant: a reader never sees half of a version, nor an older one after a newer one, and sees
//! the last one of each name, or the program fails.

mod bucket;
mod roles;
mod version;

use std::path::PathBuf;
use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use futures::future::try_join_all;
use tokio::process::{Child, Command};
use vmem_remote::Uuid;

/// Readers beside the writer.
const READERS: usize = 2;

/// Three stores over one bucket: one writes, two follow.
#[derive(Clone, Debug, Parser)]
pub(crate) struct Options {
    /// How long the writer writes, in seconds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// The names of which it writes a version each in every round.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    names: u64,
    /// The length of each object, in bytes.
    #[arg(
        long,
        default_value_t = 1 << 20,
        value_parser = clap::value_parser!(u64).range(16..=64 << 20)
    )]
    bytes: u64,
    /// How long a reader waits between two looks for new versions, in milliseconds.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    follow_ms: u64,
    /// The folder that serves as the bucket where VMEM_S3_ENDPOINT names no server; a new one,
    /// which is removed at the end, unless it is given.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// What this process does: for those that the first one starts.
    #[arg(long, hide = true)]
    role: Option<Role>,
    /// Where in the bucket.
    #[arg(long, hide = true, default_value = "")]
    prefix: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Role {
    Writer,
    Reader,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = match options.role {
        None => start_all(options).await,
        Some(Role::Writer) => roles::write(&options).await,
        Some(Role::Reader) => roles::follow(&options).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmem-fleet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Starts a process for each store, and waits for them.
async fn start_all(mut options: Options) -> Result<()> {
    let folder = tempfile::tempdir().context("making a folder")?;
    options.directory.get_or_insert_with(|| folder.path().to_owned());
    options.prefix = format!("fleet-{}", Uuid::new_v4());
    println!("bucket: {}", bucket::describe(&options));
    let mut processes = vec![start(&options, Role::Writer)?];
    for _ in 0..READERS {
        processes.push(start(&options, Role::Reader)?);
    }
    // The first one that fails ends all: what is left of them is killed with its handle.
    let ended = processes.into_iter().map(|mut process| async move {
        let status = process.wait().await.context("waiting for a process")?;
        ensure!(status.success(), "a process ended with {status}");
        Ok(())
    });
    let ended = try_join_all(ended).await;
    let removed = bucket::remove_all(&options).await?;
    ended?;
    println!("all have ended well; {removed} objects were removed from the bucket");
    Ok(())
}

fn start(options: &Options, role: Role) -> Result<Child> {
    let mut process = Command::new(std::env::current_exe().context("finding this program")?);
    process.args(["--seconds", &options.seconds.to_string()]);
    process.args(["--names", &options.names.to_string()]);
    process.args(["--bytes", &options.bytes.to_string()]);
    process.args(["--follow-ms", &options.follow_ms.to_string()]);
    process.args(["--prefix", &options.prefix]);
    process
        .args(options.directory.iter().flat_map(|path| ["--directory".as_ref(), path.as_os_str()]));
    process.args(["--role", if role == Role::Writer { "writer" } else { "reader" }]);
    process.stdin(Stdio::null()).kill_on_drop(true).spawn().context("starting a process")
}
