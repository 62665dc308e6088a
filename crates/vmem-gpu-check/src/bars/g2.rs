//! G2: disk to device memory, pipelined, against the slower of the raw disk and the raw link.
//!
//! Invariant: reads are cold, past the page cache where the disk allows that, of files of the same
//! age in the same folder, with as many in flight. Called by `bars`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use vmem::VMemHandle;

use super::pump::{By, pump};
use super::raw::{Link, Piece, Reader};
use super::report::{Limit, OURS, Report};
use super::timing::{Contender, in_turn, median};
use super::{Bench, DISK, Data, KIB, MIB, VRAM, each, shuffle};
use crate::parts::Outcome;
use crate::user::Env;

/// Objects in flight, and threads that read the disk by hand.
const IN_FLIGHT: usize = 16;
/// What direct reads are aligned to.
const ALIGNED: usize = 4096;

pub(super) fn run(env: &Env) -> Result<Outcome> {
    let len = env.scaled(4 * MIB, 512 * KIB);
    let count = env.scaled(256, 16);
    let all = len * count;
    let user = env.user()?;
    let mut report = Report::default();
    let data = Data::new(env, count, len);
    let folder = env.folder()?;
    // Both on the same disk, written one after the other.
    let set = |set: vmem::VirtualMemoryConfigBuilder| {
        set.disk_path(folder.path().join("store")).disk_capacity((2 * all + 64 * MIB) as u64)
    };
    let bench = Bench::open(env, all + all / 8 + 4 * MIB, all + all / 4 + 64 * MIB, set)?;
    let vmem = &bench.vmem;
    let mut objects: Vec<(usize, VMemHandle)> = bench.run(async {
        let mut objects = Vec::new();
        for object in 0..count {
            let handle = vmem.put(data.of(object, len), DISK).await?;
            vmem.flush(&handle).await?;
            vmem.demote(&handle, DISK).await?;
            objects.push((object, handle));
        }
        Ok(objects)
    })?;
    shuffle(env, &mut objects);
    let raw = RawFile::write(&folder.path().join("raw"), &data, count, len)?;
    let mut link = Link::new(&user, all, all, 2)?;
    for (object, bytes) in link.host()?.chunks_mut(len).enumerate() {
        bytes.copy_from_slice(data.of(object, len));
    }
    let pieces = Piece::row(count, len);
    let mut reader = Reader::new(&user, len)?;
    let mut ours = || {
        bench.run(async {
            let mut handles = Vec::new();
            for (_, handle) in &objects {
                vmem.demote(handle, DISK).await.context("demoting")?;
                handles.push(handle.clone());
            }
            let store = vmem.clone();
            let begun = Instant::now();
            each(handles, IN_FLIGHT, move |handle| {
                let vmem = store.clone();
                async move { Ok(vmem.promote(&handle, VRAM).await?) }
            })
            .await?;
            let took = begun.elapsed();
            for (object, handle) in &objects {
                let found = reader.object(vmem, handle).await?;
                report.same("in device memory", found, data.of(*object, len))?;
            }
            Ok(took.as_secs_f64())
        })
    };
    let mut contenders: [Contender<'_>; 3] = [
        (OURS, Box::new(&mut ours)),
        ("disk", Box::new(|| Ok(raw.read_all()?.as_secs_f64()))),
        ("link", Box::new(|| Ok(pump(&link, [&pieces, &[]], IN_FLIGHT, By::Piece)?.as_secs_f64()))),
    ];
    let times = in_turn(env.scaled(7, 1), &mut contenders)?;
    drop(contenders);
    raw.compare(&data, &mut report)?;
    for (object, bytes) in link.device()?.chunks(len).enumerate() {
        report.same("by hand", bytes, data.of(object, len))?;
    }

    let [t, disk, copy] = [OURS, "disk", "link"].map(|name| median(&times[name]));
    let slower = if disk >= copy { "disk" } else { "link" };
    let overlap = 1.0 - (t - disk.max(copy)) / disk.min(copy);
    let rates = times
        .iter()
        .map(|(&name, times)| {
            let rates = times.iter().map(|time| all as f64 / time / (1 << 30) as f64);
            (name, rates.collect())
        })
        .collect();
    report.judge("disk to device", "GiB/s", &rates, &[slower], Limit::AtLeast(0.9));
    let found = vmem.capabilities();
    // Where one takes most of the time, a small error of its time is a large one of what is left to
    // overlap.
    let balanced = disk.min(copy) / disk.max(copy) > 0.25;
    let cold = found.disk_direct && raw.direct && !found.disk_is_tmpfs;
    let overlap = match balanced && cold {
        true => report.hold("overlap", overlap, Limit::AtLeast(0.8)),
        false => json!({
            "value": overlap,
            "is_to_be": "not held: link and disk differ by more than four times, or reads are not \
                         direct",
        }),
    };
    report.tell("overlap", overlap);
    report.tell("slower", slower);
    report.tell(
        "disk",
        json!({
            "driver": &*found.disk, "direct": found.disk_direct, "raw_direct": raw.direct,
            "tmpfs": found.disk_is_tmpfs, "in_flight": IN_FLIGHT,
        }),
    );
    bench.close()?;
    report.end(env)
}

/// A file by hand.
struct RawFile {
    file: File,
    /// Past the page cache.
    direct: bool,
    count: usize,
    len: usize,
    /// One for each thread.
    buffers: Vec<std::sync::Mutex<Aligned>>,
}

/// Memory for direct reads.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGNED];
        let start = bytes.as_ptr().addr().next_multiple_of(ALIGNED) - bytes.as_ptr().addr();
        Aligned { bytes, start, len }
    }

    fn part(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}

impl RawFile {
    /// Writes the same objects, the same way.
    fn write(path: &Path, data: &Data, count: usize, len: usize) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        let direct = options.clone().custom_flags(libc::O_DIRECT).open(path);
        let (file, direct) = match direct {
            Ok(file) => (file, true),
            Err(_) => (options.open(path).context("making a file")?, false),
        };
        let mut buffer = Aligned::new(len);
        for object in 0..count {
            buffer.part().copy_from_slice(data.of(object, len));
            file.write_all_at(buffer.part(), (object * len) as u64).context("writing a file")?;
        }
        file.sync_all().context("writing a file")?;
        let buffers = (0..IN_FLIGHT).map(|_| Aligned::new(len).into()).collect();
        Ok(RawFile { file, direct, count, len, buffers })
    }

    /// Reads all of it on `threads` threads, and says how long that took.
    fn read_all(&self) -> Result<Duration> {
        self.each_object(|_, _| Ok(()))
    }

    /// Reads all of it once more, and compares.
    fn compare(&self, data: &Data, report: &mut Report) -> Result<()> {
        let report = std::sync::Mutex::new(report);
        self.each_object(|object, bytes| {
            let mut report = report.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            report.same("on disk by hand", bytes, data.of(object, self.len))
        })?;
        Ok(())
    }

    fn each_object(&self, seen: impl Fn(usize, &[u8]) -> Result<()> + Sync) -> Result<Duration> {
        let next = &AtomicUsize::new(0);
        let seen = &seen;
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let read = |buffer: &'_ std::sync::Mutex<Aligned>| {
                let mut buffer = buffer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                loop {
                    let object = next.fetch_add(1, Ordering::Relaxed);
                    if object >= self.count {
                        return anyhow::Ok(());
                    }
                    self.file.read_exact_at(buffer.part(), (object * self.len) as u64)?;
                    seen(object, buffer.part())?;
                }
            };
            let threads: Vec<_> =
                self.buffers.iter().map(|buffer| scope.spawn(move || read(buffer))).collect();
            for thread in threads {
                let done = thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
                done.context("reading a file")?;
            }
            anyhow::Ok(())
        })?;
        Ok(begun.elapsed())
    }
}
