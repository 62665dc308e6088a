//! P13 with a mapped file: page cache instead of a store, faults on the threads for blocking work.
//!
//! Invariant: nothing of the file is in memory before the first read, so that all of its pages are
//! charged to the group of this process. Called by `table`.

#![allow(unsafe_code)]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Advice, Mmap};

use crate::side::{LEN, Reader, SET, bytes_of, check};
use crate::streams::{Buffer, MIB, direct};

#[derive(Clone)]
pub(crate) struct Mapped {
    file: Arc<Mmap>,
    reads: Arc<AtomicU64>,
}

impl Mapped {
    /// A file of all objects, one after the other.
    pub(crate) fn with(count: usize, directory: &Path) -> anyhow::Result<Self> {
        let file = direct(&directory.join("objects"))?;
        // Past the page cache, in pieces that end where an object does.
        let each = MIB / LEN / 8 * 8;
        let mut buffer = Buffer::new();
        for first in (0..count).step_by(each) {
            let bytes = buffer.bytes();
            for (nth, slot) in bytes.chunks_exact_mut(LEN).take(each).enumerate() {
                slot.copy_from_slice(&bytes_of(first + nth));
            }
            file.write_all_at(&bytes[..each * LEN], (first * LEN) as u64)?;
        }
        // SAFETY: the file has no other user, and does not change from here on.
        let file = unsafe { Mmap::map(&file)? };
        // Else a fault reads megabytes around it, and a group of this size reads without end.
        file.advise(Advice::Random)?;
        Ok(Mapped { file: Arc::new(file), reads: Arc::default() })
    }
}

impl Reader for Mapped {
    /// One piece of blocking work for a set, which leaves with the bytes: the mapping may lose them
    /// again before they are used.
    async fn read(&self, keys: Vec<usize>) -> anyhow::Result<()> {
        let file = self.file.clone();
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::with_capacity(SET * LEN);
            for &key in &keys {
                bytes.extend_from_slice(&file[key * LEN..(key + 1) * LEN]);
            }
            (keys, bytes)
        });
        let (keys, bytes) = read.await?;
        for (key, bytes) in keys.iter().zip(bytes.chunks_exact(LEN)) {
            check(*key, bytes)?;
        }
        self.reads.fetch_add(keys.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// By the faults that went to disk: an object that lies in two pages may have two.
    fn hit_ratio(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        let fields = stat.rsplit(')').next().unwrap_or("");
        let faults: u64 = fields.split_whitespace().nth(9).unwrap_or("").parse()?;
        Ok(1.0 - faults as f64 / self.reads.load(Ordering::Relaxed) as f64)
    }
}
