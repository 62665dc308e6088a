//! The service from its start to its end.
//!
//! Invariant: it accepts no connection before the store is open, and closes the store after the
//! last request, however it ended: what was acknowledged is there after a restart. A connection
//! whose peer stands still or is too slow ends by a timeout. Called by the program and by tests.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::extract::Request;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt;
use vmem::{VirtualMemory, VirtualMemoryError};

use crate::config::{Config, Limits};
use crate::limits::{Clients, Peer};
use crate::pace::Paced;
use crate::routes::router;
use crate::state::{App, Shared};
use crate::{dashboard, metrics};

/// The pause after a connection that could not be accepted, such as for want of descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// What a connection buffers, in bytes.
const BUFFER: usize = 64 << 10;
/// Headers of one request.
const HEADERS_MAX: usize = 128;

/// A service that runs.
#[derive(Debug)]
pub struct Service {
    address: SocketAddr,
    app: App,
    accepting: JoinHandle<()>,
}

impl Service {
    /// Opens the store and begins to serve. `mount` makes other routes over the store, which the
    /// limits do not concern; `Router::new()` if there are none.
    ///
    /// # Errors
    ///
    /// If the configuration cannot be used, the store does not open, the address is taken, or the
    /// process has another recorder of metrics.
    pub async fn start(
        config: Config,
        mount: impl FnOnce(&VirtualMemory) -> Router,
    ) -> anyhow::Result<Service> {
        config.check()?;
        let listener = listen(config.listen, &config.limits)
            .with_context(|| format!("listening on {}", config.listen))?;
        let address = listener.local_addr()?;
        let vmem = vmem::open(config.store).await.context("opening the store")?;
        tracing::info!("{}", vmem.capabilities());
        let recorder = metrics::recorder()?;
        let mounted = mount(&vmem);
        let is_loopback = address.ip().to_canonical().is_loopback();
        let app = Shared::new(vmem, config.limits, is_loopback, config.names);
        let mounted = mounted
            .merge(metrics::router(app.clone(), recorder.clone()))
            .merge(dashboard::router(&app, config.dashboard));
        let router = router(app.clone(), mounted);
        tokio::spawn(metrics::upkeep(app.vmem.clone(), recorder, app.closing()));
        let accepting = tokio::spawn(accept(listener, router, app.clone()));
        tracing::info!(%address, "ready");
        Ok(Service { address, app, accepting })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The store.
    pub fn store(&self) -> &VirtualMemory {
        &self.app.vmem
    }

    /// Stops accepting, lets requests in flight end within `drain_timeout`, and closes the store.
    ///
    /// # Errors
    ///
    /// Those of closing the store: `NotFlushed` with the names of what may not survive.
    pub async fn shutdown(self) -> Result<(), VirtualMemoryError> {
        self.app.close();
        if let Err(error) = self.accepting.await {
            tracing::error!(%error, "the server ended badly");
        }
        self.app.pins.release_all();
        self.app.vmem.clone().close().await
    }
}

/// A listener whose connections have bounded send buffers.
fn listen(address: SocketAddr, limits: &Limits) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    if limits.send_buffer > 0 {
        // Connections inherit it.
        socket.set_send_buffer_size(u32::try_from(limits.send_buffer).unwrap_or(u32::MAX))?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Accepts connections until it is to stop, then waits for their requests.
async fn accept(listener: TcpListener, router: Router, app: App) {
    let mut closing = app.closing();
    let slots = Arc::new(Semaphore::new(app.limits.max_connections));
    let clients = Arc::new(Clients::default());
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            let slot = slots.clone().acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            next = next => next,
            _ = closing.wait_for(|closes| *closes) => break,
        };
        while connections.try_join_next().is_some() {}
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        // A client that has enough keeps no other out.
        let max = app.limits.max_connections_per_client;
        let counted = (max > 0).then(|| clients.try_count(peer.ip(), max));
        if let Some(None) = counted {
            tracing::debug!(%peer, max, "a client has as many connections as it may");
            continue;
        }
        let connection = graceful.watch(connection(stream, peer, router.clone(), &app.limits));
        connections.spawn(async move {
            let _kept = (slot, counted);
            if let Err(error) = connection.await {
                tracing::debug!(%peer, %error, "a connection ended");
            }
        });
    }
    drop(listener);
    let drain = app.limits.drain_timeout;
    if tokio::time::timeout(drain, graceful.shutdown()).await.is_err() {
        tracing::warn!(?drain, open = connections.len(), "requests are cut off");
    }
    connections.shutdown().await;
}

/// One connection, which ends when its peer stands still or takes too little.
fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    limits: &Limits,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = hyper::Error> + 'static {
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(limits.write_timeout));
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        let router = router.clone();
        async move { Ok::<_, Infallible>(answer(router, request.map(axum::body::Body::new)).await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_header_size(limits.max_headers as usize)
        .max_headers(HEADERS_MAX)
        // Else it takes several windows of a stream before its client has read the first.
        .max_buf_size(BUFFER.max(limits.max_headers as usize))
        .serve_connection(TokioIo::new(Paced::new(Box::pin(stream), limits)), service)
}

async fn answer(router: Router, request: Request) -> axum::response::Response {
    match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
