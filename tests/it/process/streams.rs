//! Streams of more than memory holds, by what the process really takes. In a child, since the
//! memory that is measured is that of the whole process.
//!
//! Excluded: windows that no budget counts, and pages that stay once bytes have passed.

#![cfg(target_os = "linux")]

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Builder;
use vmem::VirtualMemoryConfig;

use super::budget::resident_bytes;
use crate::support::process::alone;
use crate::support::{DISK, HOST, MIB, bytes};

const STREAMED: u64 = 300;
const HOST_CAPACITY: usize = 64 * MIB;
const STREAM_CAPACITY: usize = 4 * MIB;
/// The catalog's cache, threads and their stacks, the heap's slack, the test's own buffers, and
/// what the disk driver has in flight.
const CONSTANT: usize = 32 * MIB;

#[test]
fn streams_of_300_mebibytes_take_no_more_than_the_budgets() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let test = "streams_of_300_mebibytes_take_no_more_than_the_budgets";
    alone(module_path!(), test, || runtime.block_on(written_and_read()));
}

async fn written_and_read() {
    let directory = tempfile::tempdir().unwrap();
    let config = VirtualMemoryConfig::builder()
        .disk_path(directory.path())
        .io_driver(vmem_testkit::driver_under_test())
        .host_capacity(HOST_CAPACITY as u64)
        .stream_capacity(STREAM_CAPACITY as u64)
        .disk_capacity(2 * STREAMED * MIB as u64);
    let before = resident_bytes();
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let mut peak = 0;
    for home in [HOST, DISK] {
        let mut writer = vmem.writer(home);
        for part in 0..STREAMED {
            writer.write_all(&bytes(part, 1, MIB)).await.unwrap();
            peak = peak.max(resident_bytes());
        }
        let handle = writer.commit().await.unwrap();
        let mut reader = vmem.reader(&handle, ..);
        let mut read = vec![0; MIB];
        for part in 0..STREAMED {
            reader.read_exact(&mut read).await.unwrap();
            assert!(read == bytes(part, 1, MIB), "part {part}");
            peak = peak.max(resident_bytes());
        }
        assert_eq!(reader.read(&mut read).await.unwrap(), 0, "it ends");
        drop((reader, handle));
    }
    let taken = peak.saturating_sub(before);
    let allowed = HOST_CAPACITY + STREAM_CAPACITY + CONSTANT;
    println!("{taken} bytes resident at most, {allowed} allowed");
    assert!(taken <= allowed, "{taken} bytes resident, {allowed} allowed: {:?}", vmem.stats());
    vmem.close().await.unwrap();
}
