//! An object store as the tier of vmem below the disk.
//!
//! [`RemoteTier`] is a [`Tier`](vmem_core::backend::Tier) over any
//! [`ObjectStore`](object_store::ObjectStore): chunks that arrive together are put together, as
//! *segments* of up to 16 MiB, and read by ranges. It keeps a budget, checks what comes back,
//! deletes what is no longer used, and fails fast while the object store does.
//!
//! ```
//! use std::sync::Arc;
//! use object_store::memory::InMemory;
//! use vmem::{MemoryTier, VirtualMemoryConfig};
//! use vmem_remote::{RemoteOptions, RemoteTier};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = VirtualMemoryConfig::builder().host_capacity(16 << 20).disk_capacity(64 << 20);
//! // Any object store: S3, Google Cloud Storage, Azure, a directory.
//! let bucket = Arc::new(InMemory::new());
//! let remote = RemoteTier::open(bucket, RemoteOptions::default()).await?;
//! let vmem = vmem::open_over(config.build()?, remote).await?;
//!
//! let handle = vmem.put(b"an embedding", MemoryTier::Remote).await?;
//! assert_eq!(&vmem.read(&handle).await?[..], b"an embedding");
//! vmem.close().await?;
//! # Ok(())
//! # }
//! ```
//!
//! [`BucketCatalog`] keeps names in the object store itself, and several instances may share them:
//! each change of a name has one winner. With [`RemoteTier::open_with_names`] and
//! `vmem::open_over_names` objects that have a name are durable in the bucket:
//!
//! ```
//! # use std::sync::Arc;
//! # use object_store::memory::InMemory;
//! # use vmem::{MemoryTier, VirtualMemoryConfig};
//! # use vmem_remote::{RemoteOptions, RemoteTier};
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = || VirtualMemoryConfig::builder().host_capacity(16 << 20).disk_capacity(64 << 20);
//! let bucket = Arc::new(InMemory::new());
//! let (tier, names) =
//!     RemoteTier::open_with_names(bucket.clone(), RemoteOptions::default()).await?;
//! let vmem = vmem::open_over_names(config().build()?, tier, names).await?;
//! vmem.put_named("weights", b"bytes", MemoryTier::Host).await?;
//! vmem.close().await?;
//!
//! // Another machine, with an empty disk.
//! let (tier, names) = RemoteTier::open_with_names(bucket, RemoteOptions::default()).await?;
//! let vmem = vmem::open_over_names(config().build()?, tier, names).await?;
//! let handle = vmem.open_named("weights").await?;
//! assert_eq!(&vmem.read(&handle).await?[..], b"bytes");
//! vmem.close().await?;
//! # Ok(())
//! # }
//! ```
//!
//! What nobody needs any more is deleted by [`BucketCatalog::collect`] and
//! [`BucketCatalog::collect_segments`], or by itself with [`RemoteOptions::collect`]: what names
//! led to, and what a process left behind that was killed.
//!
//! # Layout
//!
//! In the order in which data flows. `tier`: the trait, and `open`, which tries the bucket first;
//! `buffers`, `gather` and `write`: calls become segments; `plan` and `read`: chunks become
//! requests; `ledger`: what is where; `tidy`: deletion and compaction; `lease`: what of it stays in
//! the bucket, for collectors; `catalog`: names, and collectors; `client` and `circuit`: requests,
//! bounded and tried again; `error`: what of their failures may be shown.

mod buffers;
mod catalog;
mod circuit;
mod client;
mod error;
mod gather;
mod inner;
mod lease;
mod ledger;
mod open;
mod options;
mod plan;
mod read;
mod stats;
mod tidy;
mod tier;
mod write;

pub use catalog::{BucketCatalog, CollectedSegments, Place, Places};
pub use error::{OpenError, RequestError};
pub use object_store;
pub use options::RemoteOptions;
pub use stats::RemoteStats;
pub use tier::RemoteTier;
pub use uuid::Uuid;
