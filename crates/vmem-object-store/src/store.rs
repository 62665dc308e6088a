//! The trait, over the names of a store.
//!
//! Invariant: every call is one step of the store, atomic and durable as that is; nothing is
//! cached here. Called by users of `object_store`.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::stream::{self, BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyMode, CopyOptions, GetOptions, GetRange, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, RenameOptions, RenameTargetMode, Result, UpdateVersion,
};
use vmem_core::{MemoryTier, NamedEntry, VirtualMemory, VirtualMemoryError};

use crate::error::{self, RequestError, generic};
use crate::names::Names;
use crate::upload::{Upload, Uploads};
use crate::{attributes, body};

/// Names that one call removes at most.
const REMOVALS_MAX: usize = 256;

/// A [`VirtualMemory`] as an [`ObjectStore`]. Clones share it.
#[derive(Clone, Debug)]
pub struct Store {
    vmem: VirtualMemory,
    names: Names,
    home: MemoryTier,
    pub(crate) uploads: Arc<Uploads>,
}

impl Store {
    /// All names of a store are its paths. What is put has its home on disk.
    pub fn new(vmem: VirtualMemory) -> Self {
        let uploads = Arc::default();
        Store { vmem, names: Names::default(), home: MemoryTier::Disk, uploads }
    }

    /// Only names below `prefix` are its paths, which do not have it.
    ///
    /// ```
    /// # use object_store::{ObjectStoreExt, path::Path};
    /// # use vmem_object_store::Store;
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let config = vmem::VirtualMemoryConfig::builder();
    /// # let config = config.host_capacity(16 << 20).disk_capacity(16 << 20).build()?;
    /// # let vmem = vmem::open(config).await?;
    /// let tables = Store::new(vmem.clone()).with_prefix("tables");
    /// tables.put(&Path::from("users"), "ada".into()).await?;
    /// assert_eq!(vmem.entry("tables/users").await?.len, 3);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_prefix(self, prefix: impl Into<Path>) -> Self {
        Store { names: Names::new(prefix.into()), ..self }
    }

    /// The home tier of objects that are put through it. A copy has the home tier of its source.
    #[must_use]
    pub fn with_home(self, home: MemoryTier) -> Self {
        Store { home, ..self }
    }

    /// The store below.
    pub fn vmem(&self) -> &VirtualMemory {
        &self.vmem
    }

    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    /// How an object that is put through it is kept.
    pub(crate) fn put_options(&self, metadata: Bytes) -> vmem_core::PutOptions {
        vmem_core::PutOptions::new(self.home).metadata(metadata)
    }

    /// Removes what there is of these; the rest is removed already.
    async fn remove(&self, batch: Vec<Result<Path>>) -> Vec<Result<Path>> {
        let named = |path: Result<Path>| {
            path.and_then(|path| self.names.name(&path).map(|name| (path, name)))
        };
        let batch: Vec<_> = batch.into_iter().map(named).collect();
        let names: Vec<_> = batch.iter().flatten().map(|(_, name)| name).collect();
        let all = self.vmem.remove_many(&names).await.is_ok();
        let one_by_one = batch.into_iter().map(|named| async move {
            let (path, name) = named?;
            if all {
                return Ok(path);
            }
            match self.vmem.remove_named(&name).await {
                Ok(()) | Err(VirtualMemoryError::NameNotFound { .. }) => Ok(path),
                Err(error) => Err(error::of(error, &path)),
            }
        });
        stream::iter(one_by_one).buffered(REMOVALS_MAX).collect().await
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vmem({})", self.names.prefix())
    }
}

/// What a listing and a look say of an object.
pub(crate) fn meta(path: Path, entry: &NamedEntry) -> ObjectMeta {
    ObjectMeta {
        location: path,
        last_modified: last_modified(entry),
        size: entry.len,
        e_tag: Some(entry.version.to_string()),
        // A caller that gets a version here might ask for it after it was replaced.
        version: None,
    }
}

fn last_modified(entry: &NamedEntry) -> DateTime<Utc> {
    let since = entry.modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).ok();
    let time = seconds.and_then(|seconds| DateTime::from_timestamp(seconds, since.subsec_nanos()));
    time.unwrap_or(DateTime::<Utc>::MAX_UTC)
}

/// The version that an update is of.
///
/// # Errors
///
/// `NoVersion`; `Precondition` for what no version is called.
fn expected_version(update: &UpdateVersion, path: &Path) -> Result<u64> {
    let mut asked = update.e_tag.iter().chain(&update.version);
    let first = asked.next().ok_or(RequestError::NoVersion)?;
    let version = first.parse::<u64>().ok().filter(|version| version.to_string() == *first);
    match version {
        Some(version) if asked.all(|other| other == first) => Ok(version),
        _ => {
            let source = format!("no object has {update:?}").into();
            Err(object_store::Error::Precondition { path: path.to_string(), source })
        }
    }
}

/// The bytes that are asked for of an object of `len` bytes.
fn range_of(asked: Option<&GetRange>, len: u64) -> Result<Range<u64>> {
    asked.map_or(Ok(0..len), |asked| asked.as_range(len).map_err(generic))
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Store {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        let name = self.names.name(location)?;
        let options = self.put_options(attributes::to_metadata(&opts.attributes)?);
        let is_update = matches!(opts.mode, PutMode::Update(_));
        let mode = match opts.mode {
            PutMode::Overwrite => vmem_core::PutMode::Overwrite,
            PutMode::Create => vmem_core::PutMode::Create,
            PutMode::Update(update) => {
                vmem_core::PutMode::Update(expected_version(&update, location)?)
            }
        };
        let put = body::put_named(&self.vmem, &name, location, payload, options.mode(mode)).await;
        put.map_err(|error| if is_update { body::precondition(error) } else { error })
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let metadata = attributes::to_metadata(&opts.attributes)?;
        Ok(Box::new(Upload::new(self.clone(), location, metadata)?))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let name = self.names.name(location)?;
        let (handle, entry) = if options.head {
            (None, self.vmem.entry(&name).await)
        } else {
            match self.vmem.open_entry(&name).await {
                Ok((handle, entry)) => (Some(handle), Ok(entry)),
                Err(error) => (None, Err(error)),
            }
        };
        let entry = entry.map_err(|error| error::of(error, location))?;
        let meta = meta(location.clone(), &entry);
        if let Some(asked) =
            options.version.as_ref().filter(|asked| meta.e_tag.as_ref() != Some(asked))
        {
            let source =
                RequestError::OtherVersion { asked: asked.clone(), current: entry.version };
            return Err(object_store::Error::NotFound {
                path: location.to_string(),
                source: source.into(),
            });
        }
        options.check_preconditions(&meta)?;
        let range = range_of(options.range.as_ref(), meta.size)?;
        let payload = match handle {
            None => stream::empty().boxed(),
            Some(handle) => {
                // No longer than the object, whose length is a `usize`.
                let bytes = range.start as usize..range.end as usize;
                body::stream(&self.vmem, &handle, location.clone(), bytes)
            }
        };
        let attributes = attributes::from_metadata(&entry.metadata);
        Ok(GetResult { payload: GetResultPayload::Stream(payload), meta, range, attributes })
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let name = self.names.name(location)?;
        let opened = self.vmem.open_entry(&name).await;
        let (handle, entry) = opened.map_err(|error| error::of(error, location))?;
        let within = |range: &Range<u64>| range_of(Some(&range.clone().into()), entry.len);
        let ranges: Vec<_> = ranges.iter().map(within).collect::<Result<_>>()?;
        body::read_ranges(&self.vmem, &handle, location, &ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        let removed = locations.ready_chunks(REMOVALS_MAX).then(move |batch| {
            let store = store.clone();
            async move { stream::iter(store.remove(batch).await) }
        });
        removed.flatten().boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.list_behind(prefix, None)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.list_behind(prefix, Some(offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.list_directory(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let source = self.names.name(from)?;
        let target = self.names.name(to)?;
        let opened = self.vmem.open_entry(&source).await;
        let (handle, entry) = opened.map_err(|error| error::of(error, from))?;
        let mode = match options.mode {
            CopyMode::Overwrite => vmem_core::PutMode::Overwrite,
            CopyMode::Create => vmem_core::PutMode::Create,
        };
        let metadata = entry.metadata;
        let options = vmem_core::PutOptions::new(entry.home).metadata(metadata.clone()).mode(mode);
        let mut writer = self.vmem.writer_named(&target, options);
        body::append(&self.vmem, &mut writer, to, &handle).await?;
        body::commit(&self.vmem, writer, &target, to, &metadata).await.map(|_| ())
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        let source = self.names.name(from)?;
        let target = self.names.name(to)?;
        let mode = match options.target_mode {
            RenameTargetMode::Overwrite => vmem_core::PutMode::Overwrite,
            _ if vmem_core::planted!("object-store-rename") => vmem_core::PutMode::Overwrite,
            RenameTargetMode::Create => vmem_core::PutMode::Create,
        };
        let renamed = self.vmem.rename_named_with(&source, &target, mode).await;
        renamed.map_err(|error| {
            let exists = matches!(error, VirtualMemoryError::NameExists { .. });
            error::of(error, if exists { to } else { from })
        })
    }
}
