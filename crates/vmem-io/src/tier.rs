//! The disk tier: extents of one data file, moved by a driver.
//!
//! Invariant, the ownership rule: neither the buffers nor the extents of an operation are free
//! before the driver has completed it, even if the future of [`Tier::read`] or
//! [`Tier::write`] was dropped. No task is spawned for that: the extents travel with the
//! operation as its [`Keep`], which the driver hands back with the result or drops at the end. And
//! no range is punched while an extent that was written owns it: a write into a range that is
//! being punched starts when the punch has ended. Called by core through [`Tier`].

mod inner;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;
use tokio::sync::Notify;
use vmem_core::VirtualMemoryError;
use vmem_core::backend::{
    CHUNK_BYTES, Clock, Durable, Extent, IoBuf, ReadChunk, SharedOwner, StagingMemory, StoredChunk,
    Tier, TierError, TierUsage, checksums,
};

pub(crate) use self::inner::Inner;

use self::inner::{failure, invalid};
use crate::directory::StoreDirectory;
use crate::driver::{Driver, Keep};
use crate::ledger::Ledger;
use crate::plan;
use crate::settle::settle;
use crate::space::Space;
use crate::sync_gate::SyncGate;

/// A [`Tier`] over any [`Driver`].
///
/// ```
/// use std::sync::Arc;
/// use vmem_core::backend::{Tier, IoBuf, ReadChunk};
/// use vmem_io::DiskTier;
/// use vmem_io::driver::{BlockingDriver, BlockingOptions};
///
/// let driver = BlockingDriver::new(tempfile::tempfile()?, BlockingOptions::default());
/// let tier = DiskTier::new(Arc::new(driver), 1 << 20);
/// # futures::executor::block_on(async {
/// let extent = tier.reserve(&[5]).unwrap().remove(0);
/// let written = tier.write(vec![(extent, "chunk".into())]).await.unwrap();
/// let chunks = ReadChunk::in_sequence(written.into_iter().map(Arc::new));
/// let (buf, result) = tier.read(chunks, IoBuf::from_vec(vec![0; 5])).await;
/// result.unwrap();
/// assert_eq!(&buf[..], b"chunk");
/// tier.close().await.unwrap();
/// # });
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct DiskTier {
    inner: Arc<Inner>,
    /// The same, as its extents hold it.
    owner: SharedOwner,
}

/// Space of a data file that a catalog leads to.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    /// Offset and footprint of each extent, in bytes, in the order of the file.
    pub ranges: Vec<(u64, u32)>,
    /// What they are rounded to, in bytes, if there are or were any.
    pub block_bytes: Option<u32>,
}

impl Taken {
    /// What they take together, in bytes.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|&(_, footprint)| u64::from(footprint)).sum()
    }

    /// Where the last one ends, in bytes.
    pub fn end(&self) -> u64 {
        self.ranges.last().map_or(0, |&(offset, footprint)| offset + u64::from(footprint))
    }
}

impl DiskTier {
    /// A tier of at most `capacity_bytes` in the file of `driver`, from its start.
    pub fn new(driver: Arc<dyn Driver>, capacity_bytes: u64) -> Arc<Self> {
        let driver_block = driver.block_bytes();
        Self::build(driver, Space::new(capacity_bytes, driver_block), &[], None)
    }

    /// The same, with extents in the file already, to be [adopted](Durable::adopt); and in a
    /// directory, if one is given, that is given back when the tier is closed or its last extent
    /// and the tier itself are dropped. What the extents leave free of the file goes back to the
    /// file system.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](VirtualMemoryError::InvalidConfig) if the extents take more than the
    /// capacity, or are of another block size than the driver's.
    pub fn with_taken(
        driver: Arc<dyn Driver>,
        capacity_bytes: u64,
        taken: &Taken,
        directory: Option<StoreDirectory>,
    ) -> Result<Arc<Self>, VirtualMemoryError> {
        let invalid = VirtualMemoryError::invalid_config;
        let block = driver.block_bytes();
        if taken.block_bytes.is_some_and(|bytes| bytes != block) {
            let reason = format!("it works in blocks of {block} bytes, the store in others");
            return Err(invalid("io_driver", reason));
        }
        let space = Space::with_taken(capacity_bytes, block, &taken.ranges).map_err(|bytes| {
            let reason = format!("{capacity_bytes} bytes, but named objects take {bytes}");
            invalid("disk_capacity", reason)
        })?;
        let tier = Self::build(driver, space, &taken.ranges, directory);
        if !taken.ranges.is_empty() {
            tier.inner.ledger.lock().stale.hurry();
            tier.inner.pump();
        }
        Ok(tier)
    }

    fn build(
        driver: Arc<dyn Driver>,
        space: Space,
        taken: &[(u64, u32)],
        directory: Option<StoreDirectory>,
    ) -> Arc<Self> {
        let capacity_bytes = space.usage().capacity_bytes;
        let place = directory.as_ref().map(StoreDirectory::describe);
        let described = format!(
            "{} bytes of disk, {}{}",
            capacity_bytes,
            driver.describe(),
            place.map(|place| format!(", {place}")).unwrap_or_default()
        );
        let inner = Arc::new_cyclic(|me| Inner {
            ledger: Mutex::new(Ledger::new(space, taken)),
            driver,
            punched: Notify::new(),
            gate: SyncGate::new(),
            closed: AtomicBool::new(false),
            described: described.into(),
            directory: Mutex::new(directory),
            me: Weak::clone(me),
        });
        let owner = SharedOwner::new(inner.clone());
        Arc::new(DiskTier { inner, owner })
    }
}

impl Drop for DiskTier {
    /// Operations in flight and extents in use keep the rest; the drop does not wait for
    /// them.
    fn drop(&mut self) {
        self.leave();
    }
}

impl Tier for DiskTier {
    fn reserve(&self, lens: &[u32]) -> Result<Vec<Extent>, TierError> {
        self.inner.check_open()?;
        if lens.iter().any(|&len| len as usize > CHUNK_BYTES) {
            return Err(invalid("reserve", "a chunk is longer than 64 KiB"));
        }
        let placed = self.inner.ledger.lock().reserve(lens)?;
        let extents = placed.iter().zip(lens);
        Ok(extents.map(|(runs, &len)| Extent::in_runs(runs, len, self.owner.clone())).collect())
    }

    fn write(
        &self,
        pieces: Vec<(Extent, Bytes)>,
    ) -> BoxFuture<'static, Result<Vec<Extent>, TierError>> {
        if let Err(error) = self.inner.check_write(&pieces) {
            return ready(Err(error)).boxed();
        }
        let ticket = self.inner.gate.ticket();
        let runs = plan::write_runs(&pieces);
        let (extents, payloads): (Vec<_>, Vec<_>) = pieces.into_iter().unzip();
        let requested = extents.iter().map(|e| u64::from(e.footprint())).sum();
        let nothing = runs.is_empty();
        let write = Arc::clone(&self.inner).submit_write(runs, Keep::new(extents));
        let inner = Arc::clone(&self.inner);
        async move {
            // The write goes first, so that the sums are computed while it is under way.
            let ((keep, result), sums) = futures::join!(write, checksums(payloads));
            let mut outcome = result.map_err(|error| ("write", Arc::new(error)));
            if outcome.is_ok() && !nothing && inner.driver.buffers_writes() {
                let passed = inner.gate.pass(ticket, &inner.driver).await;
                outcome = passed.map_err(|error| ("sync", error));
            }
            if let Err((operation, error)) = outcome {
                // The extents go first, so that their space counts as free.
                drop(keep);
                return Err(inner.failed(operation, error, requested).await);
            }
            let Some(mut extents) = keep.take::<Vec<Extent>>() else {
                return Err(invalid("write", "the driver did not hand the extents back"));
            };
            for (extent, sum) in extents.iter_mut().zip(sums) {
                extent.seal(sum);
            }
            Ok(extents)
        }
        .boxed()
    }

    fn read(
        &self,
        chunks: Vec<ReadChunk>,
        buf: IoBuf,
    ) -> BoxFuture<'static, (IoBuf, Result<(), TierError>)> {
        if let Err(error) = self.inner.check_read(&chunks, &buf) {
            return ready((buf, Err(error))).boxed();
        }
        let pieces = plan::read_pieces(&chunks);
        if pieces.is_empty() {
            return settle(chunks, buf, false).boxed();
        }
        // The extents go with the operation; these shares serve the verification.
        let keep = Keep::new(chunks.clone());
        let read = self.inner.driver.read(buf, pieces, keep);
        async move {
            let (buf, keep, result) = read.await;
            drop(keep);
            match result {
                Ok(()) => settle(chunks, buf, false).await,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    match settle(chunks, buf, true).await {
                        (buf, Ok(())) => (buf, Err(failure("read", Arc::new(error)))),
                        corrupt => corrupt,
                    }
                }
                Err(error) => (buf, Err(failure("read", Arc::new(error)))),
            }
        }
        .boxed()
    }

    fn register(&self, memory: StagingMemory) -> io::Result<()> {
        self.inner.driver.register(memory)
    }

    fn footprint(&self, len: u32) -> u64 {
        let block = u64::from(self.inner.driver.block_bytes());
        u64::from(len).next_multiple_of(block)
    }

    fn usage(&self) -> TierUsage {
        self.inner.ledger.lock().space.usage()
    }

    fn clock(&self) -> Clock {
        self.inner.driver.clock()
    }

    fn describe(&self) -> Arc<str> {
        Arc::clone(&self.inner.described)
    }

    fn leave(&self) {
        if let Some(directory) = &*self.inner.directory.lock() {
            directory.leave();
        }
    }

    fn close(&self) -> BoxFuture<'static, Result<(), TierError>> {
        self.inner.closed.store(true, Ordering::Release);
        // The name goes before the file is closed, so that its blocks are freed where the driver
        // closes it, and not on this task.
        let unnamed = match &mut *self.inner.directory.lock() {
            Some(directory) => directory.remove_data(),
            None => Ok(()),
        };
        let inner = Arc::clone(&self.inner);
        async move {
            // A file that stays takes no more than it needs.
            let stays = inner.directory.lock().as_ref().is_some_and(StoreDirectory::has_names);
            if stays {
                inner.reclaim_all().await;
            }
            let closed = inner.driver.close().await;
            let directory = inner.directory.lock().take();
            let given_back = directory.map_or(Ok(()), StoreDirectory::close);
            closed.and(unnamed).and(given_back).map_err(|error| failure("close", Arc::new(error)))
        }
        .boxed()
    }
}

impl Durable for DiskTier {
    fn sync(&self) -> BoxFuture<'static, Result<(), TierError>> {
        // Through the page cache a write is not reported before it was synced.
        if self.inner.driver.buffers_writes() {
            return ready(Ok(())).boxed();
        }
        let sync = self.inner.driver.sync();
        async move { sync.await.map_err(|error| failure("sync", Arc::new(error))) }.boxed()
    }

    fn adopt(&self, len: u32, chunk: StoredChunk) -> Result<Extent, TierError> {
        let StoredChunk { runs, sum } = chunk;
        let footprint: u64 = runs.iter().map(|run| u64::from(run.footprint)).sum();
        if footprint != self.footprint(len) || len as usize > CHUNK_BYTES {
            return Err(invalid("adopt", "an extent of another length than its chunk"));
        }
        let mut extent = Extent::in_runs(&runs, len, self.owner.clone());
        extent.seal(sum);
        extent.keep();
        Ok(extent)
    }
}
