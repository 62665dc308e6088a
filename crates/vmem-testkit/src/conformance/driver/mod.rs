//! What every [`Driver`] has to pass.
//!
//! Invariant: offsets and lengths are multiples of the driver's block, and memory is aligned to
//! it, except where a check says that it tries the contrary. Called by the tests of each driver,
//! with drivers over new, empty files.

mod ending;
mod tools;

use std::io;

use bytes::Bytes;
use futures::future::join_all;
use rand::Rng;
use vmem_core::backend::IoBuf;
use vmem_io::driver::{Driver, ReadPiece, WriteRun};

use super::{
    IntoDriver, ODD_SIZES, POISON, aligned_buf, aligned_bytes, assert_ok, assert_same, within,
};
use crate::{Pattern, Seed};
use tools::{block, expect, fetch, is_refusal, put, round, start_punch, start_read, start_write};

pub use ending::{buffers_come_back, closes, dropped_futures, keeps_come_back, starts_at_the_call};

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
    large_transfers(seed, &*make().await).await;
    end_of_file(seed, &*make().await).await;
    holes_are_zeros(seed, &*make().await).await;
    bad_input(&*make().await).await;
    starts_at_the_call(seed, &*make().await).await;
    dropped_futures(seed, &*make().await).await;
    buffers_come_back(seed, &*make().await).await;
    keeps_come_back(seed, &*make().await).await;
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
        let run = WriteRun { offset, parts: vec![data.clone()] };
        match within("an odd write", start_write(driver, vec![run])).await {
            Ok(()) => {}
            Err(error) if is_refusal(&error) => continue,
            Err(error) => panic!("a write of {size} bytes at {offset}: {error}"),
        }
        let buf = IoBuf::from_vec(vec![POISON; size + 2]);
        let range = 1..size + 1;
        let reading = start_read(driver, buf, vec![ReadPiece { offset, range }]);
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
    let writing = start_write(driver, runs.collect());
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
    let reading = start_read(driver, buf, pieces.clone());
    let (buf, result) = within("100 pieces", reading).await;
    assert_ok("100 pieces", result);
    for piece in pieces {
        let expected = pattern.bytes(piece.offset, block);
        assert_same("a piece", &buf[piece.range.clone()], &expected);
        let gap = &buf[piece.range.end..piece.range.end + block];
        assert_same("the buffer between pieces", gap, &vec![POISON; block]);
    }
    let (buf, result) = within("no pieces", start_read(driver, buf, Vec::new())).await;
    assert_ok("no pieces", result);
    assert_eq!(buf.len(), (COUNT + 1) * 2 * block, "another buffer came back");
    assert_ok("no runs", within("no runs", start_write(driver, Vec::new())).await);
}

/// Transfers of many system calls: parts that are neighbours in memory, as the chunks of a large
/// object are, among small ones that are not; memory that is aligned and memory that is not.
pub async fn large_transfers(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let unit = round(65_536, block);
    let mut rng = seed.fork("large transfers").rng();
    let pattern = Pattern::new(seed.value(), 1);
    let mut run = WriteRun { offset: 4 * block as u64, parts: Vec::new() };
    let mut end = run.offset;
    for nth in 0..6 {
        let large = aligned_bytes(&pattern.bytes(end, (2 + nth) * unit), block);
        end += large.len() as u64;
        run.parts.extend((0..2 + nth).map(|chunk| large.slice(chunk * unit..(chunk + 1) * unit)));
        for _ in 0..rng.random_range(0..20) {
            // A victim and what fills its extent up, with memory of its own each.
            let len = rng.random_range(1..=block);
            let victim = Bytes::from(pattern.bytes(end, block).to_vec());
            run.parts.extend([victim.slice(..len), Bytes::from(victim[len..].to_vec())]);
            end += block as u64;
        }
    }
    let from = run.offset;
    let len = (end - run.offset) as usize;
    let writing = start_write(driver, vec![run]);
    assert_ok("a large write", within("a large write", writing).await);
    expect(driver, "a large read", from, &pattern.bytes(from, len)).await;
    let (mut beside, start) = aligned_buf(len + 1, block);
    beside.fill(POISON);
    let range = start + 1..start + 1 + len;
    let pieces = vec![ReadPiece { offset: from, range: range.clone() }];
    let reading = start_read(driver, beside, pieces);
    let (beside, result) = within("a large read to odd memory", reading).await;
    match result {
        Ok(()) => {
            let expected = pattern.bytes(from, len);
            assert_same("a large read to odd memory", &beside[range.clone()], &expected);
            assert_eq!(beside[range.start - 1], POISON, "the byte before it");
            assert_eq!(beside[range.end], POISON, "the byte behind it");
        }
        Err(error) if is_refusal(&error) => {}
        Err(error) => panic!("a large read to odd memory: {error}"),
    }
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
    // The pieces that the file has are filled all the same.
    let (buf, start) = aligned_buf(2 * block, block);
    let pieces = vec![
        ReadPiece { offset: 0, range: start..start + block },
        ReadPiece { offset: block as u64, range: start + block..start + 2 * block },
    ];
    let (buf, result) = within("a piece too many", start_read(driver, buf, pieces)).await;
    let kind = result.err().map(|error| error.kind());
    assert_eq!(kind, Some(io::ErrorKind::UnexpectedEof), "the result of a piece too many");
    assert_same("the piece before the missing one", &buf[start..start + block], &data);
}

/// What was never written, or was punched, reads as zeros; its neighbours stay.
pub async fn holes_are_zeros(seed: Seed, driver: &dyn Driver) {
    let block = block(driver);
    let unit = round(4096, block);
    let len = 8 * round(65_536, block);
    let data = Pattern::new(seed.value(), 1).bytes(0, len);
    put(driver, len as u64, &data[..unit]).await;
    expect(driver, "a hole", 0, &vec![0; len]).await;
    put(driver, 0, &data).await;
    let holes = [(unit, 2 * unit), (5 * unit, 40 * unit), (41 * unit, 41 * unit)];
    let ranges = holes.iter().map(|(start, end)| *start as u64..*end as u64);
    assert_ok("punch", within("punch", start_punch(driver, ranges.collect())).await);
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
    let beyond = ReadPiece { offset: 0, range: 0..4 * block };
    let reversed = ReadPiece { offset: 0, range: block..0 };
    let far = ReadPiece { offset: u64::MAX - 1, range: 0..block };
    for piece in [beyond, reversed, far] {
        let buf = IoBuf::from_vec(vec![POISON; 2 * block]);
        let what = format!("{piece:?}");
        let (buf, result) = within(&what, start_read(driver, buf, vec![piece])).await;
        assert!(result.is_err(), "success for {what}");
        assert_eq!(buf.len(), 2 * block, "another buffer came back for {what}");
    }
    let run = WriteRun { offset: u64::MAX - 1, parts: vec![aligned_bytes(&vec![1; block], block)] };
    let result = within("a far write", start_write(driver, vec![run])).await;
    assert!(result.is_err(), "success for a write at u64::MAX - 1");
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
                let punching = start_punch(driver, vec![at..base + to as u64; 1]);
                assert_ok("punch", within("punch", punching).await);
                expected[from..to].fill(0);
            }
            4 => assert_ok("sync", within("sync", driver.sync()).await),
            _ => expect(driver, "a read among others", at, &expected[from..to]).await,
        }
    }
    expect(driver, "a part at the end", base, &expected).await;
}
