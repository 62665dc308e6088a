//! What the tests of the disk tier share: a file that misbehaves on request, a driver whose
//! completions the test decides, and buffers that tell when they are freed.
#![allow(dead_code, reason = "every test crate uses its own part")]

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::channel::oneshot;
use futures::future::BoxFuture;
use parking_lot::{Condvar, Mutex};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem_core::backend::IoBuf;
use vmem_io::driver::{Driver, Keep, PositionalFile, ReadPiece, WriteRun};

/// A seeded source, replayed with `VMEM_SEED`.
pub(crate) fn rng(default: u64) -> SmallRng {
    let seed = std::env::var("VMEM_SEED").map_or(default, |text| text.parse().unwrap());
    eprintln!("VMEM_SEED={seed}");
    SmallRng::seed_from_u64(seed)
}

pub(crate) fn random_bytes(rng: &mut SmallRng, len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes[..]);
    bytes.into()
}

/// Waits for something that other threads bring about; gives up after a long time.
pub(crate) fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let start = Instant::now();
    while !check() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Bytes that tell when the last share of them is gone.
pub(crate) fn watched(bytes: Vec<u8>) -> (Bytes, Arc<AtomicBool>) {
    struct Watched(Vec<u8>, Arc<AtomicBool>);
    impl AsRef<[u8]> for Watched {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    impl Drop for Watched {
        fn drop(&mut self) {
            self.1.store(true, Ordering::SeqCst);
        }
    }
    let freed = Arc::new(AtomicBool::new(false));
    let bytes = Bytes::from_owner(Watched(bytes, Arc::clone(&freed)));
    (bytes, freed)
}

/// What the next system call does instead of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The most bytes.
    Short(usize),
    Errno(i32),
    Panic,
}

type Script = Box<dyn FnMut(&'static str) -> Fault + Send>;

/// A file in memory. A script decides on each call; a gate can hold all of them.
pub(crate) struct FaultyFile {
    pub(crate) data: Mutex<Vec<u8>>,
    script: Mutex<Script>,
    held: Mutex<bool>,
    open: Condvar,
    pub(crate) calls: AtomicU64,
    pub(crate) entered: AtomicU64,
    dropped: Arc<AtomicBool>,
}

impl FaultyFile {
    pub(crate) fn new(script: impl FnMut(&'static str) -> Fault + Send + 'static) -> Self {
        FaultyFile {
            data: Mutex::new(Vec::new()),
            script: Mutex::new(Box::new(script)),
            held: Mutex::new(false),
            open: Condvar::new(),
            calls: AtomicU64::new(0),
            entered: AtomicU64::new(0),
            dropped: Arc::new(AtomicBool::new(false)),
        }
    }

    pub(crate) fn dropped(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.dropped)
    }

    pub(crate) fn hold(&self) {
        *self.held.lock() = true;
    }

    pub(crate) fn let_go(&self) {
        *self.held.lock() = false;
        self.open.notify_all();
    }

    /// How many bytes the call may move.
    fn enter(&self, call: &'static str) -> io::Result<usize> {
        self.entered.fetch_add(1, Ordering::SeqCst);
        self.open.wait_while(&mut self.held.lock(), |held| *held);
        self.calls.fetch_add(1, Ordering::SeqCst);
        let fault = (self.script.lock())(call);
        match fault {
            Fault::None => Ok(usize::MAX),
            Fault::Short(count) => Ok(count),
            Fault::Errno(errno) => Err(io::Error::from_raw_os_error(errno)),
            Fault::Panic => panic!("expected by the test"),
        }
    }
}

impl Drop for FaultyFile {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::SeqCst);
    }
}

impl std::fmt::Debug for FaultyFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FaultyFile")
    }
}

/// A share, so that the test keeps access.
#[derive(Clone, Debug)]
pub(crate) struct SharedFile(pub(crate) Arc<FaultyFile>);

impl PositionalFile for SharedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let most = self.0.enter("read")?;
        let data = self.0.data.lock();
        let data = data.get(offset as usize..).unwrap_or_default();
        let count = buf.len().min(data.len()).min(most);
        buf[..count].copy_from_slice(&data[..count]);
        Ok(count)
    }

    fn write_vectored_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        assert!(parts.len() <= 1024, "more parts than a system call takes");
        let most = self.0.enter("write")?;
        let all: Vec<u8> = parts.iter().flat_map(|part| part.to_vec()).collect();
        let bytes = &all[..all.len().min(most)];
        put(&mut self.0.data.lock(), offset, bytes);
        Ok(bytes.len())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.enter("sync").map(drop)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.0.enter("punch")?;
        zero(&mut self.0.data.lock(), &range);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.data.lock().len() as u64)
    }
}

fn put(data: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let start = offset as usize;
    let end = start + bytes.len();
    if data.len() < end {
        data.resize(end, 0);
    }
    data[start..end].copy_from_slice(bytes);
}

fn zero(data: &mut [u8], range: &Range<u64>) {
    let end = (range.end as usize).min(data.len());
    let start = (range.start as usize).min(end);
    data[start..end].fill(0);
}

/// An operation that has started and has not completed.
pub(crate) enum Op {
    Read(IoBuf, Vec<ReadPiece>, Keep, oneshot::Sender<(IoBuf, Keep, io::Result<()>)>),
    Write(Vec<WriteRun>, Keep, oneshot::Sender<(Keep, io::Result<()>)>),
    Punch(Vec<Range<u64>>, Keep, oneshot::Sender<(Keep, io::Result<()>)>),
    Sync(oneshot::Sender<io::Result<()>>),
}

/// A driver in memory that does nothing until the test says so: the effect of an operation happens
/// when the test completes it, and until then it owns what it was given.
#[derive(Default)]
pub(crate) struct ManualDriver {
    pub(crate) ops: Mutex<Vec<Op>>,
    pub(crate) data: Mutex<Vec<u8>>,
    pub(crate) buffered: bool,
}

impl ManualDriver {
    pub(crate) fn pending(&self) -> Vec<&'static str> {
        let name = |op: &Op| match op {
            Op::Read(..) => "read",
            Op::Write(..) => "write",
            Op::Punch(..) => "punch",
            Op::Sync(..) => "sync",
        };
        self.ops.lock().iter().map(name).collect()
    }

    /// Completes the first pending operation of this name.
    pub(crate) fn complete(&self, name: &str, result: io::Result<()>) {
        let index = self.pending().iter().position(|&pending| pending == name);
        self.complete_nth(index.unwrap_or_else(|| panic!("no {name} is pending")), result);
    }

    pub(crate) fn complete_nth(&self, index: usize, result: io::Result<()>) {
        let op = self.ops.lock().remove(index);
        let works = result.is_ok();
        match op {
            Op::Read(mut buf, pieces, keep, done) => {
                for piece in pieces.iter().filter(|_| works) {
                    let data = self.data.lock();
                    let start = piece.offset as usize;
                    buf[piece.range.clone()].copy_from_slice(&data[start..][..piece.range.len()]);
                }
                drop(done.send((buf, keep, result)));
            }
            Op::Write(runs, keep, done) => {
                for run in runs.iter().filter(|_| works) {
                    let all: Vec<u8> = run.parts.iter().flatten().copied().collect();
                    put(&mut self.data.lock(), run.offset, &all);
                }
                drop(done.send((keep, result)));
            }
            Op::Punch(ranges, keep, done) => {
                ranges.iter().for_each(|range| zero(&mut self.data.lock(), range));
                drop(done.send((keep, result)));
            }
            Op::Sync(done) => drop(done.send(result)),
        }
    }
}

impl std::fmt::Debug for ManualDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ManualDriver")
    }
}

impl Driver for ManualDriver {
    fn read(
        &self,
        buf: IoBuf,
        pieces: Vec<ReadPiece>,
        keep: Keep,
    ) -> BoxFuture<'static, (IoBuf, Keep, io::Result<()>)> {
        let (sender, receiver) = oneshot::channel();
        self.ops.lock().push(Op::Read(buf, pieces, keep, sender));
        receiver.map(Result::unwrap).boxed()
    }

    fn write(&self, runs: Vec<WriteRun>, keep: Keep) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        let (sender, receiver) = oneshot::channel();
        self.ops.lock().push(Op::Write(runs, keep, sender));
        receiver.map(Result::unwrap).boxed()
    }

    fn punch(
        &self,
        ranges: Vec<Range<u64>>,
        keep: Keep,
    ) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        let (sender, receiver) = oneshot::channel();
        self.ops.lock().push(Op::Punch(ranges, keep, sender));
        receiver.map(Result::unwrap).boxed()
    }

    fn sync(&self) -> BoxFuture<'static, io::Result<()>> {
        let (sender, receiver) = oneshot::channel();
        self.ops.lock().push(Op::Sync(sender));
        receiver.map(Result::unwrap).boxed()
    }

    fn close(&self) -> BoxFuture<'static, io::Result<()>> {
        futures::future::ready(Ok(())).boxed()
    }

    fn buffers_writes(&self) -> bool {
        self.buffered
    }

    fn block_bytes(&self) -> u32 {
        512
    }

    fn describe(&self) -> Arc<str> {
        "manual".into()
    }
}
