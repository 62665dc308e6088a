//! What every [`Driver`] has to pass.
//!
//! Invariant: offsets and lengths are multiples of the driver's block, and memory is aligned to
//! it, except where a check says that it tries the contrary. Called by the tests of each driver,
//! with drivers over new, empty files.

use std::io;

use bytes::Bytes;
use futures::future::join_all;
use rand::Rng;
use vmem_core::backend::IoBuf;
use vmem_io::driver::{Driver, ReadPiece, WriteRun};

use super::{
    IntoDriver, ODD_SIZES, POISON, aligned_buf, aligned_bytes, assert_ok, assert_same, settle,
    watched_bytes, within,
};
use crate::{Pattern, Seed, poll_then_drop};

/// Runs every check of this module, each on a driver of `make`, which is over an empty file.
///
/// # Panics
///
/// With the check and what was wrong.
pub async fn all<D: IntoDriver>(seed: Seed, make: impl AsyncFn() -> D) {
    let make = async || make().await.into_driver();
    round_trips(seed, &*make().await).await;
    unaligned(seed, &*make().await).await;
    many_pieces(seed, &*make().await).await;
    end_of_file(seed, &*make().await).await;
    holes_are_zeros(seed, &*make().await).await;
    bad_input(&*make().await).await;
    starts_at_the_call(seed, &*make().await).await;
    dropped_futures(seed, &*make().await).await;
    buffers_come_back(seed, &*make().await).await;
    concurrent(seed, &*make().await).await;
    closes(seed, &*make().await).await;
}

/// What is written is read, for lengths around every boundary.
pub async fn round_trips(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let mut offset = 0;
    for (n, size) in ODD_SIZES.into_iter().enumerate() {
        let data = Pattern::new(seed.value(), n as u64).bytes(offset, round(size, block));
        put(driver, offset, &data).await;
        expect(driver, "a round trip", offset, &data).await;
        offset += (data.len() + block) as u64;
    }
    assert_ok("sync", within("sync", driver.sync()).await);
}

/// Odd offsets, lengths and memory work, or are refused as such; they never give other bytes.
pub async fn unaligned(seed: Seed, driver: &dyn Driver) {
    let old = Pattern::new(seed.value(), 0).bytes(0, 4 * 65_536);
    put(driver, 0, &old).await;
    for (n, size) in ODD_SIZES.into_iter().enumerate() {
        let offset = 4096 * n as u64 + 3;
        let data = Pattern::new(seed.value(), 1 + n as u64).bytes(offset, size);
        let run = WriteRun {
            offset,
            parts: vec![data.clone()],
        };
        match within("an odd write", driver.write(vec![run])).await {
            Ok(()) => {}
            Err(error) if is_refusal(&error) => continue,
            Err(error) => panic!("a write of {size} bytes at {offset}: {error}"),
        }
        let buf = IoBuf::from_vec(vec![POISON; size + 2]);
        let range = 1..size + 1;
        let reading = driver.read(buf, vec![ReadPiece { offset, range }]);
        let (buf, result) = within("an odd read", reading).await;
        match result {
            Ok(()) => assert_same("an odd read", &buf[1..=size], &data),
            Err(error) if is_refusal(&error) => {}
            Err(error) => panic!("a read of {size} bytes at {offset}: {error}"),
        }
    }
}

/// Runs of several parts and scattered pieces, in one call each; no byte of the buffer outside of
/// the pieces is touched.
pub async fn many_pieces(seed: Seed, driver: &dyn Driver) {
    const COUNT: usize = 100;
    let block = block(driver);
    let stride = 3 * block as u64;
    let pattern = Pattern::new(seed.value(), 1);
    let runs = (0..COUNT as u64).map(|n| WriteRun {
        offset: n * stride,
        parts: (0..2)
            .map(|part| n * stride + part * block as u64)
            .map(|at| aligned_bytes(&pattern.bytes(at, block), block))
            .collect(),
    });
    let writing = driver.write(runs.collect());
    assert_ok("100 runs", within("100 runs", writing).await);
    let (buf, start) = aligned_buf(COUNT * 2 * block, block);
    // Every other block of the buffer is filled, in another order than that of the file.
    let pieces: Vec<ReadPiece> = (0..COUNT)
        .map(|n| (n * 37 % COUNT, start + n * 2 * block))
        .map(|(run, at)| ReadPiece {
            offset: run as u64 * stride + block as u64,
            range: at..at + block,
        })
        .collect();
    let reading = driver.read(buf, pieces.clone());
    let (buf, result) = within("100 pieces", reading).await;
    assert_ok("100 pieces", result);
    for piece in pieces {
        let expected = pattern.bytes(piece.offset, block);
        assert_same("a piece", &buf[piece.range.clone()], &expected);
        let gap = &buf[piece.range.end..piece.range.end + block];
        assert_same("the buffer between pieces", gap, &vec![POISON; block]);
    }
    let (buf, result) = within("no pieces", driver.read(buf, Vec::new())).await;
    assert_ok("no pieces", result);
    assert_eq!(
        buf.len(),
        (COUNT + 1) * 2 * block,
        "another buffer came back"
    );
    assert_ok("no runs", within("no runs", driver.write(Vec::new())).await);
}

/// A read past the end is an error and not zeros or old bytes.
pub async fn end_of_file(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let data = Pattern::new(seed.value(), 1).bytes(0, block);
    put(driver, 0, &data).await;
    for offset in [0, block as u64, 1 << 30] {
        let (_, result) = fetch(driver, offset, 2 * block).await;
        let kind = result.err().map(|error| error.kind());
        let what = format!("the result of {} bytes at {offset} of {block}", 2 * block);
        assert_eq!(kind, Some(io::ErrorKind::UnexpectedEof), "{what}");
    }
    expect(driver, "what is before the end", 0, &data).await;
}

/// What was never written, or was punched, reads as zeros; its neighbours stay.
pub async fn holes_are_zeros(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let (unit, len) = (round(4096, block), 8 * round(65_536, block));
    let data = Pattern::new(seed.value(), 1).bytes(0, len);
    put(driver, len as u64, &data[..unit]).await;
    expect(driver, "a hole", 0, &vec![0; len]).await;
    put(driver, 0, &data).await;
    let holes = [
        (unit, 2 * unit),
        (5 * unit, 40 * unit),
        (41 * unit, 41 * unit),
    ];
    let ranges = holes.iter().map(|(start, end)| *start as u64..*end as u64);
    assert_ok(
        "punch",
        within("punch", driver.punch(ranges.collect())).await,
    );
    let mut expected = data.to_vec();
    for (start, end) in holes {
        expected[start..end].fill(0);
    }
    expect(driver, "a file with holes", 0, &expected).await;
    put(driver, unit as u64, &data[unit..2 * unit]).await;
    expected[unit..2 * unit].copy_from_slice(&data[unit..2 * unit]);
    expect(driver, "a hole written again", 0, &expected).await;
}

/// Ranges outside of the buffer and offsets outside of any file are errors, with the buffer back.
pub async fn bad_input(driver: &dyn Driver) {
    let block = block(driver);
    let beyond = ReadPiece {
        offset: 0,
        range: 0..4 * block,
    };
    let reversed = ReadPiece {
        offset: 0,
        range: block..0,
    };
    let far = ReadPiece {
        offset: u64::MAX - 1,
        range: 0..block,
    };
    for piece in [beyond, reversed, far] {
        let buf = IoBuf::from_vec(vec![POISON; 2 * block]);
        let what = format!("{piece:?}");
        let (buf, result) = within(&what, driver.read(buf, vec![piece])).await;
        assert!(result.is_err(), "success for {what}");
        assert_eq!(buf.len(), 2 * block, "another buffer came back for {what}");
    }
    let run = WriteRun {
        offset: u64::MAX - 1,
        parts: vec![aligned_bytes(&vec![1; block], block)],
    };
    let result = within("a far write", driver.write(vec![run])).await;
    assert!(result.is_err(), "success for a write at u64::MAX - 1");
}

/// An operation starts with the call: a future that is never polled writes all the same.
pub async fn starts_at_the_call(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let data = Pattern::new(seed.value(), 1).bytes(0, 4 * block);
    put(driver, 0, &vec![0; data.len()]).await;
    drop(driver.write(vec![run(driver, 0, &data)]));
    arrives(
        driver,
        "a write whose future was dropped unpolled",
        0,
        &data,
    )
    .await;
}

/// Futures dropped after any number of polls: writes arrive whole, reads do no harm.
pub async fn dropped_futures(seed: Seed, driver: &dyn Driver) {
    let len = round(65_536, block(driver));
    let mut rng = seed.fork("dropped futures").rng();
    put(driver, 0, &vec![0; 8 * len]).await;
    for n in 0..32 {
        let offset = rng.random_range(0..8) * len as u64;
        let data = Pattern::new(seed.value(), n).bytes(offset, len);
        let polls = rng.random_range(0..4);
        let reading = || {
            let (buf, start) = aligned_buf(len, block(driver));
            let range = start..start + len;
            driver.read(buf, vec![ReadPiece { offset, range }])
        };
        drop(reading());
        poll_then_drop(reading(), polls).await;
        let writing = driver.write(vec![run(driver, offset, &data)]);
        poll_then_drop(writing, polls).await;
        arrives(driver, "a write whose future was dropped", offset, &data).await;
    }
}

/// The memory of a write is let go when it has ended, with its future dropped or not.
pub async fn buffers_come_back(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let data = Pattern::new(seed.value(), 1).bytes(0, block);
    for dropped in [false, true] {
        let (memory, watch) = watched_bytes(&data, block);
        let writing = driver.write(vec![WriteRun {
            offset: 0,
            parts: vec![memory],
        }]);
        match dropped {
            true => drop(writing),
            false => assert_ok("a write", within("a write", writing).await),
        }
        settle("the memory of a write is let go", async || {
            watch.strong_count() == 0
        })
        .await;
    }
}

/// 64 tasks at once, each with its own part of the file, in a random mixture.
pub async fn concurrent(seed: Seed, driver: &dyn Driver) {
    let part = 4 * round(65_536, block(driver));
    put(driver, 0, &vec![0; 64 * part]).await;
    let tasks = (0..64).map(|n| mixture(seed.fork_nth("task", n), driver, n * part as u64, part));
    within("64 tasks", join_all(tasks)).await;
}

async fn mixture(seed: Seed, driver: &dyn Driver, base: u64, len: usize) {
    let block = block(driver);
    let mut rng = seed.rng();
    let mut expected = vec![0; len];
    for n in 0..24 {
        let from = rng.random_range(0..len / block) * block;
        let to = rng.random_range(from / block + 1..=len / block) * block;
        let at = base + from as u64;
        match rng.random_range(0..8) {
            0..3 => {
                let data = Pattern::new(seed.value(), n).bytes(at, to - from);
                put(driver, at, &data).await;
                expected[from..to].copy_from_slice(&data);
            }
            3 => {
                let punching = driver.punch(vec![at..base + to as u64; 1]);
                assert_ok("punch", within("punch", punching).await);
                expected[from..to].fill(0);
            }
            4 => assert_ok("sync", within("sync", driver.sync()).await),
            _ => expect(driver, "a read among others", at, &expected[from..to]).await,
        }
    }
    expect(driver, "a part at the end", base, &expected).await;
}

/// `close` waits for what is in flight, and what comes later is an error and no hang.
pub async fn closes(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let data = Pattern::new(seed.value(), 1).bytes(0, 16 * block);
    let (memory, watch) = watched_bytes(&data, block);
    let writing = driver.write(vec![WriteRun {
        offset: 0,
        parts: vec![memory],
    }]);
    assert_ok("close", within("close", driver.close()).await);
    assert!(
        watch.strong_count() == 0,
        "close did not wait for a write that was in flight"
    );
    assert_ok(
        "a write before close",
        within("a write before close", writing).await,
    );
    let (buf, result) = fetch(driver, 0, block).await;
    assert!(result.is_err(), "a read after close succeeded");
    assert!(buf.len() >= block, "a read after close kept the buffer");
    let late = [
        ("write", driver.write(vec![run(driver, 0, &data)])),
        ("punch", driver.punch(vec![0..block as u64; 1])),
        ("sync", driver.sync()),
    ];
    for (what, late) in late {
        let result = within("a call after close", late).await;
        assert!(result.is_err(), "{what} after close succeeded");
    }
    // Whether a second close is an error is left open; it ends.
    let _ok_or_not = within("a second close", driver.close()).await;
}

fn block(driver: &dyn Driver) -> usize {
    let block = driver.block_bytes() as usize;
    assert!(block.is_power_of_two(), "a block of {block} bytes");
    block
}

fn round(len: usize, block: usize) -> usize {
    len.next_multiple_of(block)
}

fn run(driver: &dyn Driver, offset: u64, data: &[u8]) -> WriteRun {
    WriteRun {
        offset,
        parts: vec![aligned_bytes(data, block(driver))],
    }
}

fn is_refusal(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidInput
}

async fn put(driver: &dyn Driver, offset: u64, data: &[u8]) {
    let writing = driver.write(vec![run(driver, offset, data)]);
    let len = data.len();
    assert_ok(
        &format!("a write of {len} bytes at {offset}"),
        within("a write", writing).await,
    );
}

/// Reads into aligned memory; the bytes alone come back.
async fn fetch(driver: &dyn Driver, offset: u64, len: usize) -> (Bytes, io::Result<()>) {
    let (buf, start) = aligned_buf(len, block(driver));
    let range = start..start + len;
    let piece = ReadPiece {
        offset,
        range: range.clone(),
    };
    let (buf, result) = within("a read", driver.read(buf, vec![piece])).await;
    let bytes = buf.get(range).map(Bytes::copy_from_slice);
    (bytes.unwrap_or_default(), result)
}

async fn expect(driver: &dyn Driver, what: &str, offset: u64, expected: &[u8]) {
    let (bytes, result) = fetch(driver, offset, expected.len()).await;
    assert_ok(
        &format!("{what}: {} bytes at {offset}", expected.len()),
        result,
    );
    assert_same(&format!("{what} at {offset}"), &bytes, expected);
}

/// Waits until the file holds these bytes.
async fn arrives(driver: &dyn Driver, what: &str, offset: u64, expected: &[u8]) {
    settle(what, async || {
        let (bytes, result) = fetch(driver, offset, expected.len()).await;
        assert_ok(what, result);
        bytes == expected
    })
    .await;
}
