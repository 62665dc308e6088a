//! Whether an object store can be used, found out before anything depends on it.
//!
//! Invariant: what a probe has put it deletes, unless the object store does not let it. Called when
//! a tier opens.

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
        client.put(&path, &[bytes.to_vec().into()], || ()).await?;
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
