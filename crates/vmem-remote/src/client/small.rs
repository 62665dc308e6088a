//! Requests for small objects: created once, read whole, listed with their times.
//!
//! Invariant: an object that does not exist is an answer, and no failure of the object store.
//! Called by the catalog.

use std::sync::atomic::Ordering;
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use futures::{FutureExt, TryFutureExt, TryStreamExt};
use object_store::path::Path;
use object_store::{GetOptions, PutMode, PutPayload};
use tokio::time::timeout;

use super::{Client, of, within};
use crate::error::RequestError;

impl Client {
    /// Creates an object that does not exist; `stalled` is called with the error of each try that
    /// has failed.
    ///
    /// # Errors
    ///
    /// `Exists` if the object exists, perhaps by an earlier try whose answer was lost.
    pub(crate) async fn create(
        &self,
        path: &Path,
        body: &Bytes,
        stalled: impl Fn(&RequestError) + Sync,
    ) -> Result<(), RequestError> {
        let create = |limit| {
            self.counts.puts.fetch_add(1, Ordering::Relaxed);
            let payload = PutPayload::from(body.clone());
            let put =
                async move { self.store.put_opts(path, payload, PutMode::Create.into()).await };
            within(limit, put).map_ok(drop).boxed()
        };
        self.request(create, stalled).await
    }

    /// Reads a whole object of at most `len_max` bytes, and when the store says it was put. None
    /// if there is no such object.
    pub(crate) async fn get_whole(
        &self,
        path: &Path,
        len_max: u64,
    ) -> Result<Option<(Bytes, SystemTime)>, RequestError> {
        let one = |limit| {
            self.counts.gets.fetch_add(1, Ordering::Relaxed);
            let get = self.get_whole_once(path, len_max);
            let late = move |_| Err(RequestError::TimedOut { waited: limit });
            async move {
                match timeout(limit, get).await.unwrap_or_else(late) {
                    Err(error) if error.is_missing_object() => Ok(None),
                    outcome => outcome.map(Some),
                }
            }
            .boxed()
        };
        self.request(one, |_| ()).await
    }

    async fn get_whole_once(
        &self,
        path: &Path,
        len_max: u64,
    ) -> Result<(Bytes, SystemTime), RequestError> {
        let answer = self.store.get_opts(path, GetOptions::new()).await.map_err(of)?;
        let expected_bytes = answer.meta.size;
        let put_at = answer.meta.last_modified.into();
        if expected_bytes > len_max {
            return Err(RequestError::TooLong { bytes: expected_bytes, bytes_max: len_max });
        }
        let mut body = answer.into_stream();
        let mut whole = BytesMut::with_capacity(expected_bytes as usize);
        while let Some(piece) = body.try_next().await.map_err(of)? {
            whole.extend_from_slice(&piece);
            let actual_bytes = whole.len() as u64;
            if actual_bytes > expected_bytes {
                return Err(RequestError::Length { expected_bytes, actual_bytes });
            }
        }
        let actual_bytes = whole.len() as u64;
        if actual_bytes < expected_bytes {
            return Err(RequestError::Length { expected_bytes, actual_bytes });
        }
        Ok((whole.freeze(), put_at))
    }

    /// Folds all objects below a path, with when the store says they were put, in no order. A try
    /// begins with `A::default()`. Each wait for another entry has the timeout of a request.
    pub(crate) async fn scan<A: Default + Send>(
        &self,
        below: &Path,
        fold: impl Fn(&mut A, &Path, SystemTime) + Sync,
    ) -> Result<A, RequestError> {
        let fold = &fold;
        let scan = |limit| {
            async move {
                let mut all = A::default();
                let mut entries = self.store.list(Some(below));
                while let Some(entry) = within(limit, entries.try_next()).await? {
                    fold(&mut all, &entry.location, entry.last_modified.into());
                }
                Ok(all)
            }
            .boxed()
        };
        self.request(scan, |_| ()).await
    }
}
