//! The routes: what they answer, what they refuse, and that nothing runs while nobody listens.
//!
//! Invariant: over a real store and a real socket of the loopback interface, spoken to in plain
//! HTTP, as any client would.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vmem::{MemoryTier, VirtualMemory, VirtualMemoryConfig};
use vmem_dashboard::LISTENERS_MAX;

const HANG: Duration = Duration::from_secs(60);

async fn store() -> VirtualMemory {
    let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(4 << 20);
    vmem::open(config.build().unwrap()).await.unwrap()
}

/// A server over this store, on a port of its own.
async fn serve(vmem: &VirtualMemory) -> SocketAddr {
    let server = vmem_dashboard::serve(vmem.clone(), ([127, 0, 0, 1], 0)).await.unwrap();
    let address = server.address();
    tokio::spawn(server.run());
    address
}

/// What is answered to this, up to where the server closes the connection.
async fn ask(address: SocketAddr, method: &str, path: &str, headers: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let host =
        if headers.contains("host:") { String::new() } else { format!("host: {address}\r\n") };
    let request = format!("{method} {path} HTTP/1.1\r\n{host}{headers}connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let reading = stream.read_to_string(&mut answer);
    tokio::time::timeout(HANG, reading).await.expect("answered").unwrap();
    answer
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

/// A page that listens, and the first lines that it got.
async fn listen(address: SocketAddr) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET /stream HTTP/1.1\r\nhost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    // The first snapshot comes at once, an error comes whole.
    while !answer.contains("\n\n") && !answer.contains("listen already") {
        answer += &more(&mut stream).await;
    }
    (stream, answer)
}

async fn more(stream: &mut TcpStream) -> String {
    let mut buf = vec![0; 64 << 10];
    let read = tokio::time::timeout(HANG, stream.read(&mut buf)).await.expect("news").unwrap();
    assert!(read > 0, "the stream goes on");
    String::from_utf8_lossy(&buf[..read]).into_owned()
}

#[tokio::test]
async fn snapshot_has_the_figures_of_the_store() {
    let vmem = store().await;
    let handle = vmem.put(vec![1; 100_000], MemoryTier::Disk).await.unwrap();
    vmem.read(&handle).await.unwrap();
    let address = serve(&vmem).await;
    let answer = ask(address, "GET", "/snapshot", "").await;
    assert_eq!(status(&answer), 200);
    assert!(answer.contains("content-type: application/json"), "{answer}");
    let json: serde_json::Value = serde_json::from_str(body(&answer)).unwrap();
    let tiers = json["tiers"].as_array().unwrap();
    let disk = tiers.iter().find(|tier| tier["tier"] == "disk").unwrap();
    assert_eq!(disk["used"], vmem.stats().disk.used_bytes);
    assert_eq!(json["reads"]["misses"], 1);
    let slow = &json["slowest"][0];
    assert_eq!((&slow["handle"], &slow["tier"]), (&handle.id().into(), &"disk".into()));
    let stages = slow["stages"].as_object().unwrap().values();
    let sum: u64 = stages.map(|stage| stage.as_u64().unwrap()).sum();
    assert!(sum <= slow["total"].as_u64().unwrap());
    let latency = &json["latencies"][0];
    assert_eq!((&latency["tier"], &latency["all"]["count"]), (&"disk".into(), &1.into()));
    assert!(!body(&answer).contains("\\u0001"), "no bytes of objects");
    drop(handle);
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn page_comes_with_a_policy_that_lets_nothing_else_in() {
    let vmem = store().await;
    let answer = ask(serve(&vmem).await, "GET", "/", "").await;
    assert_eq!(status(&answer), 200);
    let policy = answer.lines().find(|line| line.starts_with("content-security-policy: ")).unwrap();
    assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"));
    assert!(policy.contains("script-src 'sha256-") && !policy.contains("unsafe"), "{policy}");
    assert!(answer.contains("x-content-type-options: nosniff"));
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn changes_and_foreign_pages_are_refused() {
    let vmem = store().await;
    let address = serve(&vmem).await;
    for path in ["/", "/stream", "/snapshot"] {
        for method in ["POST", "PUT", "DELETE", "PATCH"] {
            let answer = ask(address, method, path, "content-length: 0\r\n").await;
            assert_eq!(status(&answer), 405, "{method} {path}");
        }
        for headers in [
            "origin: http://evil.example\r\n",
            "origin: null\r\n",
            "sec-fetch-site: cross-site\r\nsec-fetch-mode: cors\r\n",
            // A name that was made to lead here.
            "host: evil.example\r\n",
            "host: evil.example\r\norigin: http://evil.example\r\n",
        ] {
            let answer = ask(address, "GET", path, headers).await;
            assert_eq!(status(&answer), 403, "{headers} {path}");
            assert!(!answer.contains("tiers"), "{headers} {path}");
        }
    }
    let own = format!("origin: http://{address}\r\n");
    assert_eq!(status(&ask(address, "GET", "/snapshot", &own).await), 200);
    assert_eq!(status(&ask(address, "GET", "/../etc/passwd", "").await), 404);
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn stream_sends_a_snapshot_a_second_and_listeners_are_bounded() {
    let vmem = store().await;
    let address = serve(&vmem).await;
    let mut listeners = Vec::new();
    for _ in 0..LISTENERS_MAX {
        let (stream, first) = listen(address).await;
        assert!(first.contains("text/event-stream") && first.contains("data: {"), "{first}");
        listeners.push(stream);
    }
    let (_refused, answer) = listen(address).await;
    assert_eq!(status(&answer), 503);
    assert!(answer.contains("retry-after"), "{answer}");
    // News without a request, for each.
    for stream in [0, LISTENERS_MAX - 1] {
        let mut heard = String::new();
        while heard.matches("data: {").count() < 2 {
            heard += &more(&mut listeners[stream]).await;
        }
    }
    // One that leaves makes space for another.
    listeners.clear();
    let again = async {
        loop {
            let (_stream, answer) = listen(address).await;
            if status(&answer) == 200 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(HANG, again).await.expect("places come back");
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn nothing_runs_while_nobody_listens() {
    let vmem = store().await;
    let address = serve(&vmem).await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let (stream, _) = listen(address).await;
    assert!(tasks() > before, "a task takes snapshots");
    drop(stream);
    let idle = async {
        while tasks() > before {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(HANG, idle).await.expect("it ends when nobody listens");
    // And begins again.
    let (_stream, first) = listen(address).await;
    assert!(first.contains("data: {"));
    vmem.close().await.unwrap();
}
