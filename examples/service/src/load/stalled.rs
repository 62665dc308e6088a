//! Clients that ask and do not read.
//!
//! Invariant: each has seen the status of its answer, 200, and takes no byte more. One that the
//! service cuts off asks anew, and so does each before a service does that by its default: their
//! number stays as it is for as long as a load runs. Called by `run`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Method;
use futures::{StreamExt, TryStreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{Http, Load};

/// What they ask for: more than sockets take in, in bytes.
const LEN: usize = 16 << 20;
/// How many ask at once at the start.
const OPENING_MAX: usize = 32;
/// How long the status of an answer may take.
const ANSWERS: Duration = Duration::from_secs(60);
/// The longest line with a status, in bytes.
const STATUS_LEN_MAX: usize = 128;
/// After this time a client asks anew: a service cuts it off, after 30 s by default.
const RENEWED: Duration = Duration::from_secs(20);
/// How often a client looks whether it was cut off.
const LOOKS: Duration = Duration::from_millis(500);
/// How long a reset takes at most on the way back.
const RESET: Duration = Duration::from_millis(50);

/// Clients that do not read.
#[derive(Debug)]
pub struct Stalled {
    clients: JoinSet<bool>,
    ends: watch::Sender<bool>,
    cut_off: Arc<AtomicU64>,
}

impl Stalled {
    /// Stores a large object and lets `load.stalled` clients ask for it.
    ///
    /// # Errors
    ///
    /// Why they could not.
    pub async fn open(http: &Http, load: &Load) -> Result<Stalled, String> {
        let stalled = Stalled {
            clients: JoinSet::new(),
            ends: watch::Sender::new(false),
            cut_off: Arc::default(),
        };
        if load.stalled == 0 {
            return Ok(stalled);
        }
        let path = format!("/objects/load/{}/stalled", load.seed);
        let put = http.send(Method::PUT, &path, &[], Body::from(vec![7; LEN])).await;
        let put = put.map_err(|lost| lost.to_string())?;
        if !put.status.is_success() {
            return Err(format!("{path}: {}", put.status));
        }
        let host = load.base.trim_start_matches("http://").trim_end_matches('/');
        let request = Arc::new(Ask { host: host.to_owned(), path });
        let asked = futures::stream::iter((0..load.stalled).map(|_| request.open()));
        let opened: Vec<_> = asked.buffer_unordered(OPENING_MAX).try_collect().await?;
        Ok(opened.into_iter().enumerate().fold(stalled, |mut all, (number, connection)| {
            // Not all at one moment.
            let age = RENEWED.mul_f64(number as f64 / load.stalled as f64 / 2.0);
            let client = Client { ask: request.clone(), cut_off: all.cut_off.clone(), age };
            all.clients.spawn(client.run(connection, all.ends.subscribe()));
            all
        }))
    }

    /// How often the service cut one off, as far as they have seen.
    pub fn cut_off(&self) -> u64 {
        self.cut_off.load(Ordering::Relaxed)
    }

    /// Ends them. How many the service was still answering.
    pub async fn end(mut self) -> usize {
        self.ends.send_replace(true);
        let mut live = 0;
        while let Some(ended) = self.clients.join_next().await {
            live += usize::from(ended.unwrap_or(false));
        }
        live
    }
}

/// What each of them asks.
#[derive(Debug)]
struct Ask {
    host: String,
    path: String,
}

impl Ask {
    /// A connection on which the request is being answered.
    ///
    /// # Errors
    ///
    /// Why not, such as a status other than 200.
    async fn open(&self) -> Result<TcpStream, String> {
        let Ask { host, path } = self;
        let connection = TcpStream::connect(host).await;
        let mut connection = connection.map_err(|error| error.to_string())?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n");
        let sent = connection.write_all(request.as_bytes()).await;
        sent.map_err(|error| error.to_string())?;
        let status = tokio::time::timeout(ANSWERS, status_line(&mut connection)).await;
        let status = status.map_err(|_| format!("{path}: no answer"))?;
        let status = status.map_err(|error| format!("{path}: {error}"))?;
        if status.split(' ').nth(1) != Some("200") {
            return Err(format!("a client that is not to read got {status:?} for {path}"));
        }
        Ok(connection)
    }
}

/// The first line of an answer; nothing behind it is taken.
async fn status_line(connection: &mut TcpStream) -> std::io::Result<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") && line.len() < STATUS_LEN_MAX {
        line.push(connection.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

/// One client, for as long as the load runs.
struct Client {
    ask: Arc<Ask>,
    cut_off: Arc<AtomicU64>,
    /// How old its first connection is taken to be.
    age: Duration,
}

impl Client {
    /// Whether it was being answered at the end.
    async fn run(self, mut connection: TcpStream, mut ends: watch::Receiver<bool>) -> bool {
        let mut opened = Instant::now();
        let mut age = self.age;
        while tokio::time::timeout(LOOKS, ends.wait_for(|ends| *ends)).await.is_err() {
            let is_live = is_live(&mut connection).await;
            if is_live && opened.elapsed() + age < RENEWED {
                continue;
            }
            self.cut_off.fetch_add(u64::from(!is_live), Ordering::Relaxed);
            // One that is refused, as by a busy service, asks again at the next look.
            if let Ok(another) = self.ask.open().await {
                connection = another;
                opened = Instant::now();
                age = Duration::ZERO;
            }
        }
        is_live(&mut connection).await
    }
}

/// Whether the service still has this connection. With a full window no end of it can come through,
/// but what is sent to a connection that was closed is answered with a reset.
async fn is_live(connection: &mut TcpStream) -> bool {
    // An empty line before the next request, which a server skips.
    if connection.write_all(b"\r\n").await.is_err() {
        return false;
    }
    tokio::time::sleep(RESET).await;
    matches!(connection.take_error(), Ok(None)) && connection.write_all(b"\r\n").await.is_ok()
}
