//! An object store in memory whose every step is at a time that the test's seed chooses.
//!
//! Invariant: its clock is that of the runtime, which the test may have paused; what was put and
//! deleted is kept with its times, so that a listing can show the past. Each instance has a desk of
//! its own, whose requests end for ever when the test crashes it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryFutureExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetRange, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, Result,
};
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use tokio::time::Instant;

/// What a writer means by the next put of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Intent {
    /// The number of the commit.
    pub(crate) commit: u64,
    /// The version that the writer knows, if there is one.
    pub(crate) knows: Option<u64>,
    /// The version that the name has then; none if it is removed.
    pub(crate) makes: Option<u64>,
}

/// A generation that was created.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Created {
    pub(crate) number: u64,
    pub(crate) intent: Intent,
}

/// How often what goes wrong, in thousandths, and how slow it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Weather {
    /// The longest step, in milliseconds.
    pub(crate) step: u64,
    /// Requests that fail, one half of them once they were done.
    pub(crate) failed: u32,
    /// Requests without an answer; puts may be done within this many milliseconds.
    pub(crate) silent: u32,
    pub(crate) late: u64,
    /// Listings that show the past, up to this many milliseconds ago.
    pub(crate) stale: u32,
    pub(crate) past: u64,
    /// All other requests than puts of generations are as in calm weather.
    pub(crate) of_names: bool,
}

#[derive(Debug)]
struct Stored {
    path: Path,
    body: Bytes,
    put_at: Duration,
    gone_at: Option<Duration>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Bucket {
    began: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    stored: Vec<Stored>,
    /// By the name in hex.
    created: BTreeMap<String, Vec<Created>>,
    puts_to_what_exists: usize,
}

/// A way of an instance to the bucket.
pub(crate) struct Desk {
    bucket: Arc<Bucket>,
    weather: Mutex<(SmallRng, Weather)>,
    crashed: Arc<Mutex<bool>>,
    intents: Mutex<BTreeMap<String, Intent>>,
}

impl Bucket {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Bucket { began: Instant::now(), state: Mutex::default() })
    }

    pub(crate) fn desk(self: &Arc<Self>, rng: SmallRng, weather: Weather) -> Arc<Desk> {
        Arc::new(Desk {
            bucket: self.clone(),
            weather: Mutex::new((rng, weather)),
            crashed: Arc::default(),
            intents: Mutex::default(),
        })
    }

    /// The generations of a name, in the order in which they were created.
    pub(crate) fn created(&self, name: &str) -> Vec<Created> {
        self.state.lock().created.get(&hex(name)).cloned().unwrap_or_default()
    }

    /// The numbers of the generations of a name that the bucket has now.
    pub(crate) fn generations(&self, name: &str) -> Vec<u64> {
        let paths = self.paths().into_iter();
        let all = paths.filter_map(|path| generation(&path.as_str().into()));
        let of_name = all.filter(|(of, _)| *of == hex(name));
        let mut numbers: Vec<_> = of_name.map(|(_, number)| number).collect();
        numbers.sort_unstable();
        numbers
    }

    /// All that it has now.
    pub(crate) fn paths(&self) -> Vec<String> {
        self.list(None, Duration::ZERO).iter().map(|meta| meta.location.to_string()).collect()
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn put(&self, path: &Path, body: Bytes, mode: &PutMode, intent: Option<Intent>) -> Result<()> {
        let mut state = self.state.lock();
        let now = self.now();
        let there =
            state.stored.iter_mut().find(|stored| stored.path == *path && stored.gone_at.is_none());
        if let Some(there) = there {
            if *mode == PutMode::Create {
                state.puts_to_what_exists += 1;
                let path = path.to_string();
                return Err(Error::AlreadyExists { path, source: "it exists".into() });
            }
            there.gone_at = Some(now);
        }
        state.stored.push(Stored { path: path.clone(), body, put_at: now, gone_at: None });
        if let Some((name, number)) = generation(path)
            && let Some(intent) = intent
        {
            state.created.entry(name).or_default().push(Created { number, intent });
        }
        Ok(())
    }

    fn meta(&self, stored: &Stored) -> ObjectMeta {
        // No object store's clock is that of the machine.
        let put_at = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30) + stored.put_at;
        ObjectMeta {
            location: stored.path.clone(),
            last_modified: put_at.into(),
            size: stored.body.len() as u64,
            e_tag: None,
            version: None,
        }
    }

    fn get(&self, path: &Path, range: Option<Range<u64>>) -> Result<GetResult> {
        let state = self.state.lock();
        let there =
            state.stored.iter().find(|stored| stored.path == *path && stored.gone_at.is_none());
        let Some(stored) = there else {
            let path = path.to_string();
            return Err(Error::NotFound { path, source: "there is none".into() });
        };
        let len = stored.body.len() as u64;
        let range = range.map_or(0..len, |range| range.start.min(len)..range.end.min(len));
        let part = stored.body.slice(range.start as usize..range.end as usize);
        let body = stream::iter([Ok(part)]).boxed();
        Ok(GetResult {
            payload: GetResultPayload::Stream(body),
            meta: self.meta(stored),
            range,
            attributes: Default::default(),
        })
    }

    /// What a listing showed this long ago.
    fn list(&self, below: Option<&Path>, ago: Duration) -> Vec<ObjectMeta> {
        let at = self.now().saturating_sub(ago);
        let state = self.state.lock();
        let is_listed = |stored: &&Stored| {
            let is_there = stored.put_at <= at && stored.gone_at.is_none_or(|gone| gone > at);
            is_there && below.is_none_or(|below| stored.path.prefix_matches(below))
        };
        state.stored.iter().filter(is_listed).map(|stored| self.meta(stored)).collect()
    }

    fn delete(&self, path: &Path) {
        let now = self.now();
        let mut state = self.state.lock();
        for stored in state.stored.iter_mut().filter(|stored| stored.path == *path) {
            stored.gone_at.get_or_insert(now);
        }
    }
}

fn hex(name: &str) -> String {
    name.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn generation(path: &Path) -> Option<(String, u64)> {
    let (folder, number) = path.as_ref().strip_prefix("vmem/names/")?.split_once('/')?;
    Some((folder.to_owned(), u64::from_str_radix(number, 16).ok()?))
}

fn broken() -> Error {
    let source = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    Error::Generic { store: "bucket", source: Box::new(source) }
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug)]
struct Fate {
    before: Duration,
    after: Duration,
    is_refused: bool,
    is_lost: bool,
    /// When it is done although nobody learns of it.
    silent: Option<Duration>,
    ago: Duration,
}

impl Desk {
    /// No request of this instance does anything from now on.
    pub(crate) fn crash(&self) {
        *self.crashed.lock() = true;
    }

    /// From now on requests fare like this.
    pub(crate) fn change(&self, weather: Weather) {
        self.weather.lock().1 = weather;
    }

    /// What its next puts of this name mean.
    pub(crate) fn intend(&self, name: &str, intent: Intent) {
        self.intents.lock().insert(hex(name), intent);
    }

    fn intent(&self, path: &Path) -> Option<Intent> {
        let (name, _) = generation(path)?;
        self.intents.lock().get(&name).copied()
    }

    fn fate(&self, put: Option<&Path>) -> Fate {
        let (rng, weather) = &mut *self.weather.lock();
        let is_of_name = put.and_then(generation).is_some();
        let calm = Weather::default();
        let weather = if weather.of_names && !is_of_name { &calm } else { weather };
        let mut upto = |most: u64| Duration::from_millis(rng.random_range(0..=most));
        let before = upto(weather.step);
        let after = upto(weather.step);
        let late = upto(weather.late);
        let ago = upto(weather.past);
        let mut hits = |share: u32| rng.random_range(0..1000) < share;
        let is_failed = hits(weather.failed);
        let is_lost = is_failed && hits(500);
        let is_refused = is_failed && !is_lost;
        let silent = hits(weather.silent).then_some(late);
        let ago = if hits(weather.stale) { ago } else { Duration::ZERO };
        Fate { before, after, is_refused, is_lost, silent, ago }
    }

    async fn wait(&self, time: Duration) {
        if !time.is_zero() {
            tokio::time::sleep(time).await;
        }
        if *self.crashed.lock() {
            std::future::pending::<()>().await;
        }
    }

    /// A request that does this.
    async fn request<T: Send>(
        &self,
        fate: Fate,
        done: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.wait(fate.before).await;
        if fate.is_refused {
            return Err(broken());
        }
        if let Some(late) = fate.silent {
            // The network has it: it happens though nobody awaits it.
            let crashed = self.crashed.clone();
            tokio::spawn(async move {
                tokio::time::sleep(late).await;
                let is_sent = late < Duration::from_millis(50) || !*crashed.lock();
                drop(is_sent.then(done));
            });
            return std::future::pending().await;
        }
        let outcome = done();
        self.wait(fate.after).await;
        if fate.is_lost { Err(broken()) } else { outcome }
    }
}

#[async_trait]
impl ObjectStore for Desk {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let bucket = self.bucket.clone();
        let intent = self.intent(path);
        let fate = self.fate(Some(path));
        let path = path.clone();
        let put = move || bucket.put(&path, payload.into(), &options.mode, intent);
        self.request(fate, put).await?;
        Ok(PutResult { e_tag: None, version: None })
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(Error::NotImplemented { operation: "multipart".into(), implementer: "bucket".into() })
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let range = match options.range {
            Some(GetRange::Bounded(range)) => Some(range),
            _ => None,
        };
        let bucket = self.bucket.clone();
        let path = path.clone();
        self.request(self.fate(None), move || bucket.get(&path, range)).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let fate = Fate { silent: None, ..self.fate(None) };
        let bucket = self.bucket.clone();
        let crashed = self.crashed.clone();
        let delete = async move {
            let paths: Vec<Path> = paths.try_collect().await?;
            tokio::time::sleep(fate.before).await;
            if fate.is_refused || *crashed.lock() {
                return Err(broken());
            }
            paths.iter().for_each(|path| bucket.delete(path));
            let done = stream::iter(paths.into_iter().map(Ok));
            if fate.is_lost { Err(broken()) } else { Ok(done) }
        };
        delete.into_stream().boxed().map_ok(|done| done.boxed()).try_flatten().boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let fate = self.fate(None);
        let bucket = self.bucket.clone();
        let below = prefix.cloned();
        let crashed = self.crashed.clone();
        let list = async move {
            tokio::time::sleep(fate.before).await;
            if *crashed.lock() || fate.silent.is_some() {
                std::future::pending::<()>().await;
            }
            let listed = bucket.list(below.as_ref(), fate.ago);
            tokio::time::sleep(fate.after).await;
            let end = (fate.is_lost || fate.is_refused).then(|| Err(broken()));
            Ok::<_, Error>(stream::iter(listed.into_iter().map(Ok).chain(end)))
        };
        list.try_flatten_stream().boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        Err(Error::NotImplemented { operation: "delimiter".into(), implementer: "bucket".into() })
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(Error::NotImplemented { operation: "copy".into(), implementer: "bucket".into() })
    }
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Desk")
    }
}

impl fmt::Display for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Desk")
    }
}
