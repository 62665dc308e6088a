//! An object service over vmem: PUT, GET, HEAD, DELETE, listings, prefetch and pins over HTTP.
//!
//! In the order in which a request flows:
//!
//! - `config`: a file and the environment.
//! - `server`: [`Service`], which accepts, serves, drains, and closes the store.
//! - `routes`: what leads where, the ids and spans of requests; other routers are mounted here.
//! - `guard`: the names and the pages that are answered.
//! - `metrics`, `dashboard`: what the service and its store do, for Prometheus and for people.
//! - `trace`, `otel`: the spans of requests, and their way to an OpenTelemetry collector.
//! - `limits`: how many requests are served at once, of all clients and of one.
//! - `linger`: what is left of the bodies of refused requests.
//! - `pace`: the least rate at which a client sends and takes bodies.
//! - `name`, `conditions`, `attributes`: what a request says of its object.
//! - `put`, `get`, `list`, `pins`, `health`: the handlers.
//! - `error`: what goes wrong, as HTTP says it.
//! - `load`: a client that compares every body, for the load program and the tests.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use vmem_service::{Config, Service};
//!
//! let config = Config::read(Some("service.toml".as_ref()), std::env::vars())?;
//! let service = Service::start(config, |_store| axum::Router::new()).await?;
//! println!("listening on http://{}", service.local_addr());
//! tokio::signal::ctrl_c().await?;
//! service.shutdown().await?;
//! # Ok(())
//! # }
//! ```

mod attributes;
mod conditions;
mod config;
mod dashboard;
mod error;
mod get;
mod guard;
mod health;
mod limits;
mod linger;
mod list;
pub mod load;
mod metrics;
mod name;
mod otel;
mod pace;
mod pins;
mod put;
mod routes;
mod server;
mod state;
mod trace;

pub use config::{Config, ConfigError, DashboardAccess, ENV_FILE, ENV_PREFIX, Limits, Otlp};
pub use otel::Otel;
pub use server::Service;
