//! A service on a port of its own, over a directory of its own.
//!
//! Invariant: no test shares either with another.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use axum::Router;
use axum::body::Body;
use axum::http::{Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vmem::VirtualMemoryConfig;
use vmem_service::load::{Answer, Http};
use vmem_service::{Config, Service};

/// A service with a client of it.
pub(crate) struct Served {
    pub(crate) service: Service,
    pub(crate) http: Http,
    _directory: Option<TempDir>,
}

/// A configuration over this directory, small and on any port.
pub(crate) fn config(directory: &Path) -> Config {
    let store = VirtualMemoryConfig::builder()
        .disk_path(directory.join("store"))
        .host_capacity(8 << 20)
        .disk_capacity(256 << 20)
        .gpu(vmem::GpuSelection::Off);
    let mut config = Config { store: store.build().unwrap(), ..Config::default() };
    config.listen = ([127, 0, 0, 1], 0).into();
    config
}

impl Served {
    /// Starts one with the configuration that `change` leaves.
    pub(crate) async fn start(change: impl FnOnce(&mut Config)) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        change(&mut config);
        Served { _directory: Some(directory), ..Served::over(config).await }
    }

    /// Starts one over a directory of the caller's.
    pub(crate) async fn over(config: Config) -> Served {
        let service = Service::start(config, |_| Router::new()).await.unwrap();
        let http = Http::new(&format!("http://{}", service.local_addr()));
        Served { service, http, _directory: None }
    }

    /// A request without a body.
    pub(crate) async fn ask(&self, method: Method, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.http.send(method, path, headers, Body::empty()).await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.ask(Method::GET, path, headers).await
    }

    pub(crate) async fn put(&self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        // The client leaves it out where it is 0.
        let len = body.len().to_string();
        let headers = [headers, &[("content-length", &len)]].concat();
        self.http.send(Method::PUT, path, &headers, Body::from(body.to_vec())).await.unwrap()
    }

    /// A PUT of nine bytes to `slow`, which is being served and of which none was sent.
    pub(crate) async fn unfinished_put(&self) -> TcpStream {
        self.unfinished_put_to("/objects/slow", &[("content-length", "9")]).await
    }

    /// A PUT that is being served, and of whose body nothing was sent.
    pub(crate) async fn unfinished_put_to(
        &self,
        path: &str,
        headers: &[(&str, &str)],
    ) -> TcpStream {
        let mut raw = TcpStream::connect(self.service.local_addr()).await.unwrap();
        let mut head =
            format!("PUT {path} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += "\r\n";
        raw.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 25];
        raw.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 100 Continue\r\n\r\n");
        raw
    }

    /// Stores an object and returns its ETag.
    pub(crate) async fn stored(&self, path: &str, body: &[u8]) -> String {
        let answer = self.put(path, &[], body).await;
        assert!(answer.status.is_success(), "{answer:?}");
        answer.header("etag").to_owned()
    }

    /// Ends it; nothing may be left to flush.
    pub(crate) async fn stop(self) {
        self.service.shutdown().await.unwrap();
    }
}

/// The real program, which is killed if it is left alone.
pub(crate) struct Program {
    pub(crate) child: Child,
    pub(crate) base: String,
}

impl Program {
    pub(crate) fn start(directory: &Path) -> Program {
        Program::with(directory, |_| {})
    }

    /// Starts it with what `change` sets besides.
    pub(crate) fn with(directory: &Path, change: impl FnOnce(&mut Command)) -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmem-service"));
        command
            .env("VMEM_SERVICE_LISTEN", "127.0.0.1:0")
            .env("VMEM_SERVICE_STORE__DISK_PATH", directory.join("store"))
            .env("VMEM_SERVICE_STORE__HOST_CAPACITY", "8MiB")
            .env("VMEM_SERVICE_STORE__DISK_CAPACITY", "256MiB")
            .env("VMEM_SERVICE_STORE__GPU", "off")
            .env("RUST_LOG", "warn")
            .stdout(Stdio::piped());
        change(&mut command);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let base = line.trim().strip_prefix("listening on ").expect(&line).to_owned();
        Program { child, base }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), signal).unwrap();
    }

    pub(crate) fn end(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.child.wait().unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends text, and reads until the end of the connection.
pub(crate) async fn exchange(served: &Served, text: &str) -> String {
    let mut raw = TcpStream::connect(served.service.local_addr()).await.unwrap();
    raw.write_all(text.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    raw.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// The body as JSON.
pub(crate) fn json(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

/// An error has its status, its code, and says why.
pub(crate) fn expect_error(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.status, StatusCode::from_u16(status).unwrap(), "{answer:?}");
    assert_eq!(answer.header("content-type"), "application/json");
    let body = json(answer);
    assert_eq!(body["code"], code);
    assert!(body["message"].as_str().unwrap().len() > 10, "{body}");
    assert!(!answer.header("x-request-id").is_empty());
}
