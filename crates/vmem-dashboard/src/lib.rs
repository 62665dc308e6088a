//! A live page over a store: what fills, what waits and why.
//!
//! [`router`] is an axum `Router` that a service mounts where it likes; [`serve`] is a server of
//! its own, for programs that have none. The page is one document, without a build step and without
//! a request to anybody else: it shows the tiers as they fill, what flows between them, what reads
//! wait for, how long they take, and the slowest of them with where their time went.
//!
//! ```
//! use axum::Router;
//! # use vmem::VirtualMemoryConfig;
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), vmem::VirtualMemoryError> {
//! # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
//! # let vmem = vmem::open(config.build()?).await?;
//! let app: Router = Router::new().nest("/vmem", vmem_dashboard::router(vmem.clone()));
//! # drop(app);
//! # vmem.close().await
//! # }
//! ```
//!
//! # What it gives away
//!
//! It answers `GET` and changes nothing. It shows names of objects, sizes, times and errors, and no
//! bytes of objects. It refuses requests that a page of another origin makes, and its own page may
//! load nothing from elsewhere; whether a *person* may see it is up to the service that mounts it.
//! [`serve`] answers to names of this machine alone unless it is bound to another address. A
//! service has [`local_names`] for that, and [`same_origin`] for other routes that only read.
//!
//! # What it costs
//!
//! Nothing while no page is open. While some are, one task takes a snapshot a second for all of
//! them; at most [`LISTENERS_MAX`] listen at once.
//!
//! - `snapshot`: what a page is sent.
//! - `feed`: the task that takes snapshots, and its listeners.
//! - `page`: the document and its policy.
//! - `guard`: which requests are answered.

mod feed;
mod guard;
mod page;
mod snapshot;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::from_fn;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::StreamExt;
use tokio::net::TcpListener;
use vmem_core::VirtualMemory;

use feed::Feed;
pub use guard::{local_names, same_origin};

/// Pages that listen at once; one more gets `503`.
pub const LISTENERS_MAX: usize = 32;

/// The page at `/`, its data at `/stream` (server-sent events) and `/snapshot` (JSON).
///
/// It holds the store until it is dropped; a store that is closed is shown as that.
pub fn router(vmem: VirtualMemory) -> Router {
    Router::new()
        .route("/", get(page::page))
        .route("/stream", get(stream))
        .route("/snapshot", get(snapshot))
        .layer(from_fn(guard::same_origin))
        .with_state(Feed::new(vmem))
}

/// Serves the page at `/` of this address until the future is dropped. On a loopback address, which
/// is what to use unless others are meant to see it, it answers only to names of this machine.
///
/// ```no_run
/// # use vmem::VirtualMemoryConfig;
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let vmem = vmem::open(VirtualMemoryConfig::default()).await?;
/// let page = vmem_dashboard::serve(vmem.clone(), vmem_dashboard::LOOPBACK).await?;
/// println!("http://{}/", page.address());
/// tokio::spawn(page.run());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// Those of binding the address.
pub async fn serve(vmem: VirtualMemory, address: impl Into<SocketAddr>) -> io::Result<Server> {
    let listener = TcpListener::bind(address.into()).await?;
    let address = listener.local_addr()?;
    let mut app = router(vmem);
    if address.ip().to_canonical().is_loopback() {
        app = app.layer(from_fn(guard::local_names));
    }
    Ok(Server { listener, address, app })
}

/// Port 3580 of this machine, unreachable from others.
pub const LOOPBACK: ([u8; 4], u16) = ([127, 0, 0, 1], 3580);

/// A server that is bound and not running yet: see [`serve`].
#[must_use = "a server serves nothing until it runs"]
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    app: Router,
}

impl Server {
    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until this is dropped.
    ///
    /// # Errors
    ///
    /// Those of the listener.
    pub async fn run(self) -> io::Result<()> {
        axum::serve(self.listener, self.app).await
    }
}

async fn snapshot(State(feed): State<Arc<Feed>>) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (headers, feed.snapshot()).into_response()
}

async fn stream(State(feed): State<Arc<Feed>>) -> Response {
    let Some(listener) = feed.listen() else {
        let why = format!("{LISTENERS_MAX} pages listen already\n");
        return (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "5")], why)
            .into_response();
    };
    let events = listener.map(|json| Ok::<_, Infallible>(Event::default().data(&*json)));
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

/// The page of the guide whose program mounts this page; doctests compile it.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/guide/src/service.md")]
mod guide {}
