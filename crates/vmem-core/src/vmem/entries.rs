//! Names as users of object stores know them: entries with versions, conditional puts, listings.
//!
//! Invariant: an entry is one state of a name; bytes and metadata of that state were committed at
//! once, and no other state of any name has its version. Called by users.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use futures::Stream;
use futures::stream::{StreamExt, try_unfold};

use super::listing::Listing;
use super::{Result, VirtualMemory};
use crate::catalog::CatalogRecord;
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;
use crate::names::{self, Expected, Turn};

/// Names that one call removes at the same time; they share commits.
const REMOVALS_MAX: usize = 256;

/// One named object, as [`VirtualMemory::entry`] and the listings tell of it.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedEntry {
    /// Its name.
    pub name: Arc<str>,
    /// Its length, in bytes.
    pub len: u64,
    /// Its home tier.
    pub home: MemoryTier,
    /// What was stored beside it.
    pub metadata: Bytes,
    /// The number of this state of bytes and metadata. Each put, each change of the metadata, and
    /// each flush that has something to write gives another one, which no name of the store had
    /// before; it moves with a rename. What was written and not flushed does not show in it.
    pub version: u64,
    /// When this state was committed, by the clock of the machine, to the nanosecond.
    pub modified: SystemTime,
}

impl NamedEntry {
    pub(super) fn new(name: Arc<str>, record: CatalogRecord) -> Self {
        let CatalogRecord { version, modified, len, home, metadata, .. } = record;
        NamedEntry { name, len, home, metadata, version, modified }
    }
}

/// What [`VirtualMemory::put_named_with`] stores beside the bytes, and when it refuses to.
///
/// ```
/// use vmem::{MemoryTier, PutMode, PutOptions};
///
/// let options = PutOptions::new(MemoryTier::Disk).metadata("text/plain").mode(PutMode::Create);
/// assert_eq!(options.metadata, "text/plain");
/// ```
#[derive(Clone, Debug)]
pub struct PutOptions {
    /// The tier where the object stays while it is not in use. Default: [`MemoryTier::Host`].
    pub home: MemoryTier,
    /// Stored beside the object; up to 4,096 bytes. Default: none.
    pub metadata: Bytes,
    /// What the name has to stand for before. Default: [`PutMode::Overwrite`].
    pub mode: PutMode,
}

/// What a name has to stand for before a put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PutMode {
    /// Anything or nothing.
    #[default]
    Overwrite,
    /// Nothing; else the put fails with `NameExists`.
    Create,
    /// An object with this [version](NamedEntry::version) and nothing unflushed; else the put fails
    /// with `VersionChanged`, or `NameNotFound` if there is none.
    Update(u64),
}

impl Default for PutOptions {
    fn default() -> Self {
        PutOptions::new(MemoryTier::Host)
    }
}

impl PutOptions {
    /// Overwrites, without metadata.
    pub fn new(home: MemoryTier) -> Self {
        PutOptions { home, metadata: Bytes::new(), mode: PutMode::Overwrite }
    }

    /// What is stored beside the object.
    pub fn metadata(mut self, metadata: impl Into<Bytes>) -> Self {
        self.metadata = metadata.into();
        self
    }

    /// What the name has to stand for before.
    pub fn mode(mut self, mode: PutMode) -> Self {
        self.mode = mode;
        self
    }
}

impl From<PutMode> for Expected {
    fn from(mode: PutMode) -> Self {
        match mode {
            PutMode::Overwrite => Expected::Anything,
            PutMode::Create => Expected::Nothing,
            PutMode::Update(version) => Expected::Version(version),
        }
    }
}

/// Which names [`VirtualMemory::names_with`] lists.
///
/// ```
/// use vmem::ListOptions;
///
/// // What is directly in "photos/", a page of 100 after the last one that was seen.
/// let page = ListOptions::new().prefix("photos/").delimiter("/").limit(100);
/// let next = page.clone().start_after("photos/b");
/// assert_eq!((next.limit, next.start_after.as_deref()), (Some(100), Some("photos/b")));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListOptions {
    /// Only names that start with it. Default: all.
    pub prefix: String,
    /// Only what comes behind it in the order of the bytes: names, and common prefixes as such. It
    /// need not exist. Default: from the first.
    pub start_after: Option<String>,
    /// The most entries and common prefixes. Default: all.
    pub limit: Option<usize>,
    /// Names that have it behind `prefix` are listed as one [`Listed::Prefix`], up to its first
    /// occurrence and including it. Not empty. Default: none.
    pub delimiter: Option<String>,
}

impl ListOptions {
    /// All names.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only names that start with this.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Only what comes behind this.
    pub fn start_after(mut self, start_after: impl Into<String>) -> Self {
        self.start_after = Some(start_after.into());
        self
    }

    /// At most `limit` of them.
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Groups names by what comes before this.
    pub fn delimiter(mut self, delimiter: impl Into<String>) -> Self {
        self.delimiter = Some(delimiter.into());
        self
    }
}

/// One item of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listed {
    /// A name.
    Entry(NamedEntry),
    /// What several names, or one, start with, up to the delimiter and including it.
    Prefix(Arc<str>),
}

impl Listed {
    /// The name or the common prefix: where the next page starts after.
    pub fn key(&self) -> &str {
        match self {
            Listed::Entry(entry) => &entry.name,
            Listed::Prefix(prefix) => prefix,
        }
    }
}

impl VirtualMemory {
    /// The entry of a name. Costs the same whatever the length of the object, and no handle: a name
    /// that is not in memory is looked up in the catalog, and does not come into memory.
    ///
    /// # Errors
    ///
    /// `NameNotFound`; `InvalidConfig` for a name that cannot be one; `TimedOut` behind other
    /// changes of the name; `Damaged`, `Io`.
    pub async fn entry(&self, name: &str) -> Result<NamedEntry> {
        let name = self.check_named(name)?;
        if let Some(record) = self.names.record_in_memory(&name) {
            return Ok(NamedEntry::new(name, record));
        }
        // In turn: else it could be newer than what memory says a moment later.
        self.change(move |names, deadline| async move {
            let turn = Turn::of(&names, name.clone(), &deadline).await?;
            names::record(&names, &turn).await.map(|record| NamedEntry::new(name, record))
        })
        .await
    }

    /// The object of a name and its entry, of one state: the handle keeps leading to the bytes to
    /// which the metadata belong, even if the name is replaced meanwhile. A write to the object
    /// itself changes its bytes, as always.
    ///
    /// # Errors
    ///
    /// Those of [`open_named`](Self::open_named).
    pub async fn open_entry(&self, name: &str) -> Result<(VMemHandle, NamedEntry)> {
        let name = self.check_named(name)?;
        let (handle, record) = match self.names.get_entry(&name) {
            Some(found) => found,
            None => {
                let name = name.clone();
                self.change(move |names, deadline| async move {
                    let turn = Turn::of(&names, name, &deadline).await?;
                    let handle = names::find_or_error(&names, &turn).await?;
                    let record = handle.object().named().record();
                    let record = record.ok_or_else(|| handle.object().not_found())?;
                    Ok((handle, record))
                })
                .await?
            }
        };
        Ok((self.with_home(handle)?, NamedEntry::new(name, record)))
    }

    /// [`put_named`](Self::put_named) with metadata, and with a condition. Bytes, metadata and name
    /// are committed at once: a call that opens the name, after a crash too, finds both of this
    /// call or neither.
    ///
    /// ```
    /// # use vmem::{MemoryTier, PutMode, PutOptions, VirtualMemoryConfig, VirtualMemoryError};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// let create = PutOptions::new(MemoryTier::Disk).metadata("draft").mode(PutMode::Create);
    /// vmem.put_named_with("report", b"one", create).await?;
    ///
    /// let seen = vmem.entry("report").await?;
    /// let update = |version| PutOptions::default().mode(PutMode::Update(version));
    /// vmem.put_named_with("report", b"two", update(seen.version)).await?;
    /// // A writer that has not seen that overwrites nothing.
    /// let late = vmem.put_named_with("report", b"three", update(seen.version)).await;
    /// assert!(matches!(late, Err(VirtualMemoryError::VersionChanged { .. })));
    /// # vmem.close().await
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of `put_named`; `InvalidConfig` for metadata that are too long; those of the
    /// [mode](PutMode), after which the name is as it was.
    pub async fn put_named_with(
        &self,
        name: &str,
        data: impl AsRef<[u8]> + Send,
        options: PutOptions,
    ) -> Result<VMemHandle> {
        let name = self.check_named(name)?;
        let PutOptions { home, metadata, mode } = options;
        names::check_metadata(&metadata)?;
        let expected = Expected::from(mode);
        if let Some(record) = self.names.record_in_memory(&name) {
            // Before anything is written.
            expected.check(&name, Some(&record))?;
        }
        let handle = self.put(data, home).await?;
        self.replace_named(name, handle, PutOptions { home, metadata, mode }).await
    }

    /// Gives a new object a name, as a put: what had the name loses it.
    pub(super) async fn replace_named(
        &self,
        name: Arc<str>,
        handle: VMemHandle,
        options: PutOptions,
    ) -> Result<VMemHandle> {
        // The caller's memory may be part of something large that it would keep.
        let metadata = Bytes::copy_from_slice(&options.metadata);
        let expected = Expected::from(options.mode);
        self.change(move |names, deadline| async move {
            let turn = Turn::of(&names, name, &deadline).await?;
            names::replace(&names, &turn, &handle, metadata, expected).await?;
            Ok(handle)
        })
        .await
    }

    /// Gives a name to an object that has none: no bytes are copied but those that disk does not
    /// have. Durable on return. From then on the object stays although its last handle is dropped.
    ///
    /// # Errors
    ///
    /// `NameExists`; `AlreadyNamed` for an object that has a name, or is being given one;
    /// `HandleNotFound`; `InvalidConfig` for a name that cannot be one; those of
    /// [`flush`](Self::flush). The object is as it was then.
    pub async fn adopt(&self, handle: &VMemHandle, name: &str) -> Result<()> {
        self.check(handle)?;
        let name = self.check_named(name)?;
        let handle = handle.clone();
        self.change(move |names, deadline| async move {
            let turn = Turn::of(&names, name, &deadline).await?;
            names::adopt(&names, &turn, &handle).await
        })
        .await
    }

    /// Names as `options` choose them, in the order of their bytes; those too that were not flushed
    /// yet. Names that come or go while it is read may be listed or not; each is listed once.
    ///
    /// ```
    /// # use futures::TryStreamExt;
    /// # use vmem::{ListOptions, MemoryTier, VirtualMemoryConfig};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// for name in ["a", "b/1", "b/2", "c"] {
    ///     vmem.put_named(name, name, MemoryTier::Disk).await?;
    /// }
    /// let top = vmem.names_with(ListOptions::new().delimiter("/"));
    /// let top: Vec<String> = top.map_ok(|listed| listed.key().to_owned()).try_collect().await?;
    /// assert_eq!(top, ["a", "b/", "c"]);
    /// # vmem.close().await
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As items of the stream, which ends then: `InvalidConfig` for an empty delimiter, `Damaged`,
    /// `Io`, `Closed`.
    pub fn names_with(
        &self,
        options: ListOptions,
    ) -> impl Stream<Item = Result<Listed>> + Send + 'static + use<> {
        let listing = Listing::new(self.names.clone(), options);
        try_unfold(listing, |mut listing| async move {
            Ok(listing.next().await?.map(|listed| (listed, listing)))
        })
    }

    /// Forgets these names, as [`remove_named`](Self::remove_named) each; they share commits, and
    /// each is removed or not. Returns how many were removed: a name that nothing has is skipped.
    /// Durable on return.
    ///
    /// # Errors
    ///
    /// `InvalidConfig` if one cannot be a name, before anything is removed; else all are tried, and
    /// it is the first error of any: `TimedOut`, `Damaged`, `Io`.
    pub async fn remove_many<N: AsRef<str> + Sync>(&self, names: &[N]) -> Result<u64> {
        let names = names.iter().map(|name| self.check_named(name.as_ref()));
        let doomed: BTreeSet<Arc<str>> = names.collect::<Result<_>>()?;
        self.change(move |names, _| async move {
            let removals = doomed.into_iter().map(|name| {
                let names = names.clone();
                async move {
                    // Each has its time: all of them take as long as they take.
                    let turn = Turn::of(&names, name, &names.shared.deadline()).await?;
                    names::remove(&names, &turn).await
                }
            });
            let mut removals = futures::stream::iter(removals).buffer_unordered(REMOVALS_MAX);
            let mut removed = 0;
            let mut first_error = None;
            while let Some(outcome) = removals.next().await {
                match outcome {
                    Ok(()) => removed += 1,
                    Err(VirtualMemoryError::NameNotFound { .. }) => {}
                    Err(error) => drop(first_error.get_or_insert(error)),
                }
            }
            first_error.map_or(Ok(removed), Err)
        })
        .await
    }
}
