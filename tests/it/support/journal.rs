//! Tasks that change names and say so before and after, and what the names may stand for then.
//!
//! Invariant: bytes and length of an object are a function of its task and version, so that a torn
//! mixture is seen; each task has two names of its own, so that a rename between them is seen half
//! done. Called by the tests of what survives.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::TryStreamExt;
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use vmem::{MemoryTier, PutOptions, VMemHandle, VirtualMemory, VirtualMemoryError};

/// Lengths of versions, in turn.
const LENS: [usize; 6] = [0, 100, 700, 65_536, 150_000, 1 << 20];

/// What one name stands for: a version of the bytes, and one of the metadata.
pub(crate) type Named = Option<(u64, u64)>;
/// What the two names of a task stand for.
pub(crate) type Pair = [Named; 2];
/// What was found under the two names of a task: bytes and metadata.
pub(crate) type Found = [Option<(Bytes, u64)>; 2];

/// Where changes are noted.
pub(crate) trait Journal: Send + Sync + 'static {
    /// A task is about to change what its names stand for to this.
    fn started(&self, task: usize, after: Pair);
    /// What it started last is durable.
    fn acknowledged(&self, task: usize);
}

pub(crate) fn name(task: usize, which: usize) -> String {
    format!("task {task}/{}", ["one", "other"][which])
}

/// The bytes of a version. `largest` bounds the lengths, for disks that are kept in memory.
pub(crate) fn bytes_of(task: usize, version: u64, largest: usize) -> Vec<u8> {
    let len = LENS[version as usize % LENS.len()];
    let len = if len > largest { len % 10_007 } else { len };
    let seed = (task as u64) << 56 ^ version.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let word = |at: u64| (seed ^ at).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_le_bytes();
    (0..len.div_ceil(8) as u64).flat_map(word).take(len).collect()
}

/// One task, and what it starts from.
pub(crate) struct Task {
    pub(crate) number: usize,
    pub(crate) state: Pair,
    /// The next version; none is used twice.
    pub(crate) version: u64,
    pub(crate) largest: usize,
    pub(crate) rng: SmallRng,
}

impl Task {
    /// Changes its two names `n` times, or up to the first error.
    pub(crate) async fn run(
        mut self,
        vmem: &VirtualMemory,
        journal: &dyn Journal,
        times: usize,
    ) -> Result<(), VirtualMemoryError> {
        for _ in 0..times {
            self.change(vmem, journal).await?;
        }
        Ok(())
    }

    async fn change(
        &mut self,
        vmem: &VirtualMemory,
        journal: &dyn Journal,
    ) -> Result<(), VirtualMemoryError> {
        let task = self.number;
        let which = self.rng.random_range(0..2);
        let own = name(task, which);
        let other = name(task, 1 - which);
        let home = if self.rng.random_bool(0.5) { MemoryTier::Host } else { MemoryTier::Disk };
        let operation = match self.state[which] {
            None => [0, 6, 7][self.rng.random_range(0..3)],
            Some(_) => self.rng.random_range(0..7),
        };
        self.version += 1;
        let mut after = self.state;
        match (operation, self.state[which]) {
            (2, Some((before, metadata))) => {
                // The length stays.
                let kinds = LENS.len() as u64;
                self.version += (before % kinds + kinds - self.version % kinds) % kinds;
                after[which] = Some((self.version, metadata));
            }
            (3, Some((bytes, _))) => after[which] = Some((bytes, self.version)),
            (4, Some(_)) => after = if which == 0 { [None, after[0]] } else { [after[1], None] },
            (5, Some(_)) => after[which] = None,
            (6, _) => after[which] = Some((self.version, self.version)),
            _ => after[which] = Some((self.version, 0)),
        }
        let bytes = bytes_of(task, self.version, self.largest);
        let mut written: Option<VMemHandle> = None;
        journal.started(task, after);
        match operation {
            2 => {
                let handle = vmem.open_named(&own).await?;
                if bytes.len() > 1 && self.rng.random_bool(0.5) {
                    let half = bytes.len() / 2;
                    vmem.write_at(&handle, 0, &bytes[..half]).await?;
                    vmem.write_at(&handle, half, &bytes[half..]).await?;
                } else {
                    vmem.write(&handle, &bytes).await?;
                }
                vmem.flush(&handle).await?;
                written = Some(handle);
            }
            3 => vmem.set_metadata(&own, &self.version.to_le_bytes()).await?,
            4 => vmem.rename_named(&own, &other).await?,
            5 => vmem.remove_named(&own).await?,
            6 => {
                let options = PutOptions::new(home).metadata(self.version.to_le_bytes().to_vec());
                drop(vmem.put_named_with(&own, &bytes, options).await?);
            }
            7 => {
                let handle = vmem.put(&bytes, home).await?;
                vmem.adopt(&handle, &own).await?;
            }
            _ => drop(vmem.put_named(&own, &bytes, home).await?),
        }
        journal.acknowledged(task);
        self.state = after;
        drop(written);
        // Beside it, what is never named.
        if self.rng.random_bool(0.3) {
            drop(vmem.put(&bytes[..bytes.len().min(5000)], MemoryTier::Disk).await?);
        }
        Ok(())
    }
}

/// What all names stand for. Nothing else takes space below host memory.
pub(crate) async fn found(vmem: &VirtualMemory, tasks: usize, block: usize) -> Vec<Found> {
    let found = found_in(vmem, tasks).await;
    let lens = found.iter().flatten().flatten().map(|(bytes, _)| bytes.len());
    let footprint: usize = lens.map(|len| len.next_multiple_of(block)).sum();
    let stats = vmem.stats();
    let used_bytes = stats.disk.used_bytes + stats.remote.used_bytes;
    assert_eq!(used_bytes, footprint as u64, "space that nothing leads to");
    found
}

/// What all names stand for.
pub(crate) async fn found_in(vmem: &VirtualMemory, tasks: usize) -> Vec<Found> {
    let entries: Vec<_> = vmem.names("").try_collect().await.unwrap();
    let mut found: Vec<Found> = vec![[None, None]; tasks];
    for entry in entries {
        let (task, which) = (0..tasks)
            .flat_map(|task| [(task, 0), (task, 1)])
            .find(|&(task, which)| *entry.name == *name(task, which))
            .expect("a name that was given");
        let handle = vmem.open_named(&entry.name).await.unwrap();
        let bytes = vmem.read(&handle).await.unwrap();
        let metadata = match entry.metadata.len() {
            0 => 0,
            _ => u64::from_le_bytes(entry.metadata[..].try_into().unwrap()),
        };
        found[task][which] = Some((Bytes::copy_from_slice(&bytes), metadata));
    }
    found
}

/// What the names of a task stand for in the middle of a change that is a rename, where the new
/// name is made before the old one goes.
pub(crate) fn half_renamed(before: Pair, after: Pair) -> Option<Pair> {
    [0, 1].into_iter().find_map(|which| {
        let moved = before[which]?;
        let is_rename = after[which].is_none() && after[1 - which] == Some(moved);
        is_rename.then_some([Some(moved); 2])
    })
}

/// The journal in memory: what the names of each task may stand for.
#[derive(Debug)]
pub(crate) struct May(pub(crate) Mutex<Vec<Vec<Pair>>>, AtomicUsize);

impl May {
    pub(crate) fn of(states: &[Pair]) -> Self {
        May(Mutex::new(states.iter().map(|&state| vec![state]).collect()), AtomicUsize::new(0))
    }

    /// How many changes were acknowledged.
    pub(crate) fn acknowledged_count(&self) -> usize {
        self.1.load(Ordering::SeqCst)
    }
}

impl Journal for May {
    fn started(&self, task: usize, after: Pair) {
        self.0.lock()[task].push(after);
    }

    fn acknowledged(&self, task: usize) {
        self.1.fetch_add(1, Ordering::SeqCst);
        let may = &mut self.0.lock()[task];
        *may = may.split_off(may.len() - 1);
    }
}

/// What the names of each task stand for, which is one of what they may.
pub(crate) fn settle(found: &[Found], may: &[Vec<Pair>], largest: usize, when: &str) -> Vec<Pair> {
    let settled = found.iter().zip(may).enumerate().map(|(task, (found, may))| {
        let right = may.iter().find(|pair| is(pair, found, task, largest));
        *right.unwrap_or_else(|| panic!("{when}, task {task}: {found:.80?}, allowed {may:?}"))
    });
    settled.collect()
}

/// Whether this is what was found.
pub(crate) fn is(pair: &Pair, found: &Found, task: usize, largest: usize) -> bool {
    pair.iter().zip(found).all(|(named, found)| match (named, found) {
        (None, None) => true,
        (Some((version, metadata)), Some((bytes, found))) => {
            metadata == found && bytes[..] == bytes_of(task, *version, largest)[..]
        }
        _ => false,
    })
}
