//! The ownership of buffers and extents: the tier over a driver whose completions the test decides.
#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use common::{ManualDriver, random_bytes, rng, watched};
use futures::FutureExt;
use futures::executor::block_on;
use futures::future::BoxFuture;
use rand::Rng;
use vmem_core::backend::{Extent, IoBuf, ReadChunk, Tier, TierError};
use vmem_io::DiskTier;

const CHUNK: u32 = 65536;
const MIB: u64 = 1 << 20;

fn tier(capacity: u64, buffered: bool) -> (Arc<DiskTier>, Arc<ManualDriver>) {
    let driver = Arc::new(ManualDriver { buffered, ..Default::default() });
    (DiskTier::new(Arc::clone(&driver) as _, capacity), driver)
}

type Read = BoxFuture<'static, (IoBuf, Result<(), TierError>)>;
type Write = BoxFuture<'static, Result<Vec<Extent>, TierError>>;

fn write(tier: &DiskTier, payloads: &[Bytes]) -> Result<Write, TierError> {
    let lens: Vec<u32> = payloads.iter().map(|bytes| bytes.len() as u32).collect();
    let extents = tier.reserve(&lens)?;
    let pieces = extents.into_iter().zip(payloads.iter().cloned());
    Ok(tier.write(pieces.collect()))
}

/// Writes and completes.
fn store(tier: &DiskTier, driver: &ManualDriver, payloads: &[Bytes]) -> Vec<Extent> {
    let future = write(tier, payloads).unwrap();
    driver.complete("write", Ok(()));
    block_on(future).unwrap()
}

#[test]
fn a_dropped_write_owns_its_space_and_bytes_until_the_completion() {
    let (tier, driver) = tier(CHUNK.into(), false);
    let (payload, freed) = watched(vec![1; CHUNK as usize]);
    let mut future = write(&tier, &[payload]).unwrap();
    assert!((&mut future).now_or_never().is_none());
    drop(future);
    assert_eq!(tier.usage().used_bytes, CHUNK.into());
    assert!(tier.reserve(&[1]).is_err(), "the space is taken");
    assert!(!freed.load(Ordering::SeqCst), "the bytes are alive");
    driver.complete("write", Ok(()));
    assert!(freed.load(Ordering::SeqCst));
    assert_eq!((tier.usage().used_bytes, tier.usage().extents), (0, 0));
}

#[test]
fn a_dropped_read_owns_its_extents_and_buffer_until_the_completion() {
    let (tier, driver) = tier(CHUNK.into(), false);
    let extents = store(&tier, &driver, &[vec![1; CHUNK as usize].into()]);
    let extents: Vec<_> = extents.into_iter().map(Arc::new).collect();
    let future =
        tier.read(ReadChunk::in_sequence(extents), IoBuf::from_vec(vec![0; CHUNK as usize]));
    drop(future);
    // Only the operation has the extent now.
    assert_eq!(tier.usage().used_bytes, CHUNK.into());
    assert!(tier.reserve(&[1]).is_err());
    driver.complete("read", Ok(()));
    assert_eq!(tier.usage().used_bytes, 0);
}

#[test]
fn a_failed_write_gives_back_after_the_completion_and_not_before() {
    let (tier, driver) = tier(4 * MIB, false);
    let mut future = write(&tier, &[vec![1; 600].into(), Bytes::new()]).unwrap();
    assert!((&mut future).now_or_never().is_none());
    assert_eq!((tier.usage().used_bytes, tier.usage().extents), (1024, 2));
    driver.complete("write", Err(io::Error::from_raw_os_error(5)));
    let error = block_on(future).unwrap_err();
    let TierError::Io { operation, source } = error else {
        panic!("{error:?}");
    };
    assert_eq!((operation, source.raw_os_error()), ("write", Some(5)));
    assert_eq!((tier.usage().used_bytes, tier.usage().extents), (0, 0));
}

#[test]
fn no_space_left_is_full_with_its_cause() {
    for errno in [28, 122, 27] {
        let (tier, driver) = tier(4 * MIB, false);
        let future = write(&tier, &[vec![1; 600].into()]).unwrap();
        driver.complete("write", Err(io::Error::from_raw_os_error(errno)));
        let error = block_on(future).unwrap_err();
        let TierError::Full { requested_bytes, free_bytes, source } = error else {
            panic!("{error:?}");
        };
        assert_eq!((requested_bytes, free_bytes), (1024, 4 * MIB));
        assert_eq!(source.unwrap().raw_os_error(), Some(errno));
    }
}

#[test]
fn a_full_file_system_gets_back_what_is_stale_before_the_error() {
    let (tier, driver) = tier(4 * MIB, false);
    drop(store(&tier, &driver, &[vec![1; CHUNK as usize].into()]));
    assert!(driver.pending().is_empty(), "one chunk is not worth a punch");
    let mut future = write(&tier, &[vec![1; 600].into()]).unwrap();
    driver.complete("write", Err(io::Error::from_raw_os_error(28)));
    assert!((&mut future).now_or_never().is_none(), "it waits for the punch");
    assert_eq!(driver.pending(), ["punch"]);
    driver.complete("punch", Ok(()));
    assert!(matches!(block_on(future), Err(TierError::Full { source: Some(_), .. })));
}

#[test]
fn a_range_that_is_being_punched_is_reserved_at_once_and_written_later() {
    let (tier, driver) = tier(8 * MIB, false);
    let payloads = vec![Bytes::from(vec![1; CHUNK as usize]); 128];
    let mut extents = store(&tier, &driver, &payloads);
    let kept = extents.split_off(80);
    drop(extents);
    assert_eq!(driver.pending(), ["punch"], "one batch at a time");
    let mut rewrite = write(&tier, &payloads[..80]).expect("free space is never refused");
    assert!((&mut rewrite).now_or_never().is_none());
    assert_eq!(driver.pending(), ["punch"], "the write waits");
    driver.complete("punch", Ok(()));
    assert!((&mut rewrite).now_or_never().is_none());
    assert_eq!(driver.pending(), ["write"], "what is reserved is not punched");
    driver.complete("write", Ok(()));
    let written = block_on(rewrite).unwrap();
    for extent in written.into_iter().chain(kept) {
        let future = tier.read(
            ReadChunk::in_sequence([Arc::new(extent)]),
            IoBuf::from_vec(vec![0; CHUNK as usize]),
        );
        driver.complete("read", Ok(()));
        let (buf, result) = block_on(future);
        result.unwrap();
        assert_eq!(buf[..], payloads[0][..]);
        // Chunks are dropped as we go, so batches begin in between.
        while driver.pending().contains(&"punch") {
            driver.complete("punch", Err(io::Error::from_raw_os_error(5)));
        }
    }
    assert_eq!(tier.usage().used_bytes, 0);
}

#[test]
fn one_sync_covers_the_writes_that_wait_for_it() {
    let (tier, driver) = tier(4 * MIB, true);
    let payload = [Bytes::from_static(b"x")];
    let mut writes: Vec<_> = (0..4).map(|_| write(&tier, &payload).unwrap()).collect();
    driver.complete("write", Ok(()));
    assert!((&mut writes[0]).now_or_never().is_none());
    assert_eq!(driver.pending(), ["write", "write", "write", "sync"]);
    for future in &mut writes[1..] {
        driver.complete("write", Ok(()));
        assert!(future.now_or_never().is_none());
    }
    // They completed after the sync began, so it does not cover them.
    assert_eq!(driver.pending(), ["sync"]);
    driver.complete("sync", Ok(()));
    block_on(writes.remove(0)).unwrap();
    for future in &mut writes {
        assert!(future.now_or_never().is_none());
    }
    assert_eq!(driver.pending(), ["sync"], "one for the three of them");
    driver.complete("sync", Ok(()));
    for future in writes {
        assert!(block_on(future).unwrap()[0].sum().is_some());
    }
}

#[test]
fn a_failed_sync_fails_every_write_that_it_may_have_swallowed() {
    let (tier, driver) = tier(4 * MIB, true);
    let payload = [Bytes::from_static(b"x")];
    let [mut first, mut joined, mut flying] = [(); 3].map(|()| write(&tier, &payload).unwrap());
    for future in [&mut first, &mut joined] {
        driver.complete("write", Ok(()));
        assert!(future.now_or_never().is_none());
    }
    driver.complete("sync", Err(io::Error::from_raw_os_error(5)));
    assert!(block_on(first).is_err());
    // These have a sync of their own that succeeds, and are not safe for all that.
    driver.complete("write", Ok(()));
    assert!((&mut joined).now_or_never().is_none());
    assert!((&mut flying).now_or_never().is_none());
    while driver.pending().contains(&"sync") {
        driver.complete("sync", Ok(()));
        let _ = (&mut flying).now_or_never();
    }
    let error = block_on(joined).unwrap_err();
    assert!(matches!(error, TierError::Io { operation: "sync", .. }), "{error:?}");
    // What comes after is unharmed.
    let mut after = write(&tier, &payload).unwrap();
    driver.complete("write", Ok(()));
    assert!((&mut after).now_or_never().is_none());
    driver.complete("sync", Ok(()));
    block_on(after).unwrap();
}

#[test]
fn a_failed_sync_is_noticed_even_if_nobody_waits_for_it() {
    let (tier, driver) = tier(4 * MIB, true);
    let payload = [Bytes::from_static(b"x")];
    let [mut first, second] = [(); 2].map(|()| write(&tier, &payload).unwrap());
    driver.complete("write", Ok(()));
    assert!((&mut first).now_or_never().is_none());
    drop(first);
    driver.complete("sync", Err(io::Error::from_raw_os_error(5)));
    let mut second = second;
    driver.complete("write", Ok(()));
    assert!((&mut second).now_or_never().is_none());
    driver.complete("sync", Ok(()));
    assert!(block_on(second).is_err());
    assert_eq!(tier.usage().used_bytes, 0);
}

/// Objects, writes and reads in flight, and what they should hold.
#[derive(Default)]
struct World {
    objects: Vec<(Vec<Arc<Extent>>, Vec<u8>)>,
    writes: Vec<(Write, Vec<u8>)>,
    reads: Vec<(Read, Vec<u8>)>,
}

impl World {
    fn settle(&mut self, io_fails: bool) {
        let mut index = 0;
        while index < self.writes.len() {
            match (&mut self.writes[index].0).now_or_never() {
                None => index += 1,
                Some(result) => {
                    let (_, content) = self.writes.swap_remove(index);
                    match result {
                        Ok(extents) => {
                            let extents = extents.into_iter().map(Arc::new).collect();
                            self.objects.push((extents, content));
                        }
                        Err(error) => assert!(io_fails, "{error:?}"),
                    }
                }
            }
        }
        self.reads.retain_mut(|(read, content)| match read.now_or_never() {
            None => true,
            Some((buf, result)) => {
                match result {
                    Ok(()) => assert!(buf[..] == content[..], "wrong bytes"),
                    Err(TierError::Io { .. }) if io_fails => {}
                    Err(error) => panic!("{error:?}"),
                }
                false
            }
        });
    }
}

#[test]
fn random_work_with_delayed_completions_never_mixes_up_bytes() {
    let mut rng = rng(20);
    let (tier, driver) = tier(16 * MIB, true);
    let mut world = World::default();
    let mut punches = 0;
    for _ in 0..6_000 {
        match rng.random_range(0..100) {
            0..25 => {
                let payloads: Vec<Bytes> = (0..rng.random_range(1..12))
                    .map(|_| {
                        let full = rng.random_bool(0.5);
                        let len = if full { CHUNK } else { rng.random_range(0..CHUNK) };
                        random_bytes(&mut rng, len as usize)
                    })
                    .collect();
                if let Ok(future) = write(&tier, &payloads) {
                    world.writes.push((future, payloads.concat()));
                }
            }
            25..45 if !world.objects.is_empty() => {
                let index = rng.random_range(0..world.objects.len());
                let (extents, content) = world.objects[index].clone();
                let buf = IoBuf::from_vec(vec![0xaa; content.len()]);
                world.reads.push((tier.read(ReadChunk::in_sequence(extents), buf), content));
            }
            45..65 if !world.objects.is_empty() => {
                let index = rng.random_range(0..world.objects.len());
                world.objects.swap_remove(index);
            }
            65..67 if !world.writes.is_empty() => {
                drop(world.writes.swap_remove(0));
            }
            67..69 if !world.reads.is_empty() => {
                drop(world.reads.swap_remove(0));
            }
            _ => {
                let pending = driver.pending();
                if !pending.is_empty() {
                    let index = rng.random_range(0..pending.len());
                    punches += u32::from(pending[index] == "punch");
                    let fails = rng.random_bool(0.03);
                    let result = if fails { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) };
                    driver.complete_nth(index, result);
                }
            }
        }
        world.settle(true);
    }
    assert!(punches > 5, "{punches} punches");
    while !world.writes.is_empty() || !world.reads.is_empty() || !driver.pending().is_empty() {
        if !driver.pending().is_empty() {
            driver.complete_nth(0, Ok(()));
        }
        world.settle(true);
    }
    let footprints = world.objects.iter().flat_map(|(extents, _)| extents);
    let used: u64 = footprints.map(|extent| u64::from(extent.footprint())).sum();
    assert_eq!(tier.usage().used_bytes, used);
    assert!(!world.objects.is_empty() && tier.usage().peak_bytes > 8 * MIB);
    for (extents, content) in std::mem::take(&mut world.objects) {
        let buf = IoBuf::from_vec(vec![0xaa; content.len()]);
        world.reads.push((tier.read(ReadChunk::in_sequence(extents), buf), content));
        while !world.reads.is_empty() {
            if !driver.pending().is_empty() {
                driver.complete_nth(0, Ok(()));
            }
            world.settle(false);
        }
    }
    assert_eq!(tier.usage().used_bytes, 0);
    assert_eq!(tier.usage().largest_free_bytes, 16 * MIB);
}
