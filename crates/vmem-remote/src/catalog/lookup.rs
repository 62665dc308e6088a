//! Finding the newest generation of a name.
//!
//! Invariant: a listing alone is never believed. The generation behind the newest that is listed,
//! or known, is asked for until there is none: a listing that shows the past hides nothing, as long
//! as it is not older than half the grace after which generations are deleted. Called by the
//! catalog, by commits and by listings.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;
use vmem_core::{VirtualMemoryError, planted};

use super::body::{BODY_LEN_MAX, Body, decode};
use super::generations::Generation;
use super::inner::Inner;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Generations behind the one that is listed that are asked for.
const PROBES_MAX: usize = 1024;
/// Listings that a look-up makes while what they show has gone, or answers take too long.
const LISTINGS_MAX: usize = 3;

/// What a look-up has found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) newest: Generation,
    /// None if there is no generation.
    pub(super) body: Option<Body>,
    /// When it began: the generation was the newest then, or later.
    pub(super) began: Instant,
}

impl Inner {
    /// The newest generation of a name.
    ///
    /// # Errors
    ///
    /// `Damaged`, `UnknownFormat`, `Io`.
    pub(super) async fn look(&self, name: &Arc<str>) -> Result<Found> {
        for _ in 0..LISTINGS_MAX {
            let began = Instant::now();
            let listed = self.newest_listed(name).await?;
            let first = listed.max(self.generations.lock().newest(name));
            let Some((number, body)) = self.newest_from(name, first).await? else { continue };
            // What takes this long may have missed what was deleted meanwhile.
            if began.elapsed() > self.client.options().grace / 2 {
                continue;
            }
            let Some(bytes) = body else {
                return Ok(Found { newest: Generation::NONE, body: None, began });
            };
            let body = self.decode(name, number, &bytes)?;
            return Ok(Found { newest: generation(number, &body), body: Some(body), began });
        }
        Err(contended("find", "the name changes, or the object store answers, too late"))
    }

    /// The newest generation of a name, for a caller that is shown it.
    pub(super) async fn find(&self, name: &Arc<str>) -> Result<Option<Body>> {
        let found = self.look(name).await?;
        self.generations.lock().show(name, found.newest, found.began);
        self.saw(found.newest);
        Ok(found.body)
    }

    /// The newest generation of a name as it is now, for a commit. The first look at a name counts
    /// as shown.
    pub(super) async fn confirm(&self, name: &Arc<str>) -> Result<()> {
        let found = self.look(name).await?;
        self.generations.lock().confirm(name, found.newest, found.began);
        self.saw(found.newest);
        Ok(())
    }

    async fn newest_listed(&self, name: &str) -> Result<u64> {
        let folder = self.paths.folder(name);
        let fold = |newest: &mut u64, path: &_, _| {
            let number = self.paths.parse(path).map_or(0, |(_, number)| number);
            *newest = number.max(*newest);
        };
        let listed = self.client.scan(&folder, fold).await;
        listed.map_err(|error| error.of_catalog("list"))
    }

    /// The last of the generations that follow each other from this one on, if that is there, with
    /// its bytes. From 0 on there may be none.
    async fn newest_from(&self, name: &str, first: u64) -> Result<Option<(u64, Option<Bytes>)>> {
        let mut body = None;
        if first > 0 {
            body = self.read(name, first).await?;
            if body.is_none() {
                return Ok(None);
            }
        }
        if planted!("bucket-stale-list") && first > 0 {
            return Ok(Some((first, body)));
        }
        let (number, newer) = self.newest_behind(name, first).await?;
        Ok(Some((number, newer.or(body))))
    }

    /// The newest generation behind `first`, which is that itself if there is none: then without
    /// its bytes.
    pub(super) async fn newest_behind(
        &self,
        name: &str,
        first: u64,
    ) -> Result<(u64, Option<Bytes>)> {
        let mut body = None;
        for number in (first..).take(PROBES_MAX) {
            match self.read(name, number + 1).await? {
                None => return Ok((number, body)),
                next => body = next,
            }
        }
        Err(contended("find", "the object store lists generations long past"))
    }

    /// The bytes of a generation, if there is one.
    pub(super) async fn read(&self, name: &str, number: u64) -> Result<Option<Bytes>> {
        let path = self.paths.generation(name, number);
        let read = self.client.get_whole(&path, BODY_LEN_MAX).await;
        let read = read.map_err(|error| error.of_catalog("get"))?;
        Ok(read.map(|(bytes, _)| bytes))
    }

    pub(super) fn decode(&self, name: &str, number: u64, bytes: &[u8]) -> Result<Body> {
        decode(name, number, &self.paths.generation(name, number), bytes)
    }
}

/// A generation as it is remembered.
pub(super) fn generation(number: u64, body: &Body) -> Generation {
    let object = body.object.as_ref().map(|object| (object.record.id, object.record.version));
    Generation { number, token: body.token, object }
}

/// An error of something that others change faster than it is looked at.
pub(super) fn contended(operation: &'static str, why: &'static str) -> VirtualMemoryError {
    VirtualMemoryError::io(operation, io::Error::new(io::ErrorKind::ResourceBusy, why))
}
