//! Names under random changes beside a model of what they stand for.
//!
//! Invariant: each task has names of its own, so that it knows what they stand for after each of
//! its changes; what it keeps a handle of keeps its bytes. Flushes, listings and snapshots of all
//! names go on meanwhile.

use bytes::Bytes;
use futures::TryStreamExt;
use rand::Rng;
use rand::rngs::SmallRng;
use vmem::{
    MemoryTier::{Disk, Host},
    PutOptions, VMemHandle, VirtualMemory, VirtualMemoryError,
};
use vmem_testkit::Seed;

use super::open;

/// What a name stands for: the number of its bytes, and of its metadata if it has any.
type Named = Option<(u64, Option<u64>)>;

const NAMES: usize = 6;

fn bytes_of(version: u64) -> Vec<u8> {
    const LENS: [usize; 5] = [0, 60, 900, 65_536, 140_000];
    version.to_le_bytes().into_iter().cycle().take(LENS[version as usize % LENS.len()]).collect()
}

/// One task: names of its own, what they stand for, and handles of versions that it keeps.
struct Task {
    number: usize,
    names: [Named; NAMES],
    version: u64,
    kept: Vec<(VMemHandle, u64)>,
    rng: SmallRng,
}

impl Task {
    fn name(&self, which: usize) -> String {
        format!("task {} name {which}", self.number)
    }

    fn next(&mut self) -> u64 {
        self.version += 1;
        (self.number as u64) << 40 | self.version
    }

    /// A version of the same length.
    fn next_like(&mut self, version: u64) -> u64 {
        loop {
            let next = self.next();
            if next % 5 == version % 5 {
                return next;
            }
        }
    }

    async fn change(&mut self, vmem: &VirtualMemory) -> Result<(), VirtualMemoryError> {
        let which = self.rng.random_range(0..NAMES);
        let name = self.name(which);
        let home = if self.rng.random_bool(0.5) { Host } else { Disk };
        let operation = self.rng.random_range(0..10);
        match (operation, self.names[which]) {
            (0 | 1, _) | (_, None) => {
                let version = self.next();
                let metadata = self.rng.random_bool(0.5).then_some(version);
                let options = PutOptions::new(home)
                    .metadata(metadata.map_or(Bytes::new(), |it| it.to_le_bytes().to_vec().into()));
                let handle = vmem.put_named_with(&name, bytes_of(version), options).await?;
                self.names[which] = Some((version, metadata));
                self.keep(handle, version);
            }
            (2, Some((version, metadata))) => {
                // Written and flushed, by a handle that goes then.
                let next = self.next_like(version);
                let handle = vmem.open_named(&name).await?;
                vmem.write(&handle, bytes_of(next)).await?;
                // What was kept of the object has changed with it.
                self.kept.retain(|(kept, _)| *kept != handle);
                if self.rng.random_bool(0.5) {
                    vmem.flush(&handle).await?;
                }
                if self.rng.random_bool(0.3) {
                    vmem.demote(&handle, Disk).await?;
                }
                self.names[which] = Some((next, metadata));
            }
            (3, Some((version, _))) => {
                let metadata = self.next();
                vmem.set_metadata(&name, &metadata.to_le_bytes()).await?;
                self.names[which] = Some((version, Some(metadata)));
            }
            (4, Some(named)) => {
                let to = self.rng.random_range(0..NAMES);
                vmem.rename_named(&name, &self.name(to)).await?;
                self.names[which] = None;
                self.names[to] = Some(named);
            }
            (5, Some(_)) => {
                vmem.remove_named(&name).await?;
                self.names[which] = None;
            }
            (6, Some((version, _))) => {
                let handle = vmem.open_named(&name).await?;
                self.keep(handle, version);
            }
            (7, Some((version, _))) => {
                let handle = vmem.open_named(&name).await?;
                vmem.promote(&handle, Host).await?;
                drop(handle);
                let handle = vmem.open_named(&name).await?;
                assert!(vmem.read(&handle).await? == bytes_of(version), "{name}: {version}");
            }
            _ => self.check(vmem, which).await?,
        }
        if self.rng.random_bool(0.3) {
            self.kept.pop();
        }
        Ok(())
    }

    /// Keeps a handle for a while: it leads to this version whatever happens to the name.
    fn keep(&mut self, handle: VMemHandle, version: u64) {
        if self.rng.random_bool(0.3) && self.kept.len() < 4 {
            self.kept.push((handle, version));
        }
    }

    async fn check(&self, vmem: &VirtualMemory, which: usize) -> Result<(), VirtualMemoryError> {
        let name = self.name(which);
        match self.names[which] {
            None => {
                let missing = vmem.open_named(&name).await;
                assert!(matches!(missing, Err(VirtualMemoryError::NameNotFound { .. })));
            }
            Some((version, metadata)) => {
                let (handle, entry) = vmem.open_entry(&name).await?;
                assert!(vmem.read(&handle).await? == bytes_of(version), "{name}: {version}");
                let stored = metadata.map_or(Vec::new(), |it| it.to_le_bytes().to_vec());
                assert_eq!(entry.metadata, stored, "{name}");
                drop(handle);
                assert_eq!(vmem.entry(&name).await?.metadata, stored, "{name}");
            }
        }
        for (handle, version) in &self.kept {
            assert!(vmem.read(handle).await? == bytes_of(*version), "kept {version}");
        }
        Ok(())
    }
}

#[test]
fn names_that_leave_at_once_stand_for_what_the_model_says() {
    const TASKS: usize = 8;
    Seed::run("closed names", |seed| {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build();
        runtime.unwrap().block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let mut vmem = open(directory.path(), 0).await;
            let mut tasks: Vec<_> = (0..TASKS)
                .map(|number| {
                    let rng = seed.fork_nth("task", number as u64).rng();
                    Task { number, names: [None; NAMES], version: 0, kept: Vec::new(), rng }
                })
                .collect();
            for round in 0..3 {
                let running = tasks.drain(..).map(|mut task| {
                    let vmem = vmem.clone();
                    tokio::spawn(async move {
                        for _ in 0..250 {
                            task.change(&vmem).await.unwrap();
                        }
                        for which in 0..NAMES {
                            task.check(&vmem, which).await.unwrap();
                        }
                        task
                    })
                });
                let running: Vec<_> = running.collect();
                let whole = whole_store(
                    vmem.clone(),
                    directory.path().join("..").join(format!(
                        "{}-snapshots-{round}",
                        directory.path().file_name().unwrap().display()
                    )),
                );
                let whole = tokio::spawn(whole);
                for task in running {
                    tasks.push(task.await.unwrap());
                }
                whole.await.unwrap();
                tasks.iter_mut().for_each(|task| task.kept.clear());
                vmem.flush_all().await.unwrap();
                footprint_is_that_of(&vmem, &tasks);
                vmem.close().await.unwrap();
                let verified = vmem_io::verify(directory.path()).unwrap();
                let named = tasks.iter().flat_map(|task| task.names).flatten().count();
                assert_eq!((verified.objects, verified.damaged.len()), (named as u64, 0));
                vmem = open(directory.path(), 0).await;
                for task in &tasks {
                    for which in 0..NAMES {
                        task.check(&vmem, which).await.unwrap();
                    }
                }
            }
            vmem.close().await.unwrap();
        });
    });
}

/// Nothing takes space on disk but what the names stand for.
fn footprint_is_that_of(vmem: &VirtualMemory, tasks: &[Task]) {
    let named = tasks.iter().flat_map(|task| task.names).flatten();
    let footprint: usize =
        named.map(|(version, _)| bytes_of(version).len().next_multiple_of(512)).sum();
    assert_eq!(vmem.stats().disk.used_bytes, footprint as u64, "space that nothing leads to");
}

/// What concerns all names at once, beside their changes: flushes, listings, snapshots that open.
async fn whole_store(vmem: VirtualMemory, snapshots: std::path::PathBuf) {
    for n in 0..4 {
        vmem.flush_all().await.unwrap();
        let entries: Vec<_> = vmem.names("").try_collect().await.unwrap();
        assert!(entries.windows(2).all(|two| two[0].name < two[1].name));
        let target = snapshots.join(format!("{n}"));
        std::fs::create_dir_all(&snapshots).unwrap();
        vmem.snapshot(&target).await.unwrap();
        let verified = vmem_io::verify(&target).unwrap();
        assert!(verified.damaged.is_empty(), "{verified:?}");
    }
    std::fs::remove_dir_all(&snapshots).unwrap();
}
