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
use vmem_service::{Config, ENV_FILE, ENV_PREFIX, Otel, Service};

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
    let config = Config::read(arguments.config.as_deref(), variables()?)?;
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

/// The variables of the environment.
///
/// # Errors
///
/// If one of ours is no text: it would be as if it were not set.
fn variables() -> anyhow::Result<Vec<(String, String)>> {
    let mut variables = Vec::new();
    for (name, value) in std::env::vars_os() {
        let is_ours = name.as_encoded_bytes().starts_with(ENV_PREFIX.as_bytes());
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => variables.push((name, value)),
            (Ok(name), Err(_)) if is_ours => bail!("{name}: its value is not UTF-8"),
            (Err(name), _) if is_ours => bail!("{}: it is not UTF-8", name.display()),
            _ => {}
        }
    }
    Ok(variables)
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
