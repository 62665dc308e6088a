//! The first phase: every file becomes an object.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vmem::{MemoryTier, VirtualMemoryError};

use crate::files::{PIECE_BYTES, Source, read_piece};
use crate::work::{Stored, Work, blocking};

/// Why a file is not in the store.
enum Refused {
    /// It cannot be read.
    File(io::Error),
    /// The store did not take it.
    Store(VirtualMemoryError),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Refused::File(error)
    }
}

impl From<VirtualMemoryError> for Refused {
    fn from(error: VirtualMemoryError) -> Self {
        Refused::Store(error)
    }
}

impl Work {
    /// Puts every file into the store. What host memory has no space for goes to disk without
    /// further calls.
    pub(crate) async fn store(&self, paths: Vec<PathBuf>) -> Vec<Arc<Stored>> {
        let paths = Arc::new(paths);
        let next = Arc::new(AtomicUsize::new(0));
        let tasks = self.in_tasks(|work, _| {
            let paths = paths.clone();
            let next = next.clone();
            async move {
                let mut stored = Vec::new();
                while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                    stored.extend(work.store_or_tell(path.clone()).await.map(Arc::new));
                }
                stored
            }
        });
        let mut stored: Vec<_> = tasks.await.into_iter().flatten().collect();
        stored.sort_by(|a, b| a.source.path.cmp(&b.source.path));
        stored
    }

    async fn store_or_tell(&self, path: PathBuf) -> Option<Stored> {
        let shown = path.display().to_string();
        match self.store_one(path).await {
            Ok(stored) => {
                self.tally.files_stored.add(1);
                return Some(stored);
            }
            Err(Refused::File(error)) => self.tally.unreadable.push(format!("{shown}: {error}")),
            Err(Refused::Store(error)) => {
                self.tally.failed.push(format!("storing {shown}: {error}"));
            }
        }
        None
    }

    async fn store_one(&self, path: PathBuf) -> Result<Stored, Refused> {
        let (source, mut file) = blocking(move || Source::open(path)).await?;
        let len = source.len;
        if len <= PIECE_BYTES {
            let data = blocking(move || read_piece(&mut file, len)).await?;
            let handle = self.vmem.put(data, MemoryTier::Host).await?;
            self.tally.bytes_stored.add(len as u64);
            return Ok(Stored::new(source, handle));
        }
        // A large one goes in piece by piece, so that this program never has it all in memory.
        let handle = self.vmem.allocate(len, MemoryTier::Host).await?;
        for offset in (0..len).step_by(PIECE_BYTES) {
            let piece_len = PIECE_BYTES.min(len - offset);
            let read = blocking(move || Ok((read_piece(&mut file, piece_len)?, file)));
            let (piece, same_file) = read.await?;
            file = same_file;
            self.vmem.write_at(&handle, offset, piece).await?;
            self.tally.bytes_stored.add(piece_len as u64);
        }
        Ok(Stored::new(source, handle))
    }
}
