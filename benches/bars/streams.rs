//! P17: an object copied to another one by `reader` and `writer`, beside a file copied with direct
//! I/O.
//!
//! Both copies are of the same bytes, in the same file system, in turns; none is synced, since both
//! go past the page cache. The peer reads and writes 1 MiB at a time, one after the other; and, the
//! better one, with one thread that reads and another that writes. What was copied is compared
//! once, at the end.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Builder;
use vmem::{MemoryTier, Promotion, VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::report::{Bar, Report, Rounds, process_cpu_ns};

pub(crate) const MIB: usize = 1 << 20;
const ALIGNMENT: usize = 4096;

/// Nanoseconds for each MiB: on the clock, and of CPU.
type Cost = (f64, f64);

pub(crate) fn p17(report: &mut Report, mib: usize, rounds: usize) -> anyhow::Result<()> {
    let place = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target"))?;
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let config = VirtualMemoryConfig::builder()
        .disk_path(place.path().join("store"))
        .host_capacity(64 << 20)
        .stream_capacity(16 << 20)
        .disk_capacity((3 * mib * MIB) as u64)
        .promotion(Promotion::Never)
        .build()?;
    let vmem = runtime.block_on(vmem::open(config))?;
    let from = runtime.block_on(async {
        let mut writer = vmem.writer(MemoryTier::Disk);
        for nth in 0..mib {
            writer.write_all(&piece(nth)).await?;
        }
        anyhow::Ok(writer.commit().await?)
    })?;
    let source = place.path().join("source");
    let file = direct(&source)?;
    let mut buffer = Buffer::new();
    for nth in 0..mib {
        buffer.bytes().copy_from_slice(&piece(nth));
        file.write_all_at(buffer.bytes(), (nth * MIB) as u64)?;
    }
    drop(file);
    let [mut ours, mut plain, mut threaded]: [[Rounds; 2]; 3] = Default::default();
    let mut copied = None;
    for round in 0..=rounds {
        drop(copied.take());
        let (copy, our) = runtime.block_on(copy_object(&vmem, &from, mib))?;
        copied = Some(copy);
        let target = place.path().join("target");
        let one = timed(mib, || copy_file(&source, &target, mib))?;
        std::fs::remove_file(&target)?;
        let other = timed(mib, || copy_file_threaded(&source, &target, mib))?;
        std::fs::remove_file(&target)?;
        if round > 0 {
            for (side, cost) in [(&mut ours, our), (&mut plain, one), (&mut threaded, other)] {
                side[0].0.push(cost.0);
                side[1].0.push(cost.1);
            }
        }
    }
    if let Some(copy) = &copied {
        runtime.block_on(compare(&vmem, copy, mib))?;
    }
    for (peer, theirs) in [("direct-copy", &plain), ("direct-copy-two-threads", &threaded)] {
        for (nth, unit) in ["ns/MiB", "ns CPU/MiB"].into_iter().enumerate() {
            let what = format!("{mib} MiB through reader and writer");
            let bar = (nth == 0 && peer == "direct-copy").then_some(1.0 / 0.9);
            let ours = &ours[nth];
            let theirs = &theirs[nth];
            report.add(&Bar { id: "P17", what, unit, ours, peer, theirs, bar });
        }
    }
    drop((copied, from));
    runtime.block_on(vmem.close())?;
    Ok(())
}

/// The bytes of one MiB: no two are the same.
fn piece(nth: usize) -> Vec<u8> {
    let word = |at: usize| ((nth * MIB + at) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..MIB / 8).flat_map(|at| word(at * 8).to_le_bytes()).collect()
}

fn timed(mib: usize, copy: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Cost> {
    let began = Instant::now();
    let cpu = process_cpu_ns();
    copy()?;
    let each = mib as f64;
    Ok((began.elapsed().as_nanos() as f64 / each, (process_cpu_ns() - cpu) / each))
}

async fn copy_object(
    vmem: &VirtualMemory,
    from: &VMemHandle,
    mib: usize,
) -> anyhow::Result<(VMemHandle, Cost)> {
    let began = Instant::now();
    let cpu = process_cpu_ns();
    let mut reader = vmem.reader(from, ..).window(MIB);
    let mut writer = vmem.writer(MemoryTier::Disk).window(MIB);
    let copied = tokio::io::copy_buf(&mut reader, &mut writer).await?;
    anyhow::ensure!(copied == (mib * MIB) as u64, "{copied} bytes were copied");
    let handle = writer.commit().await?;
    let each = mib as f64;
    Ok((handle, (began.elapsed().as_nanos() as f64 / each, (process_cpu_ns() - cpu) / each)))
}

async fn compare(vmem: &VirtualMemory, copy: &VMemHandle, mib: usize) -> anyhow::Result<()> {
    let mut reader = vmem.reader(copy, ..);
    let mut read = vec![0; MIB];
    for nth in 0..mib {
        reader.read_exact(&mut read).await?;
        anyhow::ensure!(read == piece(nth), "MiB {nth} of the copy");
    }
    Ok(())
}

/// A file past the page cache, made if it is not there.
pub(crate) fn direct(path: &Path) -> anyhow::Result<File> {
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let mut options = OpenOptions::new();
    Ok(options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(flags)
        .open(path)?)
}

/// A MiB that direct I/O takes.
pub(crate) struct Buffer {
    memory: Vec<u8>,
    start: usize,
}

impl Buffer {
    pub(crate) fn new() -> Self {
        let memory = vec![0; MIB + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Buffer { memory, start }
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + MIB]
    }
}

fn copy_file(source: &Path, target: &Path, mib: usize) -> anyhow::Result<()> {
    let source = direct(source)?;
    let target = direct(target)?;
    let mut buffer = Buffer::new();
    for nth in 0..mib {
        source.read_exact_at(buffer.bytes(), (nth * MIB) as u64)?;
        target.write_all_at(buffer.bytes(), (nth * MIB) as u64)?;
    }
    Ok(())
}

fn copy_file_threaded(source: &Path, target: &Path, mib: usize) -> anyhow::Result<()> {
    let source = direct(source)?;
    let target = direct(target)?;
    let (full, to_write) = sync_channel::<Buffer>(4);
    let (empty, to_fill) = sync_channel::<Buffer>(4);
    for _ in 0..4 {
        empty.send(Buffer::new())?;
    }
    std::thread::scope(|scope| {
        let reading = scope.spawn(move || {
            for nth in 0..mib {
                let mut buffer = to_fill.recv()?;
                source.read_exact_at(buffer.bytes(), (nth * MIB) as u64)?;
                full.send(buffer)?;
            }
            anyhow::Ok(())
        });
        for (nth, mut buffer) in to_write.into_iter().enumerate() {
            target.write_all_at(buffer.bytes(), (nth * MIB) as u64)?;
            // The reader may have ended.
            let _ = empty.send(buffer);
        }
        reading.join().map_err(|_| anyhow::anyhow!("the reading thread panicked"))?
    })
}
