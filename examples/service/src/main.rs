//! The program: reads the configuration, serves until a signal, and closes the store.
//!
//! Invariant: it exits with 0 only if everything that it stored is durable. The log and the spans
//! for a collector have filters of their own.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Parser;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};
use vmem_service::{Config, ENV_FILE, Otel, Service};

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

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let config = Config::read(arguments.config.as_deref(), variables)?;
    if arguments.check_config {
        print!("{}", config.to_toml()?);
        return Ok(());
    }
    let runtime = Runtime::new()?;
    let served = runtime.block_on(serve(config));
    // The name of a collector may still be looked up, which nothing can end.
    runtime.shutdown_background();
    served
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let otel = Otel::start(&config.otlp)?;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_filter(filter);
    tracing_subscriber::registry().with(otel.as_ref().map(Otel::layer)).with(log).init();
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut stopped = async || {
        tokio::select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
        }
    };
    let service = Service::start(config, |_| axum::Router::new()).await?;
    println!("listening on http://{}", service.local_addr());
    stopped().await;
    tracing::info!("shutting down; a second signal ends it at once");
    let ending = async {
        let closed = service.shutdown().await.context("closing the store");
        if let Some(otel) = otel {
            otel.end().await;
        }
        closed
    };
    tokio::select! {
        closed = ending => closed?,
        () = stopped() => bail!("a second signal: what was not acknowledged may not be durable"),
    }
    tracing::info!("all is durable");
    Ok(())
}
