//! What every implementation of a backend trait has to pass.
//!
//! Invariant: a suite asks for nothing that the trait's documentation does not promise, so that an
//! implementation that fails is wrong. The checks panic with what was expected and what came: they
//! are test code. Called by the tests of each implementation, with the seed of the run.

pub mod catalog;
pub mod disk;
pub mod driver;

use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout};
use vmem_core::backend::{IoBuf, Tier};
use vmem_io::driver::Driver;

/// How long, on tokio's clock, one step may take before it counts as hung.
pub const STEP_LIMIT: Duration = Duration::from_secs(120);

/// Payload lengths around every boundary that matters, in bytes.
pub const ODD_SIZES: [usize; 12] =
    [0, 1, 7, 511, 512, 513, 4095, 4096, 4097, 65_535, 65_536, 30_000];

/// What buffers hold before a read, so that bytes that were not written show.
const POISON: u8 = 0xa5;

/// A driver as a factory gives it to the suite: of a known type, or behind the trait.
pub trait IntoDriver {
    /// The driver behind the trait.
    fn into_driver(self) -> Arc<dyn Driver>;
}

impl<D: Driver> IntoDriver for Arc<D> {
    fn into_driver(self) -> Arc<dyn Driver> {
        self
    }
}

impl IntoDriver for Arc<dyn Driver> {
    fn into_driver(self) -> Arc<dyn Driver> {
        self
    }
}

/// A disk tier as a factory gives it to the suite: of a known type, or behind the trait.
pub trait IntoDisk {
    /// The disk tier behind the trait.
    fn into_disk(self) -> Arc<dyn Tier>;
}

impl<D: Tier> IntoDisk for Arc<D> {
    fn into_disk(self) -> Arc<dyn Tier> {
        self
    }
}

impl IntoDisk for Arc<dyn Tier> {
    fn into_disk(self) -> Arc<dyn Tier> {
        self
    }
}

/// Runs one step; a hang is a failure and no endless test.
pub(crate) async fn within<F: Future>(what: &str, step: F) -> F::Output {
    match timeout(STEP_LIMIT, step).await {
        Ok(output) => output,
        Err(_) => panic!("{what}: no end after {STEP_LIMIT:?}"),
    }
}

/// Waits until `settled` says so: what dropped futures left behind has ended.
pub async fn settle(what: &str, mut settled: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !settled().await {
        assert!(start.elapsed() < STEP_LIMIT, "{what}: not so after {STEP_LIMIT:?}");
        sleep(Duration::from_millis(1)).await;
    }
}

/// A buffer of poison of which `len` bytes begin at a multiple of `align` in memory; and where.
pub(crate) fn aligned_buf(len: usize, align: usize) -> (IoBuf, usize) {
    let align = align.max(1);
    let buf = IoBuf::from_vec(vec![POISON; len + 2 * align]);
    let start = buf.as_ptr().align_offset(align);
    assert!(start <= align, "bytes can be aligned to any power of two");
    (buf, start)
}

/// A copy of `bytes` that begins at a multiple of `align` in memory.
pub(crate) fn aligned_bytes(bytes: &[u8], align: usize) -> Bytes {
    watched_bytes(bytes, align).0
}

/// As [`aligned_bytes`]; nothing is left of the `Weak` once all clones were dropped.
pub(crate) fn watched_bytes(bytes: &[u8], align: usize) -> (Bytes, Weak<()>) {
    let (mut buf, start) = aligned_buf(bytes.len(), align);
    buf[start..start + bytes.len()].copy_from_slice(bytes);
    let life = Arc::new(());
    let watch = Arc::downgrade(&life);
    let owner = Owner { buf, _life: life };
    (Bytes::from_owner(owner).slice(start..start + bytes.len()), watch)
}

struct Owner {
    buf: IoBuf,
    _life: Arc<()>,
}

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.buf
    }
}

/// Fails with the first byte that differs, rather than with two dumps.
#[track_caller]
pub(crate) fn assert_same(what: &str, actual: &[u8], expected: &[u8]) {
    assert_eq!(actual.len(), expected.len(), "{what}: another number of bytes");
    let differs = actual.iter().zip(expected).position(|(a, b)| a != b);
    if let Some(at) = differs {
        let actual = actual[at];
        let expected = expected[at];
        panic!("{what}: byte {at} is {actual:#04x} and not {expected:#04x}");
    }
}

#[track_caller]
pub(crate) fn assert_ok<T, E: std::fmt::Debug>(what: &str, result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{what}: {error:?}"),
    }
}
