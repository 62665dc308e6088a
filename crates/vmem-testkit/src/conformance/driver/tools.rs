//! Steps that the checks of a driver share.
//!
//! Invariant: memory is aligned to the driver's block. The `start_` functions start the operation
//! with the call, as the driver does. Called by the suite.

use std::io;
use std::ops::Range;

use bytes::Bytes;
use futures::future::BoxFuture;
use vmem_core::backend::IoBuf;
use vmem_io::driver::{Driver, Keep, ReadPiece, WriteRun};

use crate::conformance::{aligned_buf, aligned_bytes, assert_ok, assert_same, settle, within};

pub(super) fn start_read(
    driver: &dyn Driver,
    buf: IoBuf,
    pieces: Vec<ReadPiece>,
) -> BoxFuture<'static, (IoBuf, io::Result<()>)> {
    let reading = driver.read(buf, pieces, Keep::none());
    Box::pin(async move {
        let (buf, _, result) = reading.await;
        (buf, result)
    })
}

pub(super) fn start_write(
    driver: &dyn Driver,
    runs: Vec<WriteRun>,
) -> BoxFuture<'static, io::Result<()>> {
    let writing = driver.write(runs, Keep::none());
    Box::pin(async move { writing.await.1 })
}

pub(super) fn start_punch(
    driver: &dyn Driver,
    ranges: Vec<Range<u64>>,
) -> BoxFuture<'static, io::Result<()>> {
    let punching = driver.punch(ranges, Keep::none());
    Box::pin(async move { punching.await.1 })
}

pub(super) fn block(driver: &dyn Driver) -> usize {
    let block = driver.block_bytes() as usize;
    assert!(block.is_power_of_two(), "a block of {block} bytes");
    block
}

pub(super) fn round(len: usize, block: usize) -> usize {
    len.next_multiple_of(block)
}

pub(super) fn run(driver: &dyn Driver, offset: u64, data: &[u8]) -> WriteRun {
    WriteRun { offset, parts: vec![aligned_bytes(data, block(driver))] }
}

pub(super) fn is_refusal(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidInput
}

pub(super) async fn put(driver: &dyn Driver, offset: u64, data: &[u8]) {
    let writing = start_write(driver, vec![run(driver, offset, data)]);
    let len = data.len();
    assert_ok(&format!("a write of {len} bytes at {offset}"), within("a write", writing).await);
}

/// Reads into aligned memory; the bytes alone come back.
pub(super) async fn fetch(driver: &dyn Driver, offset: u64, len: usize) -> (Bytes, io::Result<()>) {
    let (buf, start) = aligned_buf(len, block(driver));
    let range = start..start + len;
    let piece = ReadPiece { offset, range: range.clone() };
    let (buf, result) = within("a read", start_read(driver, buf, vec![piece])).await;
    let bytes = buf.get(range).map(Bytes::copy_from_slice);
    (bytes.unwrap_or_default(), result)
}

pub(super) async fn expect(driver: &dyn Driver, what: &str, offset: u64, expected: &[u8]) {
    let (bytes, result) = fetch(driver, offset, expected.len()).await;
    assert_ok(&format!("{what}: {} bytes at {offset}", expected.len()), result);
    assert_same(&format!("{what} at {offset}"), &bytes, expected);
}

/// Waits until the file holds these bytes.
pub(super) async fn arrives(driver: &dyn Driver, what: &str, offset: u64, expected: &[u8]) {
    settle(what, async || {
        let (bytes, result) = fetch(driver, offset, expected.len()).await;
        assert_ok(what, result);
        bytes == expected
    })
    .await;
}
