//! Uploads in parts.
//!
//! Invariant: nothing of an upload has a name before it is complete, and its parts are unnamed
//! objects, which go with the upload. Called by `store.rs`, and by users for uploads with an id.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{MultipartId, MultipartUpload, PutPayload, PutResult, Result, UploadPart};
use parking_lot::Mutex;
use vmem_core::{MemoryTier, ObjectWriter, VMemHandle};

use crate::body;
use crate::error::RequestError;
use crate::parts::{Joined, Parts};
use crate::store::Store;

/// Where the parts of an upload are until it is complete.
const PARTS_HOME: MemoryTier = MemoryTier::Disk;

/// An upload whose parts are numbered as they are announced. It ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Upload {
    target: Arc<Target>,
    parts: Arc<Parts>,
    /// Parts that were announced.
    count: usize,
}

/// What an upload is to become.
#[derive(Debug)]
struct Target {
    store: Store,
    path: Path,
    name: String,
    metadata: Bytes,
}

impl Target {
    fn writer(&self) -> ObjectWriter {
        let options = self.store.put_options(self.metadata.clone());
        self.store.vmem().writer_named(&self.name, options)
    }

    async fn append(&self, joined: &mut Joined, parts: Vec<VMemHandle>) -> Result<()> {
        for part in parts {
            body::append(self.store.vmem(), &mut joined.writer, &self.path, &part).await?;
            joined.count += 1;
        }
        Ok(())
    }

    async fn commit(&self, joined: Joined) -> Result<PutResult> {
        let vmem = self.store.vmem();
        let writer = joined.writer;
        body::commit(vmem, writer, &self.name, &self.path, &self.metadata).await
    }
}

impl Upload {
    pub(crate) fn new(store: Store, path: &Path, metadata: Bytes) -> Result<Self> {
        let name = store.names().name(path)?;
        let path = path.clone();
        let target = Arc::new(Target { store, path, name, metadata });
        Ok(Upload { target, parts: Parts::new(), count: 0 })
    }
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let target = self.target.clone();
        let parts = self.parts.clone();
        let part = self.count;
        self.count += 1;
        Box::pin(async move {
            let Some((mut joined, before)) = parts.take_turn(part, || target.writer()) else {
                let vmem = target.store.vmem();
                let path = &target.path;
                let handle = body::put_unnamed(vmem, path, &data, PARTS_HOME).await?;
                return Ok(parts.add(part, handle)?);
            };
            target.append(&mut joined, before).await?;
            body::write(&mut joined.writer, &target.path, &data).await?;
            joined.count += 1;
            Ok(parts.give_back(joined)?)
        })
    }

    /// The upload ends with it, unless a part is missing.
    async fn complete(&mut self) -> Result<PutResult> {
        let (mut joined, rest) = self.parts.finish(self.count, || self.target.writer())?;
        self.target.append(&mut joined, rest).await?;
        self.target.commit(joined).await
    }

    async fn abort(&mut self) -> Result<()> {
        self.parts.end();
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // A part that is still polled has a share of them.
        if !vmem_core::planted!("object-store-dropped") {
            self.parts.end();
        }
    }
}

/// Uploads that are known by an id, and go on when their callers are dropped.
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
        let handle = body::put_unnamed(self.vmem(), path, &data, PARTS_HOME).await?;
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
        let found = self.uploads.find(&name, id)?.arrived(parts.len())?;
        let same =
            |(handle, part): (&VMemHandle, &PartId)| handle.id().to_string() == part.content_id;
        if let Some(part) = found.iter().zip(&parts).position(|pair| !same(pair)) {
            return Err(RequestError::PartMissing { part }.into());
        }
        let store = self.clone();
        let path = path.clone();
        let metadata = Bytes::new();
        let target = Target { store, path, name, metadata };
        let mut joined = Joined { writer: target.writer(), count: 0 };
        target.append(&mut joined, found).await?;
        let put = target.commit(joined).await?;
        self.uploads.end(id);
        Ok(put)
    }

    async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
        self.uploads.find(&self.names().name(path)?, id)?;
        self.uploads.end(id);
        Ok(())
    }
}
