//! The program: reads the configuration, serves until a signal, and closes the store.
//!
//! Invariant: it exits with 0 only if everything that it stored is durable.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use vmem_service::{Config, ENV_FILE, Service};

/// An object service over vmem.
///
/// Variables that begin with VMEM_SERVICE_ go before the file: VMEM_SERVICE_LISTEN,
/// VMEM_SERVICE_LIMITS__MAX_OBJECT, VMEM_SERVICE_STORE__DISK_PATH. RUST_LOG chooses what is logged.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration, in TOML.
    #[arg(long, env = ENV_FILE)]
    config: Option<PathBuf>,
    /// Prints the effective values and exits.
    #[arg(long)]
    check_config: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let config = Config::read(arguments.config.as_deref(), variables)?;
    if arguments.check_config {
        print!("{}", config.to_toml()?);
        return Ok(());
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let service = Service::start(config, |_| axum::Router::new()).await?;
    println!("listening on http://{}", service.local_addr());
    tokio::select! {
        _ = terminated.recv() => {}
        _ = interrupted.recv() => {}
    }
    tracing::info!("shutting down");
    service.shutdown().await.context("closing the store")?;
    tracing::info!("all is durable");
    Ok(())
}
