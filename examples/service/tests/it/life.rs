//! Restart, shutdown, and `kill -9` of the real program.
//!
//! Invariant: what the service acknowledged is there for the next process, whole. Ten kills by
//! default; `VMEM_KILLS=100` for more.

use std::process::Stdio;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vmem_service::load::{Http, Load, Worker};

use crate::support::{Program, Served, config};

#[tokio::test]
async fn objects_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let large: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 253) as u8).collect();
    let served = Served::over(config(directory.path())).await;
    let headers = [("content-type", "text/plain"), ("x-object-meta-a", "b")];
    served.put("/objects/small", &headers, b"small").await;
    let tag = served.stored("/objects/large", &large).await;
    served.stop().await;

    let served = Served::over(config(directory.path())).await;
    let small = served.get("/objects/small", &[]).await;
    assert_eq!((&small.body[..], small.header("x-object-meta-a")), (&b"small"[..], "b"));
    assert_eq!(small.header("content-type"), "text/plain");
    let get = served.get("/objects/large", &[]).await;
    assert!(get.body == large && get.header("etag") == tag, "{:?}", get.headers);
    served.stop().await;
}

#[tokio::test]
async fn shutdown_lets_requests_in_flight_end() {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::over(config(directory.path())).await;
    let address = served.service.local_addr();
    let mut raw = served.unfinished_put().await;
    let ending = tokio::spawn(served.stop());
    while TcpStream::connect(address).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    raw.write_all(b"nine char").await.unwrap();
    let mut answer = String::new();
    raw.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
    ending.await.unwrap();
    let served = Served::over(config(directory.path())).await;
    assert_eq!(&served.get("/objects/slow", &[]).await.body[..], b"nine char");
    served.stop().await;
}

#[tokio::test]
async fn shutdown_cuts_off_requests_at_its_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let mut short = config(directory.path());
    short.limits.drain_timeout = Duration::from_millis(200);
    let served = Served::over(short).await;
    let mut raw = served.unfinished_put().await;
    served.stop().await;
    let mut answer = String::new();
    let _ = raw.read_to_string(&mut answer).await;
    assert_eq!(answer, "");
    let served = Served::over(config(directory.path())).await;
    assert_eq!(served.get("/objects/slow", &[]).await.status, 404);
    served.stop().await;
}

/// A drain is as long as its requests, and the second signal was not looked at.
#[tokio::test(flavor = "multi_thread")]
async fn second_signal_ends_a_drain_at_once() {
    for second in [Signal::TERM, Signal::INT] {
        let directory = tempfile::tempdir().unwrap();
        let mut program = Program::with(directory.path(), |command| {
            // Far longer than a test may take.
            command.env("VMEM_SERVICE_LIMITS__DRAIN_TIMEOUT", "100000s").stderr(Stdio::null());
        });
        let address = program.base.strip_prefix("http://").unwrap().to_owned();
        let mut raw = TcpStream::connect(&address).await.unwrap();
        let put = "PUT /objects/slow HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n";
        raw.write_all(format!("{put}content-length: 9\r\n\r\n").as_bytes()).await.unwrap();
        raw.read_exact(&mut [0; 25]).await.unwrap();
        program.signal(Signal::TERM);
        while TcpStream::connect(&address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(program.child.try_wait().unwrap(), None, "it waits for the request");
        program.signal(second);
        let ended = async {
            loop {
                if let Some(status) = program.child.try_wait().unwrap() {
                    break status;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let status = tokio::time::timeout(crate::limits::BOUND, ended).await.expect("it ends");
        assert_eq!(status.code(), Some(1));
    }
}

fn workers(base: &str, count: usize, seed: u64) -> Vec<Worker> {
    let load = Load {
        base: base.to_owned(),
        clients: count,
        objects: 4,
        max_len: 300_000,
        stalled: 0,
        time: Duration::ZERO,
        seed,
    };
    (0..count).map(|number| Worker::new(Http::new(base), number, &load)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn program_ends_by_a_signal_with_everything_durable() {
    let directory = tempfile::tempdir().unwrap();
    let mut program = Program::start(directory.path());
    let mut worker = workers(&program.base, 1, 1).remove(0);
    for _ in 0..100 {
        worker.step().await.unwrap();
    }
    assert!(program.end(Signal::TERM).success());
    let program = Program::start(directory.path());
    worker.http = Http::new(&program.base);
    worker.check_all().await;
    assert!(worker.report.wrong.is_empty(), "{}", worker.report);
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_puts_survive_kills() {
    let kills: u64 = std::env::var("VMEM_KILLS").map_or(10, |text| text.parse().unwrap());
    let seed = std::env::var("VMEM_SEED")
        .map_or_else(|_| uuid::Uuid::new_v4().as_u128() as u64 >> 24, |text| text.parse().unwrap());
    println!("VMEM_SEED={seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let directory = tempfile::tempdir().unwrap();
    let mut workers = workers("", 8, seed);
    for kill in 0..kills {
        let mut program = Program::start(directory.path());
        let running = workers.into_iter().map(|mut worker| {
            worker.http = Http::new(&program.base);
            tokio::spawn(async move {
                worker.check_all().await;
                while worker.step().await.is_ok() {}
                worker
            })
        });
        let running: Vec<_> = running.collect();
        tokio::time::sleep(Duration::from_millis(rng.random_range(100..600))).await;
        let status = program.end(Signal::KILL);
        assert!(status.code().is_none(), "it was killed, not: {status}");
        workers = Vec::new();
        for worker in running {
            workers.push(worker.await.unwrap());
        }
        let wrong: Vec<_> = workers.iter().flat_map(|worker| &worker.report.wrong).collect();
        // A look at everything that the kill cut off is no fault of the service.
        let wrong: Vec<_> = wrong.iter().filter(|why| !why.contains("cannot be read")).collect();
        assert!(wrong.is_empty(), "kill {kill}: {wrong:?}");
    }
    let program = Program::start(directory.path());
    let mut changes = 0;
    for worker in &mut workers {
        worker.report.wrong.clear();
        worker.http = Http::new(&program.base);
        worker.check_all().await;
        assert!(worker.report.wrong.is_empty(), "{}", worker.report);
        changes += worker.report.requests();
    }
    println!("{kills} kills, {changes} requests: none lost, none torn");
    assert!(changes > 8 * kills, "{changes}");
}
