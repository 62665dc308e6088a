//! Connections: how many, and how long without a request.
//!
//! No test asserts how long anything takes: a test that hangs is ended by `BOUND`.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::limits::{BOUND, connect, rest};
use crate::support::Served;

#[tokio::test]
async fn headers_that_do_not_come_end_the_connection() {
    let served =
        Served::start(|config| config.limits.header_timeout = Duration::from_millis(200)).await;
    let half = connect(&served, "GET /objects/a HTTP/1.1\r\nho").await;
    let silent = connect(&served, "").await;
    futures::join!(rest(half), rest(silent));
    served.stop().await;
}

/// One address with connections that say nothing does not keep the others out.
#[tokio::test]
async fn client_has_so_many_connections_at_once() {
    let served = Served::start(|config| {
        config.limits.max_connections = 4;
        config.limits.max_connections_per_client = 3;
    })
    .await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(connect_from(&served, 2).await);
    }
    let more = connect_from(&served, 2).await;
    assert_eq!(rest(more).await, "");
    assert_eq!(served.get("/healthz", &[]).await.status, 200, "another client is served");
    drop(silent.pop());
    // Its place is free once the service has seen that.
    let again = async {
        loop {
            let mut one = connect_from(&served, 2).await;
            let get = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
            if one.write_all(get).await.is_ok() && rest(one).await.starts_with("HTTP/1.1 200") {
                break;
            }
        }
    };
    timeout(BOUND, again).await.expect("it is served again");
    served.stop().await;
}

/// A connection of 127.0.0.`address`.
pub(crate) async fn connect_from(served: &Served, address: u8) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, address], 0).into()).unwrap();
    socket.connect(served.service.local_addr()).await.unwrap()
}
