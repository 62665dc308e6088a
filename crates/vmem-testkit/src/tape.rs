//! A disk that records what reaches it, so that the power can be cut at any moment afterwards.
//!
//! Invariant: what a sync covered is in every image after it, whole; of what came after the last
//! sync of a file before the cut, any writes are there, in any order, each whole, torn at 512
//! bytes, or not at all. Called by the tests of what survives.
//!
//! The data file is reached through [`TapeDriver`], the catalog through [`TapeStorage`]; both
//! record on one [`Tape`], so that a cut hits both at the same moment.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use redb::StorageBackend;
use vmem_core::backend::{Clock, IoBuf};
use vmem_io::driver::{Driver, Keep, ReadPiece, WriteRun};

/// What a disk writes whole or not at all, in bytes.
const SECTOR: usize = 512;

/// One of the two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum File {
    Data,
    Catalog,
}

#[derive(Clone, Debug)]
enum Event {
    Write(File, u64, Bytes),
    Punch(Range<u64>),
    Len(File, u64),
    Sync(File),
}

/// Both files as they are, and everything that happened to them.
#[derive(Debug, Default)]
pub struct Tape(Mutex<Recorded>);

#[derive(Debug, Default)]
struct Recorded {
    data: Vec<u8>,
    catalog: Vec<u8>,
    /// As it was when the recording began.
    first: Image,
    events: Vec<Event>,
}

/// What is on a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// The data file.
    pub data: Vec<u8>,
    /// The catalog.
    pub catalog: Vec<u8>,
}

impl Tape {
    /// A disk with this on it.
    pub fn of(image: Image) -> Arc<Self> {
        let Image { data, catalog } = image.clone();
        Arc::new(Tape(Mutex::new(Recorded { data, catalog, first: image, events: Vec::new() })))
    }

    /// How much has been recorded: a moment at which the power can be cut.
    pub fn position(&self) -> usize {
        self.0.lock().events.len()
    }

    /// Both files as they are now.
    pub fn image(&self) -> Image {
        let recorded = self.0.lock();
        Image { data: recorded.data.clone(), catalog: recorded.catalog.clone() }
    }

    /// What may be on the disk if the power is cut at this moment.
    pub fn cut(&self, position: usize, rng: &mut impl Rng) -> Image {
        let recorded = self.0.lock();
        let events = &recorded.events[..position];
        let mut image = recorded.first.clone();
        for file in [File::Data, File::Catalog] {
            let of_file = |event: &Event| event.file() == file;
            let synced = events
                .iter()
                .rposition(|event| matches!(event, Event::Sync(synced) if *synced == file))
                .unwrap_or(0);
            let (sure, open) = events.split_at(synced);
            for event in sure.iter().filter(|event| of_file(event)) {
                image.apply(event);
            }
            let mut open: Vec<Event> =
                open.iter().filter(|event| of_file(event)).cloned().collect();
            // How likely it is that something arrived, in this cut.
            let chance = [0.1, 0.5, 0.9][rng.random_range(0..3)];
            if rng.random_bool(0.5) {
                open.shuffle(rng);
            }
            for event in open {
                if rng.random_bool(chance) {
                    image.apply_torn(event, rng);
                }
            }
        }
        image
    }
}

impl Event {
    fn file(&self) -> File {
        match self {
            Event::Write(file, ..) | Event::Len(file, _) | Event::Sync(file) => *file,
            Event::Punch(_) => File::Data,
        }
    }
}

impl Image {
    fn bytes(&mut self, file: File) -> &mut Vec<u8> {
        match file {
            File::Data => &mut self.data,
            File::Catalog => &mut self.catalog,
        }
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::Write(file, offset, bytes) => put(self.bytes(*file), *offset as usize, bytes),
            Event::Punch(range) => {
                let end = (range.end as usize).min(self.data.len());
                let start = (range.start as usize).min(end);
                self.data[start..end].fill(0);
            }
            Event::Len(file, len) => self.bytes(*file).resize(*len as usize, 0),
            Event::Sync(_) => {}
        }
    }

    fn apply_torn(&mut self, event: Event, rng: &mut impl Rng) {
        match event {
            Event::Write(file, offset, bytes) if rng.random_bool(0.5) => {
                // At the sectors of the disk, not of the write.
                let mut at = 0;
                while at < bytes.len() {
                    let sector = SECTOR - (offset as usize + at) % SECTOR;
                    let part = bytes.slice(at..bytes.len().min(at + sector));
                    if rng.random_bool(0.5) {
                        self.apply(&Event::Write(file, offset + at as u64, part.clone()));
                    }
                    at += part.len();
                }
            }
            event => self.apply(&event),
        }
    }
}

fn put(file: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if file.len() < end {
        file.resize(end, 0);
    }
    file[offset..end].copy_from_slice(bytes);
}

impl Recorded {
    fn record(&mut self, event: Event) {
        let mut now = Image {
            data: std::mem::take(&mut self.data),
            catalog: std::mem::take(&mut self.catalog),
        };
        now.apply(&event);
        (self.data, self.catalog) = (now.data, now.catalog);
        self.events.push(event);
    }
}

/// The data file of a [`Tape`]. An operation has its effect after a few turns of the other tasks.
#[derive(Debug)]
pub struct TapeDriver {
    tape: Arc<Tape>,
    buffered: bool,
    rng: Mutex<SmallRng>,
}

impl TapeDriver {
    /// As if through the page cache, or as if past it; past it no write is synced on its own.
    pub fn new(tape: &Arc<Tape>, buffered: bool) -> Arc<Self> {
        let rng = Mutex::new(SmallRng::seed_from_u64(7));
        Arc::new(TapeDriver { tape: Arc::clone(tape), buffered, rng })
    }

    fn later<T: Send + 'static>(
        &self,
        effect: impl FnOnce(&mut Recorded) -> T + Send + 'static,
    ) -> BoxFuture<'static, T> {
        let tape = Arc::clone(&self.tape);
        let turns = self.rng.lock().random_range(0..4);
        async move {
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
            effect(&mut tape.0.lock())
        }
        .boxed()
    }
}

impl Driver for TapeDriver {
    fn read(
        &self,
        mut buf: IoBuf,
        pieces: Vec<ReadPiece>,
        keep: Keep,
    ) -> BoxFuture<'static, (IoBuf, Keep, io::Result<()>)> {
        self.later(move |recorded| {
            for piece in pieces {
                let start = piece.offset as usize;
                let Some(bytes) = recorded.data.get(start..start + piece.range.len()) else {
                    return (buf, keep, Err(io::ErrorKind::UnexpectedEof.into()));
                };
                buf[piece.range].copy_from_slice(bytes);
            }
            (buf, keep, Ok(()))
        })
    }

    fn write(&self, runs: Vec<WriteRun>, keep: Keep) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        self.later(move |recorded| {
            for run in runs {
                let mut bytes = BytesMut::new();
                run.parts.iter().for_each(|part| bytes.extend_from_slice(part));
                recorded.record(Event::Write(File::Data, run.offset, bytes.freeze()));
            }
            (keep, Ok(()))
        })
    }

    fn punch(
        &self,
        ranges: Vec<Range<u64>>,
        keep: Keep,
    ) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        // It is not polled: it happens at once.
        let mut recorded = self.tape.0.lock();
        ranges.into_iter().for_each(|range| recorded.record(Event::Punch(range)));
        drop(recorded);
        async { (keep, Ok(())) }.boxed()
    }

    fn sync(&self) -> BoxFuture<'static, io::Result<()>> {
        self.later(|recorded| {
            recorded.record(Event::Sync(File::Data));
            Ok(())
        })
    }

    fn clock(&self) -> Clock {
        Clock::Runtime
    }

    fn close(&self) -> BoxFuture<'static, io::Result<()>> {
        async { Ok(()) }.boxed()
    }

    fn buffers_writes(&self) -> bool {
        self.buffered
    }

    fn block_bytes(&self) -> u32 {
        SECTOR as u32
    }

    fn describe(&self) -> Arc<str> {
        "a tape".into()
    }
}

/// The catalog of a [`Tape`].
#[derive(Debug)]
pub struct TapeStorage(pub Arc<Tape>);

impl StorageBackend for TapeStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.0.lock().catalog.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let recorded = self.0.0.lock();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.checked_add(out.len());
        let bytes = end.and_then(|end| recorded.catalog.get(start..end));
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.0.lock().record(Event::Len(File::Catalog, len));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.0.lock().record(Event::Sync(File::Catalog));
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let bytes = Bytes::copy_from_slice(data);
        self.0.0.lock().record(Event::Write(File::Catalog, offset, bytes));
        Ok(())
    }
}
