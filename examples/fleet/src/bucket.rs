//! The bucket: of a server that the environment names, or a folder.
//!
//! Invariant: all processes of one run use the same prefix, and no other. Called by all roles.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::{ObjectStore, RetryConfig};
use vmem::{GpuSelection, VirtualMemory, VirtualMemoryConfig};
use vmem_remote::{RemoteOptions, RemoteTier};

use crate::Options;

/// The variable that names a server.
const ENDPOINT: &str = "VMEM_S3_ENDPOINT";

/// Where it is.
pub(crate) fn describe(options: &Options) -> String {
    match std::env::var(ENDPOINT) {
        Ok(endpoint) => endpoint,
        Err(_) => folder(options).display().to_string(),
    }
}

fn folder(options: &Options) -> &Path {
    options.directory.as_deref().unwrap_or(Path::new("."))
}

fn bucket(options: &Options) -> Result<Arc<dyn ObjectStore>> {
    let Ok(endpoint) = std::env::var(ENDPOINT) else {
        let folder = folder(options);
        let store = LocalFileSystem::new_with_prefix(folder);
        return Ok(Arc::new(store.with_context(|| format!("opening {}", folder.display()))?));
    };
    let name = std::env::var("VMEM_S3_BUCKET").context("VMEM_S3_BUCKET")?;
    // The tier tries again by itself, and knows when to stop.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let store = AmazonS3Builder::from_env()
        .with_endpoint(endpoint)
        .with_allow_http(true)
        .with_bucket_name(name)
        .with_retry(retry)
        .build();
    Ok(Arc::new(store.context("the client of the server")?))
}

/// A store over the bucket, with an empty disk; with `follow` it looks for what others have changed
/// after each such time.
pub(crate) async fn open(options: &Options, follow: Option<Duration>) -> Result<VirtualMemory> {
    let prefix = options.prefix.clone();
    let remote = RemoteOptions { prefix, follow, ..RemoteOptions::default() };
    let opened = RemoteTier::open_with_names(bucket(options)?, remote).await;
    let (tier, names) = opened.context("opening the bucket")?;
    let config = VirtualMemoryConfig::builder()
        .host_capacity(256 << 20)
        .disk_capacity(1 << 30)
        .gpu(GpuSelection::Off)
        .build()?;
    Ok(vmem::open_over_names(config, tier, names).await?)
}

/// Removes what the run has left; returns how many objects that were.
pub(crate) async fn remove_all(options: &Options) -> Result<usize> {
    let store = bucket(options)?;
    let prefix = object_store::path::Path::parse(&options.prefix)?;
    let left = store.list(Some(&prefix)).map_ok(|meta| meta.location).boxed();
    let removed: Vec<_> = store.delete_stream(left).try_collect().await?;
    Ok(removed.len())
}
