//! Scenario 24 further, and the seed's P12, P16 and P20: how stores end, and what a damaged or full
//! file does to them.

use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use vmem::{VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_io::DATA_FILE;

use crate::support::process::{CHILD_DIR, child};
use crate::support::{self, DISK, HOST, KIB, MIB, bytes, put_all};
use crate::support::{eventually, quiet, real_config};

const LEN: usize = 64 * KIB;

/// Fails the test, instead of hanging it, where something does not end.
async fn ends<F: Future>(what: &str, future: F) -> F::Output {
    let ended = tokio::time::timeout(Duration::from_secs(60), future).await;
    ended.unwrap_or_else(|_| panic!("{what} does not end"))
}

/// Every kind of call, over and over, until the store says that it is closed.
async fn until_closed(vmem: VirtualMemory, handles: Arc<Vec<VMemHandle>>, salt: usize) -> u64 {
    for n in salt.. {
        let handle = &handles[n * 7 % handles.len()];
        let mut buf = [0; 16];
        let outcome = match n % 12 {
            0 => vmem.write(handle, vec![n as u8; handle.len()]).await,
            1 => vmem.write_at(handle, 3, [1, 2, 3]).await,
            2 => vmem.write_with(handle, |buf| buf.fill(9)).await,
            3 => vmem.read(handle).await.map(drop),
            4 => vmem.read_at(handle, 1..9).await.map(drop),
            5 => vmem.read_into(handle, 0..16, &mut buf).await,
            6 => vmem.read_many(&handles[..3]).await.map(drop),
            7 => vmem.demote(handle, DISK).await,
            8 => vmem.promote(handle, HOST).await,
            9 => vmem.prefetch(handle, HOST).await,
            10 => vmem.put(vec![1; 5000], DISK).await.map(drop),
            _ => vmem.pin(handle, HOST).await.map(drop),
        };
        match outcome {
            Ok(()) | Err(VirtualMemoryError::Pinned { .. }) => {}
            Err(VirtualMemoryError::Closed) => return n as u64,
            Err(error) => panic!("neither done nor closed: {error:?}"),
        }
    }
    unreachable!("the numbers do not end")
}

/// Excluded: two callers that close at once and wait for each other; calls in every state at the
/// moment of the end that hang, or end with something else. Several rounds, since each meets other
/// states.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_24_two_clones_close_during_every_call() {
    for round in 0..8 {
        let dir = tempfile::tempdir().unwrap();
        let vmem = vmem::open(real_config(dir.path(), 2 * MIB, 64 * MIB)).await.unwrap();
        let handles = Arc::new(put_all(&vmem, 60, LEN, HOST).await);
        let held = vmem.read(&handles[7]).await.unwrap();
        let before = held.to_vec();
        let callers: Vec<_> = (0..24)
            .map(|n| tokio::spawn(until_closed(vmem.clone(), handles.clone(), n * 5)))
            .collect();
        tokio::time::sleep(Duration::from_millis(5 * round)).await;
        let one = vmem.clone();
        let other = vmem.clone();
        let (first, second) =
            ends("close", async { tokio::join!(one.close(), other.close()) }).await;
        let results = [first, second];
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
        assert!(
            results.iter().any(|result| matches!(result, Err(VirtualMemoryError::Closed))),
            "{results:?}"
        );
        for caller in callers {
            ends("a call", caller).await.unwrap();
        }
        assert!(before == held, "bytes stay what they were");
        // Handles and bytes live on; the directory is free nevertheless.
        let again = vmem::open(real_config(dir.path(), 2 * MIB, 64 * MIB)).await.unwrap();
        again.close().await.unwrap();
        assert!(before == held);
    }
}

/// Excluded: a store that lives on because handles or bytes of it do, or that dies under them. The
/// last clone is dropped with handles, bytes, pins, a prefetch, a stream and a blocked reader
/// outstanding.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_24_the_store_is_dropped_while_handles_and_bytes_live() {
    let dir = tempfile::tempdir().unwrap();
    let vmem = vmem::open(real_config(dir.path(), 2 * MIB, 64 * MIB)).await.unwrap();
    let handles = put_all(&vmem, 60, LEN, HOST).await;
    let bytes_held = vmem.read(&handles[59]).await.unwrap();
    let pin = vmem.pin(&handles[58], HOST).await.unwrap();
    let prefetch = vmem.prefetch_many(&handles, HOST);
    let mut events = Box::pin(vmem.migrations());
    drop(vmem);
    let ended = ends("a prefetch of a store that is gone", prefetch).await;
    assert!(matches!(ended, Ok(()) | Err(VirtualMemoryError::Closed)), "{ended:?}");
    ends("the stream", async { while futures::StreamExt::next(&mut events).await.is_some() {} })
        .await;
    let mut again = None;
    ends("the directory is given back", async {
        while again.is_none() {
            again = match vmem::open(real_config(dir.path(), 2 * MIB, 64 * MIB)).await {
                Ok(store) => Some(store),
                Err(VirtualMemoryError::InUse { .. }) => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    None
                }
                Err(error) => panic!("{error:?}"),
            };
        }
    })
    .await;
    let again = again.unwrap();
    // A handle of the store that is gone says nothing to its successor.
    let stale = again.read(&handles[0]).await;
    assert!(matches!(stale, Err(VirtualMemoryError::HandleNotFound { .. })), "{stale:?}");
    assert!(bytes_held == bytes(60, 1, LEN));
    drop((handles, pin));
    assert!(bytes_held == bytes(60, 1, LEN));
    again.close().await.unwrap();
}

/// Excluded: a store that hangs its callers once the runtime it was opened in is gone. On another
/// runtime what is resident is still served, and everything else says `Closed`.
#[test]
fn scenario_24_calls_on_another_runtime_after_the_first_has_gone() {
    let dir = tempfile::tempdir().unwrap();
    let first = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (vmem, handles) = first.block_on(async {
        let vmem = vmem::open(real_config(dir.path(), 2 * MIB, 64 * MIB)).await.unwrap();
        let handles = put_all(&vmem, 60, LEN, HOST).await;
        let handles = Arc::new(handles);
        for salt in 0..8 {
            drop(tokio::spawn(until_closed(vmem.clone(), handles.clone(), salt)));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        (vmem, handles)
    });
    first.shutdown_timeout(Duration::from_secs(20));
    let second = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    second.block_on(async {
        for handle in handles.iter() {
            let read = ends("a read", vmem.read(handle)).await;
            assert!(matches!(read, Ok(_) | Err(VirtualMemoryError::Closed)), "{read:?}");
            for moved in [
                ends("demote", vmem.demote(handle, DISK)).await,
                ends("promote", vmem.promote(handle, HOST)).await,
                ends("prefetch", vmem.prefetch(handle, HOST)).await,
            ] {
                assert!(matches!(moved, Ok(()) | Err(VirtualMemoryError::Closed)), "{moved:?}");
            }
        }
        let put = ends("put", vmem.put(vec![1; MIB], HOST)).await;
        assert!(put.is_ok() || matches!(put, Err(VirtualMemoryError::Closed)), "{put:?}");
        drop(put);
        let closed = ends("close", vmem.close()).await;
        assert!(matches!(closed, Ok(()) | Err(VirtualMemoryError::Closed)), "{closed:?}");
        drop(handles);
        let again = vmem::open(real_config(dir.path(), 2 * MIB, 64 * MIB)).await.unwrap();
        again.close().await.unwrap();
    });
}

/// The child of the next test: holds the store until a message lets it go.
#[tokio::test]
#[ignore = "plays the child of scenario_24_another_process"]
async fn child_that_lets_go() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let vmem = vmem::open(real_config(dir.as_ref(), MIB, 64 * MIB)).await.unwrap();
    println!("\nopen");
    std::io::stdin().lines().next();
    vmem.close().await.unwrap();
    println!("\nclosed");
    std::io::stdin().lines().next();
}

/// The lock is of the store, not of the process: closed by a process that lives on, it is free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_24_another_process_has_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = child(module_path!(), "child_that_lets_go", dir.path());
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line == "open"), "the child ended early");
    let refused = vmem::open(real_config(dir.path(), MIB, 64 * MIB)).await;
    match &refused {
        Err(error @ VirtualMemoryError::InUse { pid, .. }) => {
            assert_eq!(*pid, Some(process.id()));
            assert!(error.is_retryable());
            assert!(error.to_string().contains(&process.id().to_string()), "{error}");
        }
        other => panic!("{other:?}"),
    }
    let mut input = process.stdin.take().unwrap();
    input.write_all(b"\n").unwrap();
    assert!(lines.any(|line| line == "closed"), "the child ended early");
    let vmem = vmem::open(real_config(dir.path(), MIB, 64 * MIB)).await.unwrap();
    vmem.close().await.unwrap();
    input.write_all(b"\n").unwrap();
    assert!(process.wait().unwrap().success());
}

/// The seed's P12: a truncated file gave `Ok` with half of the bytes. Here it is `Corrupt` for the
/// objects that lost theirs, again and again without a read, until each is written whole; others do
/// not notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_26_p12_a_truncated_file() {
    let dir = tempfile::tempdir().unwrap();
    let vmem = vmem::open(real_config(dir.path(), 2 * MIB, 64 * MIB)).await.unwrap();
    let handles = put_all(&vmem, 40, LEN, DISK).await;
    for handle in &handles {
        vmem.demote(handle, DISK).await.unwrap();
    }
    let file = std::fs::OpenOptions::new().write(true).open(dir.path().join(DATA_FILE)).unwrap();
    let half = file.metadata().unwrap().len() / 2 + 1000;
    file.set_len(half).unwrap();
    let mut lost = Vec::new();
    for (at, handle) in handles.iter().enumerate() {
        let mut read = vec![0; LEN];
        match vmem.read_into(handle, 0..LEN, &mut read).await {
            Ok(()) => assert!(read == bytes(at as u64 + 1, 1, LEN), "object {at}"),
            Err(VirtualMemoryError::Corrupt { handle: id, .. }) => {
                assert_eq!(id, handle.id());
                lost.push((at, handle));
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    assert!((10..30).contains(&lost.len()), "{} of 40 were cut off", lost.len());
    // What is missing comes back as zeros: still not what was written.
    file.set_len(half * 2).unwrap();
    for (at, handle) in lost {
        for _ in 0..2 {
            let read = vmem.read(handle).await;
            assert!(matches!(read, Err(VirtualMemoryError::Corrupt { .. })), "{read:?}");
        }
        let part = vmem.write_at(handle, 5, [1]).await;
        assert!(matches!(part, Err(VirtualMemoryError::Corrupt { .. })), "{part:?}");
        vmem.write(handle, bytes(at as u64 + 1, 2, LEN)).await.unwrap();
        assert!(vmem.read(handle).await.unwrap() == bytes(at as u64 + 1, 2, LEN));
    }
    drop(handles);
    support::assert_empty(&quiet(&vmem).await, "a truncated file");
    vmem.close().await.unwrap();
}

/// The seed's P16: a reader of an object that is moved all the time got `HandleNotFound`, and the
/// mover starved. Readers in every way beside a mover: each sees the bytes, and both sides get on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_26_p16_readers_beside_a_mover() {
    let dir = tempfile::tempdir().unwrap();
    let vmem = vmem::open(real_config(dir.path(), 2 * MIB, 64 * MIB)).await.unwrap();
    let handle = vmem.put(bytes(1, 1, 3 * LEN), HOST).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicU64::new(0));
    let readers: Vec<_> = (0..4)
        .map(|way| {
            let vmem = vmem.clone();
            let handle = handle.clone();
            let stop = stop.clone();
            let reads = reads.clone();
            tokio::spawn(async move {
                let expected = bytes(1, 1, 3 * LEN);
                let mut buf = vec![0; 3 * LEN];
                while !stop.load(Ordering::Relaxed) {
                    match way {
                        0 => assert!(vmem.read(&handle).await.unwrap() == expected),
                        1 => {
                            let read = vmem.read_at(&handle, 60_000..70_000).await.unwrap();
                            assert!(read == expected[60_000..70_000]);
                        }
                        2 => {
                            vmem.read_into(&handle, 0..3 * LEN, &mut buf).await.unwrap();
                            assert!(buf == expected);
                        }
                        _ => {
                            let many = [handle.clone(), handle.clone()];
                            for read in vmem.read_many(&many).await.unwrap() {
                                assert!(read == expected);
                            }
                        }
                    }
                    reads.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for _ in 0..200 {
        ends("demote", vmem.demote(&handle, DISK)).await.unwrap();
        ends("promote", vmem.promote(&handle, HOST)).await.unwrap();
    }
    eventually("readers get on", || reads.load(Ordering::Relaxed) > 100).await;
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.await.unwrap();
    }
    drop(handle);
    support::assert_empty(&quiet(&vmem).await, "readers and a mover");
    vmem.close().await.unwrap();
}
