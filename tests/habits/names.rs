//! Scenario 44, in small: names that were touched and dropped do not stay in memory.
//!
//! Excluded: an entry by name that stays for the life of the store. Noticed by the resident memory
//! of a process of its own, whose slope over many names is far below what an entry takes; catalog
//! and host memory are small, and full before the measurement begins.

use std::path::Path;
use std::process::{Command, Stdio};

use futures::stream::{self, StreamExt, TryStreamExt};
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};

use crate::harness::{Threads, assert_none};
use crate::stores::{DISK, HOST, MIB, Sizes, config};

const CHILD: &str = "VMEM_TEST_HABITS_NAMES";
/// Names before the measurement, and within it. Those before fill host memory, and the line of
/// closed names.
const BEFORE: usize = 6_000;
const TOUCHED: usize = 9_000;
/// Resident memory that a name without a handle may take, in bytes: an entry takes several times as
/// much.
const BYTES_EACH: f64 = 120.0;
/// Objects that stay open all the time.
const OPEN: usize = 50;

/// What is done to each name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touch {
    /// It is made, and its handle dropped.
    Put,
    /// It is made by an allocation that is written, flushed and dropped.
    Allocate,
    /// It is made, and removed.
    Remove,
    /// An existing name is opened, read and dropped.
    Open,
    /// An existing name gets metadata and another name.
    Rename,
}

impl Touch {
    async fn one(self, vmem: &VirtualMemory, n: usize) -> Result<(), VirtualMemoryError> {
        let name = format!("a name of the usual length {n:07}");
        match self {
            Touch::Put => drop(vmem.put_named(&name, [n as u8; 100], DISK).await?),
            Touch::Allocate => {
                let handle = vmem.allocate_named(&name, 100, HOST).await?;
                vmem.write(&handle, [n as u8; 100]).await?;
                vmem.flush(&handle).await?;
            }
            Touch::Remove => {
                drop(vmem.put_named(&name, [n as u8; 100], DISK).await?);
                vmem.remove_named(&name).await?;
            }
            Touch::Open => {
                let handle = vmem.open_named(&name).await?;
                let read = vmem.read(&handle).await?;
                assert_eq!(read[..], [n as u8; 100]);
            }
            Touch::Rename => {
                vmem.set_metadata(&name, &n.to_le_bytes()).await?;
                vmem.rename_named(&name, &format!("{name} renamed")).await?;
            }
        }
        Ok(())
    }

    async fn all(self, vmem: &VirtualMemory, names: std::ops::Range<usize>) {
        let each = stream::iter(names).map(|n| self.one(vmem, n));
        each.buffer_unordered(128).try_collect::<Vec<()>>().await.unwrap();
    }
}

fn config_in(dir: &Path) -> VirtualMemoryConfig {
    let sizes = Sizes { space: MIB / 2, disk: 256 * MIB };
    let set =
        |builder: vmem::VirtualMemoryConfigBuilder| builder.disk_path(dir).catalog_cache(128 << 10);
    config(sizes, set).build().unwrap()
}

/// Resident memory of this process, in bytes.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 1024.0
}

/// In a child: touches the names, and prints what each took.
async fn measure(touch: Touch, dir: &Path) {
    let vmem = vmem::open(config_in(dir)).await.unwrap();
    let mut open: Vec<VMemHandle> = Vec::new();
    for n in 0..OPEN {
        open.push(vmem.put_named(&format!("open {n}"), [n as u8; 100], DISK).await.unwrap());
    }
    touch.all(&vmem, 0..BEFORE).await;
    settle().await;
    let before = resident();
    touch.all(&vmem, BEFORE..BEFORE + TOUCHED).await;
    settle().await;
    println!("SLOPE {}", (resident() - before) / TOUCHED as f64);
    // Those that are open are as they were.
    for (n, handle) in open.iter().enumerate() {
        assert_eq!(vmem.read(handle).await.unwrap()[..], [n as u8; 100]);
    }
    drop(open);
    vmem.close().await.unwrap();
}

async fn settle() {
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
}

/// Makes the names that the measurement finds.
async fn prepare(dir: &Path) {
    let vmem = vmem::open(config_in(dir)).await.unwrap();
    Touch::Put.all(&vmem, 0..BEFORE + TOUCHED).await;
    vmem.close().await.unwrap();
}

fn stays_flat(test: &str, touch: Touch) {
    let runtime = Threads::Two.runtime();
    if let Some(dir) = std::env::var_os(CHILD) {
        return runtime.block_on(measure(touch, Path::new(&dir)));
    }
    let dir = tempfile::tempdir().unwrap();
    if matches!(touch, Touch::Open | Touch::Rename) {
        runtime.block_on(prepare(dir.path()));
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("names::{test}"), "--nocapture"])
        .env(CHILD, dir.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let slope =
        text.lines().find_map(|line| line.split("SLOPE ").nth(1)?.trim().parse::<f64>().ok());
    let why = match slope {
        Some(slope) if slope <= BYTES_EACH => None,
        Some(slope) => Some(format!("{touch:?}: each name takes {slope:.0} bytes for good")),
        None => Some(format!("{touch:?}: {text}\n{}", String::from_utf8_lossy(&output.stderr))),
    };
    println!("{touch:?}: {slope:?} bytes each");

    assert_none(&Vec::from_iter(why));
}

#[test]
fn names_that_were_put_and_dropped_take_no_memory() {
    stays_flat("names_that_were_put_and_dropped_take_no_memory", Touch::Put);
}

#[test]
fn names_that_were_flushed_and_dropped_take_no_memory() {
    stays_flat("names_that_were_flushed_and_dropped_take_no_memory", Touch::Allocate);
}

#[test]
fn names_that_were_removed_take_no_memory() {
    stays_flat("names_that_were_removed_take_no_memory", Touch::Remove);
}

#[test]
fn names_that_were_opened_and_dropped_take_no_memory() {
    stays_flat("names_that_were_opened_and_dropped_take_no_memory", Touch::Open);
}

#[test]
fn names_that_were_renamed_take_no_memory() {
    stays_flat("names_that_were_renamed_take_no_memory", Touch::Rename);
}
