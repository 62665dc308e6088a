//! An object store that misbehaves as the test says.
//!
//! Invariant: what it reports as done was done in the store below, byte for byte, but for the
//! bodies that the test has it spoil. Made by the tests of faults.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryFutureExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    UploadPart,
};
use parking_lot::Mutex;

/// What is asked of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Put,
    Part,
    Complete,
    Get,
    Delete,
    /// Of what is below a path; a test that lists all is not counted.
    List,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing happens but an error.
    Refused,
    /// It happens, and is reported as failed.
    Lost,
    /// There is never an answer, and nothing happens.
    Silent,
    /// It takes this long.
    Slow(Duration),
    /// The body ends too early.
    Cut,
    /// The body stands still half way.
    Stuck,
    /// A bit of the body is another.
    Flipped,
    /// The body is of another range.
    Shifted,
    /// The credentials are refused.
    Denied,
    /// A listing shows what the test had the store [remember](Faulty::remember).
    Stale,
}

type Choose = Box<dyn FnMut(Op) -> Option<Fault> + Send>;

struct State {
    choose: Mutex<Choose>,
    /// Each request that came, with the range if it was a get.
    seen: Mutex<Vec<(Op, Option<Range<u64>>)>>,
    hit: Mutex<usize>,
    past: Mutex<Vec<ObjectMeta>>,
}

/// A store over another.
pub(crate) struct Faulty {
    inner: Arc<dyn ObjectStore>,
    state: Arc<State>,
}

impl Faulty {
    pub(crate) fn new(inner: Arc<dyn ObjectStore>) -> Arc<Self> {
        let choose: Mutex<Choose> = Mutex::new(Box::new(|_| None));
        let state =
            State { choose, seen: Mutex::default(), hit: Mutex::default(), past: Mutex::default() };
        Arc::new(Faulty { inner, state: Arc::new(state) })
    }

    /// From now on requests fare as `choose` says.
    pub(crate) fn fail(&self, choose: impl FnMut(Op) -> Option<Fault> + Send + 'static) {
        *self.state.choose.lock() = Box::new(choose);
    }

    pub(crate) fn heal(&self) {
        self.fail(|_| None);
    }

    /// Takes what is in the store now as the past that stale listings show.
    pub(crate) async fn remember(&self) {
        let all = self.inner.list(None).try_collect().await;
        *self.state.past.lock() = all.unwrap();
    }

    /// The requests since the last call.
    pub(crate) fn take_seen(&self) -> Vec<(Op, Option<Range<u64>>)> {
        std::mem::take(&mut *self.state.seen.lock())
    }

    /// How many requests met a fault.
    pub(crate) fn hit(&self) -> usize {
        *self.state.hit.lock()
    }
}

impl State {
    fn choose(&self, op: Op, range: Option<Range<u64>>) -> Option<Fault> {
        self.seen.lock().push((op, range));
        let fault = (self.choose.lock())(op);
        *self.hit.lock() += usize::from(fault.is_some());
        fault
    }
}

fn broken() -> Error {
    let source = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    Error::Generic { store: "faulty", source: Box::new(source) }
}

/// What comes before the request itself.
async fn before(fault: Option<Fault>) -> Result<()> {
    match fault {
        Some(Fault::Refused) => Err(broken()),
        Some(Fault::Denied) => {
            let source = "<Code>ExpiredToken</Code> SECRET".into();
            Err(Error::Unauthenticated { path: "SECRET".into(), source })
        }
        Some(Fault::Silent) => std::future::pending().await,
        Some(Fault::Slow(time)) => {
            tokio::time::sleep(time).await;
            Ok(())
        }
        _ => Ok(()),
    }
}

fn after<T>(fault: Option<Fault>, done: Result<T>) -> Result<T> {
    if fault == Some(Fault::Lost) { Err(broken()) } else { done }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let fault = self.state.choose(Op::Put, None);
        before(fault).await?;
        after(fault, self.inner.put_opts(path, payload, options).await)
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let inner = self.inner.put_multipart_opts(path, options).await?;
        Ok(Box::new(Upload { inner, state: self.state.clone() }))
    }

    async fn get_opts(&self, path: &Path, mut options: GetOptions) -> Result<GetResult> {
        let range = match &options.range {
            Some(object_store::GetRange::Bounded(range)) => Some(range.clone()),
            _ => None,
        };
        let fault = self.state.choose(Op::Get, range.clone());
        before(fault).await?;
        if let (Some(Fault::Shifted), Some(range)) = (fault, range) {
            options = options.with_range(Some(range.start..range.end - 1));
        }
        let mut result = after(fault, self.inner.get_opts(path, options).await)?;
        let whole: Vec<u8> = {
            let body = std::mem::replace(
                &mut result.payload,
                GetResultPayload::Stream(stream::empty().boxed()),
            );
            let meta = result.meta.clone();
            let range = result.range.clone();
            let attributes = result.attributes.clone();
            let body = GetResult { payload: body, meta, range, attributes };
            body.bytes().await?.to_vec()
        };
        result.payload = GetResultPayload::Stream(spoiled(whole, fault));
        Ok(result)
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let fault = self.state.choose(Op::Delete, None);
        let inner = self.inner.clone();
        let deleted = async move {
            before(fault).await?;
            let first = inner.delete_stream(paths).boxed();
            Ok::<_, Error>(first.map(move |path| after(fault, path)).boxed())
        };
        deleted.try_flatten_stream().boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let all = self.inner.list(prefix);
        let Some(below) = prefix else { return all };
        let fault = self.state.choose(Op::List, None);
        let past = self.state.past.lock().clone();
        let past = past.into_iter().filter({
            let below = below.clone();
            move |meta| meta.location.prefix_matches(&below)
        });
        let listed = async move {
            before(fault).await?;
            Ok::<_, Error>(match fault {
                Some(Fault::Stale) => stream::iter(past.map(Ok).collect::<Vec<_>>()).boxed(),
                Some(Fault::Lost) => all.chain(stream::iter([Err(broken())])).boxed(),
                Some(Fault::Stuck) => all.take(1).chain(stream::pending()).boxed(),
                _ => all,
            })
        };
        listed.try_flatten_stream().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// The body in two pieces, as the fault leaves it.
fn spoiled(mut whole: Vec<u8>, fault: Option<Fault>) -> BoxStream<'static, Result<Bytes>> {
    let half = whole.len() / 2;
    match fault {
        Some(Fault::Cut) => whole.truncate(half),
        Some(Fault::Flipped) => {
            if let Some(byte) = whole.get_mut(half) {
                *byte ^= 1;
            }
        }
        _ => {}
    }
    let whole = Bytes::from(whole);
    let half = half.min(whole.len());
    let first = stream::iter([Ok(whole.slice(..half))]);
    match fault {
        Some(Fault::Stuck) => first.chain(stream::pending()).boxed(),
        _ => first.chain(stream::iter([Ok(whole.slice(half..))])).boxed(),
    }
}

struct Upload {
    inner: Box<dyn MultipartUpload>,
    state: Arc<State>,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let fault = self.state.choose(Op::Part, None);
        let part = self.inner.put_part(data);
        async move {
            before(fault).await?;
            after(fault, part.await)
        }
        .boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let fault = self.state.choose(Op::Complete, None);
        before(fault).await?;
        after(fault, self.inner.complete().await)
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Upload")
    }
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({:?})", self.inner)
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({})", self.inner)
    }
}
