//! The catalog beside readers, snapshots and failures.

use std::fs;

use bytes::Bytes;
use futures::executor::block_on;
use redb::Database;
use redb::backends::InMemoryBackend;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::time::Duration;
use vmem_core::MemoryTier;

use super::rows::Head;
use super::*;

#[test]
fn a_catalog_of_another_version_is_refused_and_left_as_it_is() {
    // Format 0 had records without version and time.
    const OTHER: u32 = 0;
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join(CATALOG_FILE);
    {
        let db = Database::create(&path).unwrap();
        tables::begin(&db, 512).unwrap();
        tables::set_head(&db, Head { format: OTHER, block_bytes: 512, ..Head::default() });
        // As a crash leaves it: opening it would write.
        fs::copy(&path, place.path().join("copy")).unwrap();
    }
    fs::rename(place.path().join("copy"), &path).unwrap();
    let written = fs::read(&path).unwrap();
    for _ in 0..2 {
        let (directory, data) = StoreDirectory::open(Some(place.path())).unwrap();
        drop(data);
        let error = NameCatalog::open(&directory, 1 << 20).err();
        let Some(VirtualMemoryError::UnknownFormat { path: of, found, known }) = error else {
            panic!("{error:?}")
        };
        assert_eq!((found, known), (OTHER, rows::FORMAT));
        assert_eq!(of, directory.path().join(CATALOG_FILE));
        let error = NameCatalog::look_at(&directory, 1 << 20).err();
        assert!(matches!(error, Some(VirtualMemoryError::UnknownFormat { found: OTHER, .. })));
    }
    assert!(fs::read(&path).unwrap() == written, "what is not understood is not touched");
}

/// An object of no bytes, with the first letter of its name as its number.
fn put(name: &str) -> Vec<CatalogChange> {
    let id = name.as_bytes()[0].into();
    let version = id;
    let modified = SystemTime::UNIX_EPOCH;
    let len = 0;
    let home = MemoryTier::Disk;
    let metadata = Bytes::new();
    let record = CatalogRecord { id, version, modified, len, home, metadata };
    let segment = CatalogChange::Segment { id, segment: 0, chunks: Vec::new() };
    vec![CatalogChange::Put { name: name.into(), record }, segment]
}

/// What the commit says, which must not hang.
fn commit(catalog: &NameCatalog, name: &str) -> Result<()> {
    let (done, is_done) = mpsc::channel();
    let committing = catalog.commit(put(name));
    std::thread::spawn(move || done.send(block_on(committing)));
    is_done.recv_timeout(Duration::from_secs(20)).expect("it waits")
}

#[test]
fn readers_keep_no_commit_waiting() {
    let place = tempfile::tempdir().unwrap();
    let (directory, _data) = StoreDirectory::open(Some(place.path())).unwrap();
    let (catalog, _) = NameCatalog::open(&directory, 1 << 20).unwrap();
    catalog.set_disk(tempfile::tempfile().unwrap(), 512);
    commit(&catalog, "a").unwrap();
    let reading = catalog.inner.open.read();
    commit(&catalog, "a").unwrap();
    drop(reading);
    assert_eq!(catalog.attempts(), 2);
}

/// Mechanism: snapshots ran on the threads of commits. Effect: three at once, and every commit and
/// every look at a name stood behind gigabytes. Fix: a thread of their own.
#[test]
fn several_snapshots_keep_no_commit_waiting() {
    let (catalog, _) = NameCatalog::over(Arc::new(InMemoryBackend::new()), 512).unwrap();
    let (let_go, gate) = mpsc::channel::<()>();
    let gate = Arc::new(Mutex::new(gate));
    let copying: Vec<_> = (0..2 * THREADS)
        .map(|_| {
            let gate = Arc::clone(&gate);
            catalog.run_on(&catalog.snapshots, move |_| {
                let _ = gate.lock().recv();
                Ok(())
            })
        })
        .collect();
    commit(&catalog, "a").unwrap();
    assert!(block_on(catalog.find("a".into())).unwrap().is_some());
    drop(let_go);
    for one in copying {
        block_on(one).unwrap();
    }
}

/// Mechanism: a flush of what is durable already looks for the files, one job each. Effect: each of
/// the flushes at once was a look. Fix: those that come before a look begins share it.
#[test]
fn checks_at_once_share_one_look() {
    let (catalog, _) = NameCatalog::over(Arc::new(InMemoryBackend::new()), 512).unwrap();
    let (let_go, gate) = mpsc::channel::<()>();
    let gate = Arc::new(Mutex::new(gate));
    let busy: Vec<_> = (0..THREADS)
        .map(|_| {
            let gate = Arc::clone(&gate);
            catalog.run(move |_| {
                let _ = gate.lock().recv();
                Ok(())
            })
        })
        .collect();
    let checks: Vec<_> = (0..100).map(|_| catalog.check()).collect();
    let waits = catalog.next_check.lock().clone().expect("one waits");
    assert_eq!(waits.strong_count(), Some(102), "each has a share of it");
    drop(let_go);
    for one in checks.into_iter().chain(busy) {
        block_on(one).unwrap();
    }
    assert!(catalog.next_check.lock().is_none(), "the next caller starts another");
    block_on(catalog.check()).unwrap();
}

/// Refuses to write on command.
#[derive(Debug, Default)]
struct Full(InMemoryBackend, Arc<AtomicBool>);

impl StorageBackend for Full {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self.1.load(Ordering::SeqCst) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => self.0.write(offset, data),
        }
    }
}

/// Mechanism: a snapshot held the lock of the database while it copied, and a commit that fails
/// must replace the database. Effect: on a full disk every commit and read waited for the
/// snapshot. Fix: the snapshot has a share, which a failure makes worthless.
#[test]
fn a_failed_commit_takes_the_database_from_a_snapshot() {
    let storage = Full::default();
    let full = Arc::clone(&storage.1);
    let storage: Arc<dyn StorageBackend> = Arc::new(storage);
    let (catalog, _) = NameCatalog::over(Arc::clone(&storage), 512).unwrap();
    commit(&catalog, "a").unwrap();
    let copying = catalog.inner.open.read().as_ref().and_then(|open| open.db.clone()).unwrap();
    full.store(true, Ordering::SeqCst);
    let error = commit(&catalog, "b").unwrap_err();
    assert!(matches!(error, VirtualMemoryError::Io { .. }), "{error:?}");
    full.store(false, Ordering::SeqCst);
    commit(&catalog, "c").unwrap();
    let read = tables::names(&copying, "", Bound::Unbounded, 10);
    assert!(!matches!(read, Ok(names) if names.len() > 1), "what it sees is not later");
    // Its end writes nothing over what was committed since.
    drop(copying);
    commit(&catalog, "d").unwrap();
    catalog.shut();
    let (again, _) = NameCatalog::over(storage, 512).unwrap();
    let names = block_on(again.names("".into(), Bound::Unbounded, 10)).unwrap();
    let names: Vec<_> = names.iter().map(|(name, _)| &**name).collect();
    assert_eq!(names, ["a", "c", "d"]);
}
