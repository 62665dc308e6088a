//! A vmem store as an [`ObjectStore`](object_store::ObjectStore).
//!
//! Whatever reads and writes through the `object_store` crate (DataFusion, Delta Lake, Lance, ...)
//! works over a [`VirtualMemory`](vmem_core::VirtualMemory): objects lie on disk, hot ones are
//! promoted to host memory, and neither tier exceeds its budget.
//!
//! ```
//! use object_store::path::Path;
//! use object_store::{ObjectStoreExt, PutMode};
//! use vmem::VirtualMemoryConfig;
//! use vmem_object_store::Store;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = VirtualMemoryConfig::builder().host_capacity(16 << 20).disk_capacity(64 << 20);
//! let store = Store::new(vmem::open(config.build()?).await?);
//!
//! let path = Path::from("reports/2026/summary.txt");
//! store.put(&path, "all is well".into()).await?;
//! assert_eq!(store.get_range(&path, 7..11).await?, "well");
//!
//! // What the path stands for is an ordinary named object.
//! let handle = store.vmem().open_named("reports/2026/summary.txt").await?;
//! assert_eq!(&store.vmem().read(&handle).await?[..], b"all is well");
//! # drop(handle);
//! # Ok(())
//! # }
//! ```
//!
//! # What maps to what
//!
//! - A path is a name: the same string, behind the store's [prefix](Store::with_prefix) if it has
//!   one. Names that are no paths (`a//b`, `/a`, control characters) are not listed.
//! - `e_tag` is the [version](vmem_core::NamedEntry::version) of the name; a put, also one with the
//!   same bytes, gives another one. `ObjectMeta::version` is none, since no version but the current
//!   one is kept. `GetOptions::version` and `UpdateVersion` take the number too.
//! - Attributes are the metadata of the name, as JSON: 4,096 bytes at most. Metadata that are
//!   something else read as no attributes, and a copy keeps them. Tags are ignored.
//! - A put is durable on return. A deletion of something that does not exist succeeds.
//!
//! # What is in memory meanwhile
//!
//! Bodies come in windows, of one version from start to end, out of the reserve for streams
//! ([`stream_capacity`]): nothing that a slow consumer keeps takes object space. Puts in pieces,
//! copies and uploads go through windows too. Only what `get_ranges` is asked for lies in the
//! caller's memory at once.
//!
//! The parts of an upload go into its object as they come in order. One that comes out of turn, or
//! while another is written, is an unnamed object on disk until its turn, and then copied: parts
//! that are uploaded one after the other are written once, those that are uploaded at once are
//! mostly written twice.
//!
//! [`stream_capacity`]: vmem_core::VirtualMemoryConfigBuilder::stream_capacity
//!
//! # Errors
//!
//! Those that `object_store` has a kind for are of that kind, all others `Generic`; the source of
//! each is a [`VirtualMemoryError`](vmem_core::VirtualMemoryError) or a [`RequestError`].
//!
//! # Layout
//!
//! `store`: the trait; `names`: paths and names; `attributes`: what is stored beside the bytes;
//! `body`: the bodies of gets and puts; `listing`; `upload` and `parts`: uploads that take several
//! calls; `error`.

mod attributes;
mod body;
mod error;
mod listing;
mod names;
mod parts;
mod store;
mod upload;

pub use error::RequestError;
pub use object_store;
pub use store::Store;
