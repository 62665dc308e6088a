//! Whether DataFusion answers from a vmem store what it answers from plain files.
//!
//! Invariant: both sides have the same Parquet files, of more bytes than the store may have in host
//! memory, and go through the same code; the exit status is 0 only if no answer differs.

mod data;
mod queries;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytesize::ByteSize;
use clap::Parser;
use datafusion::prelude::{ParquetReadOptions, SessionConfig, SessionContext};
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use url::Url;
use vmem::VirtualMemoryConfig;
use vmem_object_store::Store;

/// Queries Parquet files in a vmem store with DataFusion, and compares the answers.
#[derive(Debug, Parser)]
struct Options {
    /// Bytes of Parquet, at least.
    #[arg(long, default_value = "1GiB")]
    size: ByteSize,
    /// What the store may have in host memory.
    #[arg(long, default_value = "128MiB")]
    host: ByteSize,
    /// How often each query runs on each side.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Makes other rows.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where both sides have their files; they are removed in the end. Default: the system's
    /// directory for temporary files.
    #[arg(long)]
    directory: Option<PathBuf>,
}

/// One of the two that are compared.
struct Side {
    name: &'static str,
    context: SessionContext,
    files: Arc<dyn ObjectStore>,
    /// What the names of tables stand behind.
    url: String,
    time: Duration,
}

impl Side {
    fn new(name: &'static str, files: Arc<dyn ObjectStore>, scheme: &str) -> Result<Self> {
        let url = format!("{scheme}://store/");
        let context = SessionContext::new_with_config(SessionConfig::new());
        context.register_object_store(&Url::parse(&url)?, files.clone());
        Ok(Side { name, context, files, url, time: Duration::ZERO })
    }

    async fn register(&self, table: &str) -> Result<()> {
        let url = format!("{}{table}/", self.url);
        self.context.register_parquet(table, url, ParquetReadOptions::default()).await?;
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(options.rounds > 0, "at least one round");
    let directory = match &options.directory {
        Some(directory) => tempfile::tempdir_in(directory),
        None => tempfile::tempdir(),
    };
    let directory = directory.context("making a directory")?;
    let store = open(&options, directory.path()).await?;
    let outcome = compare(&options, directory.path(), store.clone()).await;
    store.vmem().clone().close().await?;
    outcome
}

async fn open(options: &Options, directory: &Path) -> Result<Store> {
    // The parts of an upload are on disk beside what they become.
    let disk = 2 * options.size.as_u64() + (2 << 30);
    let config = VirtualMemoryConfig::builder()
        .disk_path(directory.join("vmem"))
        .host_capacity(options.host.as_u64())
        .disk_capacity(disk);
    Ok(Store::new(vmem::open(config.build()?).await?))
}

async fn compare(options: &Options, directory: &Path, store: Store) -> Result<()> {
    let plain = directory.join("plain");
    std::fs::create_dir(&plain)?;
    let plain = LocalFileSystem::new_with_prefix(plain)?;
    let mut sides = [
        Side::new("files", Arc::new(plain), "plain")?,
        Side::new("vmem", Arc::new(store.clone()), "vmem")?,
    ];
    let written = write(options, &mut sides).await?;
    println!(
        "{} rows in {} files of Parquet, {} ({} bytes), host budget {}",
        written.rows,
        written.files,
        ByteSize(written.bytes),
        written.bytes,
        options.host
    );
    ensure!(written.bytes > options.host.as_u64(), "all of it would fit into host memory");

    let mut differing = 0;
    for (name, sql) in queries::all(written.rows) {
        differing += usize::from(!run(options, &mut sides, name, &sql).await?);
    }
    let [files, vmem] = &sides;
    let host = store.vmem().stats().host;
    println!(
        "queries {:.1} s from files, {:.1} s from vmem: ratio {:.2}",
        files.time.as_secs_f64(),
        vmem.time.as_secs_f64(),
        vmem.time.as_secs_f64() / files.time.as_secs_f64()
    );
    println!(
        "host peak {} of {} for objects, {} evictions, {} read from disk",
        ByteSize(host.peak_bytes),
        ByteSize(host.capacity_bytes),
        store.vmem().stats().evictions,
        ByteSize(store.vmem().stats().disk_to_host_bytes)
    );
    ensure!(host.peak_bytes <= host.capacity_bytes, "more in host memory than the budget");
    if differing > 0 {
        bail!("{differing} answers differ");
    }
    println!("no answer differs");
    Ok(())
}

/// What both sides have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Written {
    rows: u64,
    files: u64,
    bytes: u64,
}

/// Writes the same tables on both sides.
async fn write(options: &Options, sides: &mut [Side; 2]) -> Result<Written> {
    let mut all = Vec::new();
    for side in sides.iter_mut() {
        let began = Instant::now();
        let mut written = Written::default();
        while written.bytes < options.size.as_u64() {
            let bytes =
                data::write_orders(&side.files, options.seed, written.files, written.rows).await?;
            written.files += 1;
            written.rows += data::ROWS_PER_FILE;
            written.bytes += bytes;
        }
        data::write_customers(&side.files, options.seed).await?;
        for table in ["orders", "customers"] {
            side.register(table).await?;
        }
        println!("written to {} in {:.1} s", side.name, began.elapsed().as_secs_f64());
        all.push(written);
    }
    ensure!(all[0] == all[1], "the sides have other files: {all:?}");
    Ok(all[0])
}

/// Removes what a query has written.
async fn remove(files: &Arc<dyn ObjectStore>, directory: &str) -> Result<()> {
    let written = files.list(Some(&directory.into())).map_ok(|meta| meta.location).boxed();
    files.delete_stream(written).try_collect::<Vec<_>>().await?;
    Ok(())
}

/// Runs a query on both sides; true if the answers are the same, in every round.
async fn run(options: &Options, sides: &mut [Side; 2], name: &str, sql: &str) -> Result<bool> {
    let mut same = true;
    let mut rows = 0;
    let mut times = [Duration::ZERO; 2];
    for _ in 0..options.rounds {
        let mut answers = Vec::new();
        for (side, time) in sides.iter_mut().zip(&mut times) {
            let began = Instant::now();
            let sql = sql.replace("{url}", &side.url);
            let answer = queries::run(&side.context, &sql).await;
            answers.push(answer.with_context(|| format!("{name} from {}", side.name))?);
            let elapsed = began.elapsed();
            *time += elapsed;
            side.time += elapsed;
            remove(&side.files, "copied").await?;
        }
        rows = answers[0].num_rows();
        ensure!(rows > 0, "{name} has no rows: nothing was compared");
        same &= answers[0] == answers[1];
    }
    println!(
        "{name:<12} {rows:>8} rows, {:.2} s from files, {:.2} s from vmem: {}",
        times[0].as_secs_f64(),
        times[1].as_secs_f64(),
        if same { "the same" } else { "DIFFERENT" }
    );
    Ok(same)
}
