//! The second phase, skewed random reads, and the third, a sweep over every byte.

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Zipf};
use vmem::{MemoryTier, VirtualMemoryError};

use crate::work::{Once, Stored, Work};

/// The skew: the most wanted file is read twice as often as the second, thrice as the third.
const ZIPF_EXPONENT: f64 = 1.0;
/// Bytes of one partial read, at most.
const PART_BYTES: usize = 1 << 20;

impl Work {
    /// Reads for a while: a few files often, most of them seldom, as the clients of services do.
    pub(crate) async fn read_skewed(&self, stored: &[Arc<Stored>], length: Duration, seed: u64) {
        let Ok(zipf) = Zipf::new(stored.len() as f64, ZIPF_EXPONENT) else { return };
        let mut ranked = stored.to_vec();
        ranked.shuffle(&mut SmallRng::seed_from_u64(seed));
        let ranked = Arc::new(ranked);
        let end = Instant::now() + length;
        let tasks = self.in_tasks(|work, task| {
            let ranked = ranked.clone();
            async move {
                let mut rng = SmallRng::seed_from_u64(seed ^ (u64::from(task) + 1).rotate_left(32));
                while Instant::now() < end {
                    let rank = zipf.sample(&mut rng) as usize - 1;
                    work.read_somehow(&ranked, rank, &mut rng).await;
                }
            }
        });
        tasks.await;
    }

    async fn read_somehow(&self, ranked: &[Arc<Stored>], rank: usize, rng: &mut SmallRng) {
        let stored = &ranked[rank];
        let len = stored.handle.len();
        let start = rng.random_range(0..=len);
        let end = len.min(start + rng.random_range(0..=PART_BYTES));
        let fits_host = len as u64 <= self.vmem.stats().host.capacity_bytes;
        match rng.random_range(0..100) {
            0..65 if fits_host => self.read_whole(stored).await,
            65..85 => {
                self.tally.range_reads.add(1);
                let read = self.vmem.read_at(&stored.handle, start..end).await;
                self.judge(stored, start, read).await;
            }
            95.. => {
                // The next one may be wanted soon: prefetch it, and do not wait for it.
                let next = &ranked[(rank + 1) % ranked.len()];
                self.tally.prefetches.add(1);
                self.vmem.prefetch(&next.handle, MemoryTier::Host).detach();
            }
            _ => drop(self.read_into(stored, start, vec![0; end - start]).await),
        }
    }

    /// Reads every file from its first byte to its last, the largest first.
    pub(crate) async fn sweep(&self, stored: &[Arc<Stored>]) {
        let mut sorted = stored.to_vec();
        sorted.sort_by_key(|stored| Reverse(stored.handle.len()));
        let sorted = Arc::new(sorted);
        let next = Arc::new(AtomicUsize::new(0));
        let tasks = self.in_tasks(|work, _| {
            let sorted = sorted.clone();
            let next = next.clone();
            async move {
                while let Some(stored) = sorted.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work.read_whole(stored).await;
                }
            }
        });
        tasks.await;
    }

    /// Reads all bytes of one file: as `Bytes`, if host memory can hold them.
    async fn read_whole(&self, stored: &Arc<Stored>) {
        let same = match self.vmem.read(&stored.handle).await {
            Err(VirtualMemoryError::ExceedsCapacity { .. }) => self.read_in_parts(stored).await,
            read => {
                self.tally.whole_reads.add(1);
                self.judge(stored, 0, read).await.is_some()
            }
        };
        if same && stored.first(Once::Compared) {
            self.tally.files_compared.add(1);
        }
    }

    /// Reads all bytes of a file that is larger than host memory, through a buffer of ours; says
    /// whether they were right.
    async fn read_in_parts(&self, stored: &Arc<Stored>) -> bool {
        let len = stored.handle.len();
        let mut buffer = vec![0; PART_BYTES.min(len)];
        for start in (0..len).step_by(PART_BYTES) {
            buffer.truncate(len - start);
            match self.read_into(stored, start, buffer).await {
                Some(same) => buffer = same,
                None => return false,
            }
        }
        true
    }

    /// Fills the buffer with the bytes from `start` on; gives it back if they are right.
    async fn read_into(
        &self,
        stored: &Arc<Stored>,
        start: usize,
        mut buffer: Vec<u8>,
    ) -> Option<Vec<u8>> {
        self.tally.reads_into.add(1);
        let range = start..start + buffer.len();
        let read = self.vmem.read_into(&stored.handle, range, &mut buffer).await;
        self.judge(stored, start, read.map(|()| buffer)).await
    }
}
