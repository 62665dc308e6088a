//! Named objects: those that are found again after a restart.
//!
//! Invariant: every change of a name runs as a task of its own (`change.rs`), which has the turn of
//! the name.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, TryStreamExt};

use super::entries::{ListOptions, Listed, NamedEntry, PutMode, PutOptions};
use super::{Result, VirtualMemory};
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;
use crate::names::{self, Turn};
use crate::object::Object;

impl VirtualMemory {
    /// [`allocate`](Self::allocate) under a name: 1 to 1024 bytes of UTF-8. The name, and zeros,
    /// become durable with the first [`flush`](Self::flush); the object stays although its last
    /// handle is dropped.
    ///
    /// # Errors
    ///
    /// `NameExists`, `InvalidConfig` for a name that cannot be one, those of `allocate`, `Damaged`,
    /// `Io`.
    pub async fn allocate_named(
        &self,
        name: &str,
        len: usize,
        home: MemoryTier,
    ) -> Result<VMemHandle> {
        let name = self.check_named(name)?;
        let handle = self.allocate(len, home).await?;
        self.change(move |names, deadline| async move {
            let turn = Turn::of(&names, name, &deadline).await?;
            names::allocate(&names, &turn, &handle).await?;
            Ok(handle)
        })
        .await
    }

    /// Stores these bytes under a name: the object is created, or atomically takes the name from
    /// the one that has it, whose handles keep the old version. Durable on return. The metadata of
    /// the name start empty.
    ///
    /// ```
    /// # use vmem::{MemoryTier, VirtualMemoryConfig};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let directory = tempfile::tempdir().unwrap();
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let config = config.disk_path(directory.path()).build()?;
    /// let vmem = vmem::open(config.clone()).await?;
    /// let first = vmem.put_named("adapter", b"one", MemoryTier::Host).await?;
    /// vmem.put_named("adapter", b"two", MemoryTier::Host).await?;
    /// assert_eq!(&vmem.read(&first).await?[..], b"one");
    /// # drop(first);
    /// vmem.close().await?;
    ///
    /// let again = vmem::open(config).await?;
    /// let handle = again.open_named("adapter").await?;
    /// assert_eq!(&again.read(&handle).await?[..], b"two");
    /// # drop(handle);
    /// # again.close().await
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put); `InvalidConfig` for a name that cannot be one; `Damaged`, `Io`.
    /// If making it durable failed, the name leads to the previous version, or, after a crash,
    /// perhaps to this one.
    pub async fn put_named(
        &self,
        name: &str,
        data: impl AsRef<[u8]> + Send,
        home: MemoryTier,
    ) -> Result<VMemHandle> {
        self.put_named_with(name, data, PutOptions::new(home)).await
    }

    /// The object that has this name.
    ///
    /// # Errors
    ///
    /// `NameNotFound`; `InvalidConfig` for a name that cannot be one; `TierNotAvailable` if its
    /// home tier is not there; `Damaged`, `Io`.
    pub async fn open_named(&self, name: &str) -> Result<VMemHandle> {
        let name = self.check_named(name)?;
        if let Some(handle) = self.names.get(&name) {
            return self.with_home(handle);
        }
        let handle = self
            .change(move |names, deadline| async move {
                let turn = Turn::of(&names, name, &deadline).await?;
                names::find_or_error(&names, &turn).await
            })
            .await?;
        self.with_home(handle)
    }

    /// The handle, if the store has the home tier of the object.
    pub(super) fn with_home(&self, handle: VMemHandle) -> Result<VMemHandle> {
        self.shared.check_tier(handle.home_tier()).map(|()| handle)
    }

    /// Gives the object of one name another one, atomically; what had that name loses it, its
    /// handles keep it. Durable on return, as is the object.
    ///
    /// # Errors
    ///
    /// `NameNotFound`; `InvalidConfig` for a name that cannot be one; those of
    /// [`flush`](Self::flush).
    pub async fn rename_named(&self, from: &str, to: &str) -> Result<()> {
        self.rename_named_with(from, to, PutMode::Overwrite).await
    }

    /// [`rename_named`](Self::rename_named) with a condition on what has the name `to`.
    ///
    /// # Errors
    ///
    /// Those of `rename_named`; those of the [mode](PutMode). Both names are as they were then.
    pub async fn rename_named_with(&self, from: &str, to: &str, mode: PutMode) -> Result<()> {
        let from = self.check_named(from)?;
        let to = self.check_named(to)?;
        self.change(move |names, deadline| async move {
            if from == to {
                let turn = Turn::of(&names, from, &deadline).await?;
                return names::rename_to_itself(&names, &turn, mode.into()).await;
            }
            let (from, to) = Turn::of_both(&names, from, to, &deadline).await?;
            names::rename(&names, &from, &to, mode.into()).await
        })
        .await
    }

    /// Forgets the name. Durable on return. Handles keep the object, which is freed with the last
    /// of them.
    ///
    /// # Errors
    ///
    /// `NameNotFound`; `InvalidConfig` for a name that cannot be one; `Damaged`, `Io`.
    pub async fn remove_named(&self, name: &str) -> Result<()> {
        let name = self.check_named(name)?;
        self.change(move |names, deadline| async move {
            let turn = Turn::of(&names, name, &deadline).await?;
            names::remove(&names, &turn).await
        })
        .await
    }

    /// Every name that starts with `prefix`, in the order of their bytes; those too that were not
    /// flushed yet. Names that come or go while it is read may be listed or not.
    pub fn names(
        &self,
        prefix: &str,
    ) -> impl Stream<Item = Result<NamedEntry>> + Send + 'static + use<> {
        let entries = self.names_with(ListOptions::new().prefix(prefix));
        entries.try_filter_map(|listed| async move {
            Ok(match listed {
                Listed::Entry(entry) => Some(entry),
                Listed::Prefix(_) => None,
            })
        })
    }

    /// Stores up to 4096 bytes beside a name. Durable on return, as is the object.
    ///
    /// # Errors
    ///
    /// `NameNotFound`; `InvalidConfig` for a name that cannot be one, or metadata that are too
    /// long; those of [`flush`](Self::flush).
    pub async fn set_metadata(&self, name: &str, metadata: &[u8]) -> Result<()> {
        let name = self.check_named(name)?;
        names::check_metadata(metadata)?;
        let metadata = Bytes::copy_from_slice(metadata);
        self.change(move |names, deadline| async move {
            let turn = Turn::of(&names, name, &deadline).await?;
            names::set_metadata(&names, &turn, metadata).await
        })
        .await
    }

    /// Copies all named objects, as they are durable at one moment, to `directory`, which is empty
    /// or does not exist and which opens as a store then. Covers every write that completed before
    /// the call; writers go on meanwhile. Where the file system shares extents nothing is copied.
    ///
    /// # Errors
    ///
    /// `NotFlushed`, `InvalidConfig` if the directory cannot serve, `Damaged`, `Io`.
    pub async fn snapshot(&self, directory: &Path) -> Result<()> {
        self.check_open()?;
        let directory = directory.to_owned();
        self.change(move |names, _| async move {
            names::flush_all(&names).await?;
            let frozen = names.freeze();
            let copied = names.catalog()?.snapshot(directory).await;
            drop(frozen);
            copied
        })
        .await
    }

    // ---- For `place.rs` ------------------------------------------------------------------------

    pub(super) async fn flush_named(&self, object: Arc<Object>) -> Result<()> {
        self.change(move |names, deadline| async move {
            names::flush(&names, &object, &deadline).await?;
            // What was durable before may have gone since.
            names.catalog()?.check().await
        })
        .await
    }

    pub(super) async fn flush_all_named(&self) -> Result<()> {
        self.change(move |names, _| async move {
            names::flush_all(&names).await?;
            match names.catalog() {
                Ok(catalog) => catalog.check().await,
                Err(_) => Ok(()),
            }
        })
        .await
    }

    /// A name that may be one, of a store that is open.
    pub(super) fn check_named(&self, name: &str) -> Result<Arc<str>> {
        self.check_open()?;
        names::check_name(name)?;
        self.names.catalog()?;
        Ok(name.into())
    }
}
