//! Many tasks at once over a real file, their futures dropped at random, and closed in the middle.
#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use common::{Fault, FaultyFile, SharedFile, eventually, random_bytes, rng};
use futures::FutureExt;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem_core::IoDriver;
use vmem_core::backend::{Durable, Extent, IoBuf, ReadChunk, Tier, TierError};
use vmem_io::driver::{BlockingDriver, BlockingOptions};
use vmem_io::{DiskTier, open_disk};

type Object = (Vec<Arc<Extent>>, Vec<u8>);

async fn put(
    backend: &Arc<dyn Durable>,
    payloads: Vec<Bytes>,
) -> Result<Vec<Arc<Extent>>, TierError> {
    let lens: Vec<u32> = payloads.iter().map(|bytes| bytes.len() as u32).collect();
    let extents = backend.reserve(&lens)?;
    let pieces = extents.into_iter().zip(payloads).collect();
    Ok(backend.write(pieces).await?.into_iter().map(Arc::new).collect())
}

async fn check(backend: &Arc<dyn Durable>, (extents, content): &Object) -> Result<(), TierError> {
    let buf = IoBuf::from_vec(vec![0xaa; content.len()]);
    let (buf, result) = backend.read(ReadChunk::in_sequence(extents.clone()), buf).await;
    result.map(|()| assert!(buf[..] == content[..], "wrong bytes"))
}

/// Runs the future, or drops it after a random moment.
async fn perhaps<T>(rng: &mut SmallRng, future: impl Future<Output = T>) -> Option<T> {
    if rng.random_bool(0.7) {
        return Some(future.await);
    }
    let moment = Duration::from_micros(rng.random_range(0..2000));
    tokio::time::timeout(moment, future).await.ok()
}

async fn work(backend: Arc<dyn Durable>, mut rng: SmallRng, rounds: u32) -> u32 {
    let mut objects: Vec<Object> = Vec::new();
    let mut dropped = 0;
    for _ in 0..rounds {
        let result = if objects.is_empty() || rng.random_bool(0.5) {
            let payloads: Vec<_> = (0..rng.random_range(1..8))
                .map(|_| {
                    let len = rng.random_range(0..=65536);
                    random_bytes(&mut rng, len)
                })
                .collect();
            let content = payloads.concat();
            let written = perhaps(&mut rng, put(&backend, payloads)).await;
            written.map(|result| result.map(|extents| objects.push((extents, content))))
        } else {
            let index = rng.random_range(0..objects.len());
            let result = perhaps(&mut rng, check(&backend, &objects[index])).await;
            if rng.random() {
                objects.swap_remove(index);
            }
            result
        };
        match result {
            None => dropped += 1,
            Some(Ok(())) => {}
            Some(Err(TierError::Full { source: None, .. })) => {
                objects.pop();
            }
            Some(Err(TierError::Closed)) => break,
            Some(Err(error)) => panic!("{error:?}"),
        }
    }
    dropped
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_tasks_drop_futures_and_leak_nothing() {
    let mut rng = rng(6);
    let disk = open_disk(None, Some(12 << 20), IoDriver::Auto, 1 << 20).unwrap();
    let tasks: Vec<_> = (0..8)
        .map(|_| SmallRng::seed_from_u64(rng.random()))
        .map(|rng| tokio::spawn(work(Arc::clone(&disk.backend), rng, 150)))
        .collect();
    let mut dropped = 0;
    for task in tasks {
        dropped += task.await.unwrap();
    }
    assert!(dropped > 0, "some futures were dropped under way");
    let backend = &disk.backend;
    eventually("the last operations end", || backend.usage().used_bytes == 0);
    let usage = backend.usage();
    assert_eq!((usage.extents, usage.largest_free_bytes), (0, 12 << 20));
    backend.close().await.unwrap();
    assert!(!disk.path.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn close_in_the_middle_ends_everything() {
    let mut rng = rng(7);
    let disk = open_disk(None, Some(64 << 20), IoDriver::Auto, 1 << 20).unwrap();
    let tasks: Vec<_> = (0..64)
        .map(|_| SmallRng::seed_from_u64(rng.random()))
        .map(|rng| tokio::spawn(work(Arc::clone(&disk.backend), rng, u32::MAX)))
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    disk.backend.close().await.unwrap();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(disk.backend.usage().used_bytes, 0);
}

#[test]
fn a_tier_dropped_with_an_operation_in_flight_goes_when_that_ends() {
    let file = Arc::new(FaultyFile::new(|_| Fault::None));
    let file_dropped = file.dropped();
    let shared = SharedFile(Arc::clone(&file));
    let driver = Arc::new(BlockingDriver::new(shared, BlockingOptions::default()));
    let tier = DiskTier::new(driver, 1 << 20);
    let extent = tier.reserve(&[3]).unwrap().remove(0);
    file.hold();
    let mut write = tier.write(vec![(extent, Bytes::from_static(b"abc"))]);
    assert!((&mut write).now_or_never().is_none());
    drop((write, tier));
    eventually("the call is entered", || file.entered.load(Ordering::SeqCst) == 1);
    file.let_go();
    // The thread that ends the operation is now the last owner of the tier, and of itself.
    eventually("the write is done", || !file.data.lock().is_empty());
    drop(file);
    eventually("the file is closed", || file_dropped.load(Ordering::SeqCst));
}
