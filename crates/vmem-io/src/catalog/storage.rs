//! The file below the catalog.
//!
//! Invariant: positional I/O alone; nothing is locked here, since the directory is. Called by redb.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use redb::StorageBackend;

/// What redb reads and writes through; remembers whether a sync failed.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    inner: Arc<dyn StorageBackend>,
    sync_failed: Arc<AtomicBool>,
    /// Another database lies in the same file now.
    replaced: Arc<AtomicBool>,
}

impl Storage {
    pub(super) fn new(inner: Arc<dyn StorageBackend>) -> Self {
        Storage { inner, sync_failed: Arc::default(), replaced: Arc::default() }
    }

    /// The same for another database. Whatever the one over this storage still does is refused.
    pub(super) fn replaced(&self) -> Self {
        self.replaced.store(true, Ordering::Release);
        Storage { replaced: Arc::default(), ..self.clone() }
    }

    fn check(&self) -> io::Result<()> {
        match self.replaced.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(io::Error::other("a commit failed meanwhile, try again")),
        }
    }

    pub(super) fn of_file(file: File) -> Self {
        Self::new(Arc::new(FileStorage(file)))
    }

    pub(super) fn sync_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }
}

impl StorageBackend for Storage {
    fn len(&self) -> io::Result<u64> {
        self.check()?;
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out)?;
        // Afterwards: what was read may have been written over just before.
        self.check()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check()?;
        self.inner.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.check()?;
        let synced = self.inner.sync_data();
        self.sync_failed.fetch_or(synced.is_err(), Ordering::AcqRel);
        synced
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check()?;
        self.inner.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.check()?;
        self.inner.close()
    }
}

/// Storage that is only read; writes to it stay in memory. redb repairs and tidies up what it
/// opens, and a check must not change anything.
#[derive(Debug)]
pub(super) struct Overlay {
    below: Storage,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    len: u64,
    /// How much of what is below shows through.
    below_len: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
}

const BLOCK: u64 = 4096;

impl Overlay {
    pub(super) fn over(below: Storage) -> io::Result<Storage> {
        let len = below.len()?;
        let written = Written { len, below_len: len, blocks: BTreeMap::new() };
        Ok(Storage::new(Arc::new(Overlay { below, written: Mutex::new(written) })))
    }

    /// The current contents of a block; bytes behind the end are zeros.
    fn block(&self, written: &Written, index: u64) -> io::Result<Vec<u8>> {
        if let Some(block) = written.blocks.get(&index) {
            return Ok(block.clone());
        }
        let mut block = vec![0; BLOCK as usize];
        let start = index * BLOCK;
        let len = written.below_len.saturating_sub(start).min(BLOCK) as usize;
        self.below.read(start, &mut block[..len])?;
        Ok(block)
    }
}

/// The parts of a range that lie in one block each: the block, and where in it.
fn blocks_of(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let end = offset + len as u64;
    (offset / BLOCK..end.div_ceil(BLOCK)).map(move |index| {
        let start = index * BLOCK;
        let from = offset.max(start) - start;
        let to = end.min(start + BLOCK) - start;
        (index, from as usize..to as usize)
    })
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.written.lock().len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.written.lock();
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > written.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut at = 0;
        for (index, part) in blocks_of(offset, out.len()) {
            let block = self.block(&written, index)?;
            out[at..at + part.len()].copy_from_slice(&block[part.clone()]);
            at += part.len();
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut written = self.written.lock();
        if len < written.len {
            let last = len / BLOCK;
            let mut edge = self.block(&written, last)?;
            edge[(len % BLOCK) as usize..].fill(0);
            written.blocks.retain(|&index, _| index < last);
            written.below_len = written.below_len.min(last * BLOCK);
            written.blocks.insert(last, edge);
        }
        written.len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.written.lock();
        let mut at = 0;
        for (index, part) in blocks_of(offset, data.len()) {
            let mut block = self.block(&written, index)?;
            block[part.clone()].copy_from_slice(&data[at..at + part.len()]);
            written.blocks.insert(index, block);
            at += part.len();
        }
        written.len = written.len.max(offset + data.len() as u64);
        Ok(())
    }
}

/// A file.
#[derive(Debug)]
struct FileStorage(File);

impl StorageBackend for FileStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn an_overlay_is_as_a_file_and_leaves_the_file_alone() {
        let seed = std::env::var("VMEM_SEED").map_or(5, |text| text.parse().unwrap());
        eprintln!("VMEM_SEED={seed}");
        let mut rng = SmallRng::seed_from_u64(seed);
        let file = tempfile::tempfile().unwrap();
        let mut expected: Vec<u8> = (0..30_000_u32).map(|n| (n % 251) as u8).collect();
        file.write_all_at(&expected, 0).unwrap();
        let below = expected.clone();
        let overlay = Overlay::over(Storage::of_file(file.try_clone().unwrap())).unwrap();
        for _ in 0..2_000 {
            let offset = rng.random_range(0..40_000);
            let len = rng.random_range(0..9_000);
            match rng.random_range(0..10) {
                0 => {
                    overlay.set_len(offset as u64).unwrap();
                    expected.resize(offset, 0);
                }
                1..4 => {
                    let data = vec![rng.random(); len];
                    overlay.write(offset as u64, &data).unwrap();
                    expected.resize(expected.len().max(offset + len), 0);
                    expected[offset..offset + len].copy_from_slice(&data);
                }
                _ => {
                    let mut read = vec![0; len];
                    let outcome = overlay.read(offset as u64, &mut read);
                    match expected.get(offset..offset + len) {
                        Some(bytes) => assert!(outcome.is_ok() && read == bytes),
                        None => assert!(outcome.is_err()),
                    }
                }
            }
            assert_eq!(overlay.len().unwrap(), expected.len() as u64);
        }
        let mut untouched = vec![0; below.len()];
        file.read_exact_at(&mut untouched, 0).unwrap();
        assert!(untouched == below && file.metadata().unwrap().len() == below.len() as u64);
    }
}
