//! Whether an object store can be used, found out before anything depends on it.
//!
//! Invariant: what a probe has put it deletes, unless the object store does not let it. Called when
//! a tier or a catalog opens.

use bytes::Bytes;
use object_store::path::Path;
use parking_lot::Mutex;
use tokio::time::timeout;
use uuid::Uuid;

use crate::client::{Client, Landing};
use crate::error::{OpenError, RequestError};

/// Puts, reads and deletes a small object of random bytes.
pub(crate) async fn probe(client: &Client, root: &Path, id: Uuid) -> Result<(), OpenError> {
    let path = root.clone().join("probe");
    let bytes = id.into_bytes();
    let request = Mutex::new("put");
    let trial = async {
        client.put(&path, &[bytes.to_vec().into()], |_| ()).await?;
        *request.lock() = "get";
        let landing = Probe { expected: bytes, actual: Mutex::default() };
        client.get(&path, 0..bytes.len() as u64, &landing).await?;
        *request.lock() = "delete";
        client.delete(std::slice::from_ref(&path)).await
    };
    let limit = client.options().request_timeout;
    let late = |_| Err(RequestError::TimedOut { waited: limit });
    let tried = timeout(limit, trial).await.unwrap_or_else(late);
    tried.map_err(|source| OpenError::Unavailable { request: *request.lock(), source })
}

/// Creates a small object twice, and deletes it: the second time it must exist.
pub(crate) async fn probe_create(client: &Client, path: &Path) -> Result<(), OpenError> {
    let request = Mutex::new("create");
    let trial = async {
        let first = Bytes::from_static(b"first");
        match client.create(path, &first, |_| ()).await {
            // A try whose answer was lost has created it: nothing else uses this path.
            Ok(()) | Err(RequestError::Exists) => {}
            Err(error) => return Err(error),
        }
        let second = client.create(path, &Bytes::from_static(b"other"), |_| ()).await;
        *request.lock() = "get";
        let stored = client.get_whole(path, first.len() as u64).await?;
        *request.lock() = "delete";
        client.delete(std::slice::from_ref(path)).await?;
        *request.lock() = "create";
        match second {
            Ok(()) => Ok(false),
            Err(RequestError::Exists) => Ok(stored.is_some_and(|(bytes, _)| bytes == first)),
            Err(error) => Err(error),
        }
    };
    let limit = client.options().request_timeout;
    let late = |_| Err(RequestError::TimedOut { waited: limit });
    match timeout(limit, trial).await.unwrap_or_else(late) {
        Ok(true) => Ok(()),
        Ok(false) => Err(OpenError::NoConditionalCreate),
        Err(source) => Err(OpenError::Unavailable { request: *request.lock(), source }),
    }
}

struct Probe {
    expected: [u8; 16],
    actual: Mutex<[u8; 16]>,
}

impl Landing for Probe {
    fn take(&self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.actual.lock()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    async fn verify(&self) -> Result<(), RequestError> {
        let actual = *self.actual.lock();
        if actual == self.expected {
            return Ok(());
        }
        let [expected, actual] = [self.expected, actual].map(|it| vmem_core::backend::crc32c(&it));
        Err(RequestError::Altered { expected, actual, chunk: 0 })
    }
}
