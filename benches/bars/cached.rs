//! P13 with foyer: its hybrid cache, which holds every object on disk and some in memory.
//!
//! Invariant: no object is lost. It is filled with waits, since foyer drops what its buffers have
//! no space for, and its device has space for all; a key that it does not know is an error. Called
//! by `table`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use bytes::Bytes;
use foyer::{
    BlockEngineConfig, DeviceBuilder, EvictionConfig, FsDeviceBuilder, HybridCache,
    HybridCacheBuilder, HybridCachePolicy, IoEngineConfig, LfuConfig, LruConfig,
    PsyncIoEngineConfig, RecoverMode, S3FifoConfig, Source, UringIoEngineConfig,
};
use futures::future::join_all;

use crate::side::{Reader, bytes_of, check};

/// Engines and policies: the best of them, in this run, is the peer.
pub(crate) const CONFIGURATIONS: [&str; 4] =
    ["psync-lru", "psync-s3fifo", "psync-lfu", "io_uring-s3fifo"];

/// What an object takes on disk: whole pages.
const STORED_BYTES: usize = 4096;
/// Its buffers for writes: no more than loading needs, since they take memory from objects.
const BUFFERS: usize = 8 << 20;
/// Objects that are inserted before it is waited for: half of its buffers.
const INSERTED_AT_ONCE: usize = BUFFERS / 2 / STORED_BYTES;

#[derive(Clone)]
pub(crate) struct Cached {
    cache: HybridCache<u64, Bytes>,
    reads: Arc<Reads>,
}

/// Objects read so far, and those of them that memory served.
#[derive(Default)]
struct Reads {
    all: AtomicU64,
    hits: AtomicU64,
}

impl Cached {
    /// A full cache with so much memory for objects, of this configuration.
    pub(crate) async fn with(
        count: usize,
        directory: &Path,
        capacity_bytes: usize,
        configuration: &str,
    ) -> anyhow::Result<Self> {
        let (engine, policy) = configuration.split_once('-').context("an engine and a policy")?;
        let engine: Box<dyn IoEngineConfig> = match engine {
            "io_uring" => Box::new(UringIoEngineConfig::new()),
            _ => Box::new(PsyncIoEngineConfig::new()),
        };
        let policy: EvictionConfig = match policy {
            "s3fifo" => S3FifoConfig::default().into(),
            "lfu" => LfuConfig::default().into(),
            _ => LruConfig::default().into(),
        };
        let device = FsDeviceBuilder::new(directory)
            .with_capacity(count * STORED_BYTES / 4 * 5 + (256 << 20))
            .with_direct(true)
            .build()?;
        let cache = HybridCacheBuilder::new()
            .with_policy(HybridCachePolicy::WriteOnInsertion)
            .memory(capacity_bytes)
            .with_eviction_config(policy)
            .with_weighter(|_: &u64, value: &Bytes| value.len())
            .storage()
            .with_io_engine_config(engine)
            .with_engine_config(BlockEngineConfig::new(device).with_buffer_pool_size(BUFFERS))
            .with_recover_mode(RecoverMode::None)
            .build()
            .await?;
        for key in 0..count {
            cache.insert(key as u64, Bytes::copy_from_slice(&bytes_of(key)));
            if (key + 1) % INSERTED_AT_ONCE == 0 {
                cache.storage().wait().await;
            }
        }
        cache.storage().wait().await;
        Ok(Cached { cache, reads: Arc::default() })
    }
}

impl Reader for Cached {
    async fn read(&self, keys: Vec<usize>) -> anyhow::Result<()> {
        let gets = keys.iter().map(|&key| self.cache.get(&(key as u64)));
        let mut hits = 0;
        for (key, got) in keys.iter().zip(join_all(gets).await) {
            let entry = got?.with_context(|| format!("foyer lost object {key}"))?;
            check(*key, entry.value())?;
            hits += u64::from(entry.source() != Source::Disk);
        }
        self.reads.all.fetch_add(keys.len() as u64, Ordering::Relaxed);
        self.reads.hits.fetch_add(hits, Ordering::Relaxed);
        Ok(())
    }

    fn hit_ratio(&self) -> anyhow::Result<f64> {
        let all = self.reads.all.load(Ordering::Relaxed);
        Ok(self.reads.hits.load(Ordering::Relaxed) as f64 / all as f64)
    }
}
