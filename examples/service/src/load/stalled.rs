//! Clients that ask and do not read.
//!
//! Invariant: each has sent its request, and takes no byte until it is dropped.

use axum::body::Body;
use axum::http::Method;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::{Http, Load};

/// What they ask for: more than sockets take in, in bytes.
const LEN: usize = 16 << 20;

/// Clients that do not read.
#[derive(Debug)]
pub struct Stalled {
    _connections: Vec<TcpStream>,
}

impl Stalled {
    /// Stores a large object and lets `load.stalled` clients ask for it.
    ///
    /// # Errors
    ///
    /// Why they could not.
    pub async fn open(http: &Http, load: &Load) -> Result<Stalled, String> {
        let mut connections = Vec::new();
        if load.stalled > 0 {
            let path = format!("/objects/load/{}/stalled", load.seed);
            let put = http.send(Method::PUT, &path, &[], Body::from(vec![7; LEN])).await;
            let put = put.map_err(|lost| lost.to_string())?;
            if !put.status.is_success() {
                return Err(format!("{path}: {}", put.status));
            }
            let host = load.base.trim_start_matches("http://").trim_end_matches('/');
            let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n");
            for _ in 0..load.stalled {
                let connection = TcpStream::connect(host).await;
                let mut connection = connection.map_err(|error| error.to_string())?;
                let sent = connection.write_all(request.as_bytes()).await;
                sent.map_err(|error| error.to_string())?;
                connections.push(connection);
            }
        }
        Ok(Stalled { _connections: connections })
    }
}
