//! foyer, on the same data: its hybrid cache with everything in memory, and its memory cache.

use bytes::Bytes;
use foyer::{
    BlockEngineConfig, Cache, CacheBuilder, DeviceBuilder, FsDeviceBuilder, HybridCache,
    HybridCacheBuilder,
};
use tokio::runtime::{Builder, Runtime};

use crate::hot::Set;
use crate::report::thread_cpu_ns;

/// Both caches, filled.
pub(crate) struct Peers {
    _runtime: Runtime,
    _directory: tempfile::TempDir,
    hybrid: HybridCache<u64, Bytes>,
    memory: Cache<u64, Bytes>,
}

impl Peers {
    pub(crate) fn with(set: &Set) -> anyhow::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let directory = tempfile::tempdir()?;
        let capacity = 2 * set.len * set.count;
        let weigh = |_: &u64, value: &Bytes| value.len();
        let hybrid = runtime.block_on(async {
            let device = FsDeviceBuilder::new(directory.path()).with_capacity(256 << 20).build()?;
            let built = HybridCacheBuilder::new()
                .memory(capacity)
                .with_weighter(weigh)
                .storage()
                .with_engine_config(BlockEngineConfig::new(device))
                .build()
                .await?;
            anyhow::Ok(built)
        })?;
        let memory = CacheBuilder::new(capacity).with_weighter(weigh).build();
        for n in 0..set.count {
            hybrid.insert(n as u64, Bytes::from(set.bytes(n)));
            memory.insert(n as u64, Bytes::from(set.bytes(n)));
        }
        Ok(Peers { _runtime: runtime, _directory: directory, hybrid, memory })
    }

    /// Nanoseconds of CPU for one read: of the hybrid cache, and of the memory cache.
    pub(crate) async fn round(&self, order: &[usize]) -> (f64, f64) {
        let before = thread_cpu_ns();
        for &n in order {
            let entry = self.hybrid.get(&(n as u64)).await.expect("no error").expect("there");
            assert!(entry.value()[..8] == (n as u64).to_le_bytes(), "object {n}");
        }
        let between = thread_cpu_ns();
        for &n in order {
            let entry = self.memory.get(&(n as u64)).expect("there");
            assert!(entry.value()[..8] == (n as u64).to_le_bytes(), "object {n}");
        }
        let reads = order.len() as f64;
        ((between - before) / reads, (thread_cpu_ns() - between) / reads)
    }
}
