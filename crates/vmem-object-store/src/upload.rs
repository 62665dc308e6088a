//! Uploads in parts.
//!
//! Invariant: nothing of an upload has a name before it is complete, and its parts are unnamed
//! objects, which go with the upload. Called by `store.rs`, and by users for uploads with an id.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{MultipartId, MultipartUpload, PutPayload, PutResult, Result, UploadPart};
use parking_lot::Mutex;
use vmem_core::{MemoryTier, VMemHandle};

use crate::body;
use crate::error::RequestError;
use crate::store::Store;

/// Where the parts of an upload are until it is complete.
const PARTS_HOME: MemoryTier = MemoryTier::Disk;

/// The parts of an upload that have arrived, by their numbers; none once it has ended.
#[derive(Debug)]
struct Parts(Mutex<Option<BTreeMap<usize, VMemHandle>>>);

impl Parts {
    fn new() -> Arc<Self> {
        Arc::new(Parts(Mutex::new(Some(BTreeMap::new()))))
    }

    /// A part that was there before under this number is given up.
    fn add(&self, part: usize, handle: VMemHandle) -> Result<(), RequestError> {
        let mut parts = self.0.lock();
        let before = parts.as_mut().ok_or(RequestError::NoUpload)?.insert(part, handle);
        drop(parts);
        drop(before);
        Ok(())
    }

    /// The first `count` parts.
    fn first(&self, count: usize) -> Result<Vec<VMemHandle>, RequestError> {
        let parts = self.0.lock();
        let parts = parts.as_ref().ok_or(RequestError::NoUpload)?;
        let part = |part| parts.get(&part).cloned().ok_or(RequestError::PartMissing { part });
        (0..count).map(part).collect()
    }

    /// Parts that are still on their way are given up when they arrive.
    fn end(&self) {
        let parts = self.0.lock().take();
        drop(parts);
    }
}

/// An upload that ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Upload {
    store: Store,
    path: Path,
    name: String,
    metadata: Bytes,
    parts: Arc<Parts>,
    /// Parts that were announced.
    count: usize,
}

impl Upload {
    pub(crate) fn new(store: Store, path: &Path, metadata: Bytes) -> Result<Self> {
        let name = store.names().name(path)?;
        Ok(Upload { store, path: path.clone(), name, metadata, parts: Parts::new(), count: 0 })
    }
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (vmem, parts, part) = (self.store.vmem().clone(), self.parts.clone(), self.count);
        self.count += 1;
        Box::pin(async move {
            let handle = body::put_unnamed(&vmem, data, PARTS_HOME).await?;
            Ok(parts.add(part, handle)?)
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let parts = self.parts.first(self.count)?;
        let options = self.store.put_options(self.metadata.clone());
        let vmem = self.store.vmem();
        let put = body::put_joined(vmem, &self.name, &self.path, &parts, options).await?;
        self.parts.end();
        Ok(put)
    }

    async fn abort(&mut self) -> Result<()> {
        self.parts.end();
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // A part that somebody still polls has a share of them.
        self.parts.end();
    }
}

/// Uploads that are known by an id, which nobody's going away ends.
#[derive(Debug, Default)]
pub(crate) struct Uploads(Mutex<HashMap<MultipartId, (String, Arc<Parts>)>>);

impl Uploads {
    /// An id that no upload of this process had before.
    fn begin(&self, name: String) -> MultipartId {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = format!("{:016x}", NEXT.fetch_add(1, Ordering::Relaxed));
        self.0.lock().insert(id.clone(), (name, Parts::new()));
        id
    }

    fn find(&self, name: &str, id: &MultipartId) -> Result<Arc<Parts>, RequestError> {
        let uploads = self.0.lock();
        let found = uploads.get(id).filter(|(its, _)| its == name);
        found.map(|(_, parts)| parts.clone()).ok_or(RequestError::NoUpload)
    }

    fn end(&self, id: &MultipartId) {
        let ended = self.0.lock().remove(id);
        if let Some((_, parts)) = ended {
            parts.end();
        }
    }
}

/// Uploads that go on over several calls, and that nothing but a completion, an abortion or the
/// last clone of the [`Store`] ends.
#[async_trait]
impl MultipartStore for Store {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        Ok(self.uploads.begin(self.names().name(path)?))
    }

    async fn put_part(
        &self,
        path: &Path,
        id: &MultipartId,
        part_idx: usize,
        data: PutPayload,
    ) -> Result<PartId> {
        let parts = self.uploads.find(&self.names().name(path)?, id)?;
        let handle = body::put_unnamed(self.vmem(), data, PARTS_HOME).await?;
        let content_id = handle.id().to_string();
        parts.add(part_idx, handle)?;
        Ok(PartId { content_id })
    }

    /// # Errors
    ///
    /// `NoUpload`; `PartMissing` if a part is not the one that was put last under its number. The
    /// upload goes on then.
    async fn complete_multipart(
        &self,
        path: &Path,
        id: &MultipartId,
        parts: Vec<PartId>,
    ) -> Result<PutResult> {
        let name = self.names().name(path)?;
        let found = self.uploads.find(&name, id)?.first(parts.len())?;
        let same =
            |(handle, part): (&VMemHandle, &PartId)| handle.id().to_string() == part.content_id;
        if let Some(part) = found.iter().zip(&parts).position(|pair| !same(pair)) {
            return Err(RequestError::PartMissing { part }.into());
        }
        let options = self.put_options(Bytes::new());
        let put = body::put_joined(self.vmem(), &name, path, &found, options).await?;
        self.uploads.end(id);
        Ok(put)
    }

    async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
        self.uploads.find(&self.names().name(path)?, id)?;
        self.uploads.end(id);
        Ok(())
    }
}
