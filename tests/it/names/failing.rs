//! A store over a tape whose disk and catalog fail on command.
//!
//! Invariant: what fails does nothing of what it was asked. Called by the tests of faults.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use redb::StorageBackend;
use tokio::sync::Semaphore;
use vmem::backend::{Answer, Backends, Catalog, CatalogChange};
use vmem::{Capabilities, VirtualMemory, VirtualMemoryConfig};
use vmem_io::DiskTier;
use vmem_io::catalog::NameCatalog;
use vmem_testkit::tape::Image;
use vmem_testkit::{Errno, FaultDriver, Seed, Tape, TapeDriver, TapeStorage};

/// The catalog of a tape, which fails on command.
#[derive(Debug)]
pub(super) struct Failing(TapeStorage, Arc<CatalogFails>);

/// What fails of the catalog.
#[derive(Debug, Default)]
pub(super) struct CatalogFails {
    pub(super) sync: AtomicBool,
    pub(super) space: AtomicBool,
    pub(super) all_writes: bool,
}

impl CatalogFails {
    /// `grows` says whether the file does, which is all that most file systems refuse then.
    pub(super) fn full(&self, grows: bool) -> io::Result<()> {
        match self.space.load(Ordering::SeqCst) && (grows || self.all_writes) {
            true => Err(Errno::NOSPC.into()),
            false => Ok(()),
        }
    }
}

impl StorageBackend for Failing {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.1.full(len > self.len()?)?;
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        match self.1.sync.load(Ordering::SeqCst) {
            true => Err(Errno::IO.into()),
            false => self.0.sync_data(),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        // What was never written takes space now.
        let mut before = vec![0; data.len()];
        let new = self.0.read(offset, &mut before).is_err() || before.iter().all(|&byte| byte == 0);
        self.1.full(new)?;
        self.0.write(offset, data)
    }
}

pub(super) struct Place {
    pub(super) vmem: VirtualMemory,
    pub(super) tape: Arc<Tape>,
    pub(super) disk: Arc<FaultDriver>,
    pub(super) catalog_fails: Arc<CatalogFails>,
}

pub(super) fn open(image: Image, buffered: bool) -> Place {
    open_where(image, buffered, false)
}

pub(super) fn open_where(image: Image, buffered: bool, all_writes: bool) -> Place {
    let tape = Tape::of(image);
    let catalog_fails = Arc::new(CatalogFails { all_writes, ..Default::default() });
    let storage = Failing(TapeStorage(tape.clone()), catalog_fails.clone());
    let (catalog, taken) = NameCatalog::over(Arc::new(storage), 512).unwrap();
    let disk = FaultDriver::new(TapeDriver::new(&tape, buffered), Seed::new(3));
    let config = VirtualMemoryConfig::builder()
        .host_capacity(2 << 20)
        .staging_capacity(128 << 10)
        .wait_timeout(Duration::from_secs(20))
        .build()
        .unwrap();
    let backends = Backends {
        remote: None,
        host_capacity_bytes: 2 << 20,
        disk: DiskTier::with_taken(disk.clone(), 8 << 20, &taken, None).unwrap(),
        catalog: Some(Arc::new(catalog)),
        devices: Vec::new(),
        capabilities: Capabilities::new("a tape".into(), "not in this test".into()),
    };
    let vmem = VirtualMemory::with_backends(&config, backends).unwrap();
    Place { vmem, tape, disk, catalog_fails }
}

/// A catalog whose commits need a permit, and take this long then.
#[derive(Debug)]
pub(super) struct Slow(pub(super) NameCatalog, pub(super) Arc<Semaphore>, pub(super) Duration);

impl Catalog for Slow {
    vmem_testkit::hand_on!(
        attempts,
        is_poisoned,
        is_shut,
        find,
        record,
        names,
        time,
        snapshot,
        next_id,
        close
    );

    fn commit(&self, changes: Vec<CatalogChange>) -> Answer<()> {
        let commit = self.0.commit(changes);
        let permits = self.1.clone();
        let long = self.2;
        Box::pin(async move {
            drop(permits.acquire().await);
            tokio::time::sleep(long).await;
            commit.await
        })
    }
}

/// A store over a tape, with what `make` makes of the tape's catalog, and with this `wait_timeout`.
pub(super) fn open_with<C: Catalog + 'static>(
    wait: Duration,
    make: impl FnOnce(NameCatalog) -> C,
) -> VirtualMemory {
    let tape = Tape::of(Image::default());
    let (catalog, taken) = NameCatalog::over(Arc::new(TapeStorage(tape.clone())), 512).unwrap();
    let backends = Backends {
        remote: None,
        host_capacity_bytes: 4 << 20,
        disk: DiskTier::with_taken(TapeDriver::new(&tape, false), 8 << 20, &taken, None).unwrap(),
        catalog: Some(Arc::new(make(catalog))),
        devices: Vec::new(),
        capabilities: Capabilities::new("tape".into(), "none".into()),
    };
    let config = VirtualMemoryConfig::builder().wait_timeout(wait).build().unwrap();
    VirtualMemory::with_backends(&config, backends).unwrap()
}
