//! The smallest disk tier that passes the suite, and ways to break it.
//!
//! Invariant: `free` are the gaps between the extents that exist, merged. Used by the tests of the
//! suite; it is no model for a real tier.

use std::collections::BTreeMap;
use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use vmem_core::backend::{
    Extent, ExtentOwner, IoBuf, ReadChunk, SharedOwner, Tier, TierError, TierUsage,
};
use vmem_io::driver::{Driver, Keep, ReadPiece, WriteRun};

const BLOCK: u64 = 512;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Bug {
    None,
    /// The extents of a write whose future is dropped are never given back.
    LeaksDropped,
    /// Space of a write is given back at the drop of the future, with the I/O still going on.
    FreesEarly,
    /// Chunks are not compared with their checksums.
    TrustsTheDisk,
    /// Space that was only reserved shows its previous bytes.
    ShowsOldBytes,
    /// A reservation that fails half-way keeps its first half.
    KeepsHalf,
    /// Says `largest_free_bytes` of all that is free.
    SaysAllIsOneRun,
    /// The ledger counts payload in place of footprint.
    CountsPayload,
    /// Reads chunks one after the other, wherever they should go.
    IgnoresPlaces,
    /// Works on after `close`.
    NeverCloses,
    /// Sums of the chunks go to the wrong extents.
    SwapsSums,
}

#[derive(Debug)]
pub(crate) struct TinyDisk {
    driver: Arc<dyn Driver>,
    space: Arc<Space>,
    bug: Bug,
    closed: AtomicBool,
}

#[derive(Debug)]
struct Space {
    state: Mutex<State>,
    bug: Bug,
}

#[derive(Debug)]
struct State {
    free: BTreeMap<u64, u64>,
    usage: TierUsage,
}

impl TinyDisk {
    /// `driver` has a file of at least `capacity` bytes.
    pub(crate) fn new(driver: Arc<dyn Driver>, capacity: u64, bug: Bug) -> Arc<Self> {
        let state = State {
            free: BTreeMap::from([(0, capacity)]),
            usage: TierUsage { capacity_bytes: capacity, ..TierUsage::default() },
        };
        Arc::new(TinyDisk {
            driver,
            space: Arc::new(Space { state: Mutex::new(state), bug }),
            bug,
            closed: AtomicBool::new(false),
        })
    }

    fn is_closed(&self) -> bool {
        self.bug != Bug::NeverCloses && self.closed.load(Ordering::Acquire)
    }

    fn read_pieces(
        &self,
        chunks: Vec<ReadChunk>,
        buf: IoBuf,
    ) -> BoxFuture<'static, (IoBuf, Result<(), TierError>)> {
        let pieces = pieces_of(&chunks, self.bug != Bug::ShowsOldBytes);
        let reading = self.driver.read(buf, pieces, Keep::none());
        let trusts = self.bug == Bug::TrustsTheDisk;
        Box::pin(async move {
            let (buf, _, result) = reading.await;
            let result = result.map_err(|error| failed("read", error));
            let result = result.and_then(|()| if trusts { Ok(()) } else { verify(&chunks, &buf) });
            (buf, result)
        })
    }

    fn take(&self, len: u32) -> Option<Extent> {
        let footprint = self.footprint(len);
        let state = &mut *self.space.state.lock();
        let (offset, run) = match footprint {
            0 => (0, 0),
            _ => {
                let mut fitting = state.free.iter().filter(|(_, run)| **run >= footprint);
                fitting.next().map(|(offset, run)| (*offset, *run))?
            }
        };
        if footprint > 0 {
            state.free.remove(&offset);
            if run > footprint {
                state.free.insert(offset + footprint, run - footprint);
            }
        }
        let counted = self.space.counted(footprint, len);
        state.usage.used_bytes += counted;
        state.usage.peak_bytes = state.usage.peak_bytes.max(state.usage.used_bytes);
        state.usage.extents += 1;
        Some(Extent::new(offset, len, footprint as u32, SharedOwner::new(self.space.clone())))
    }
}

impl Space {
    fn counted(&self, footprint: u64, len: u32) -> u64 {
        match self.bug {
            Bug::CountsPayload => u64::from(len) / 2 * 2,
            _ => footprint,
        }
    }
}

impl ExtentOwner for Space {
    fn release(&self, offset: u64, footprint: u32) {
        let state = &mut *self.state.lock();
        let mut len = u64::from(footprint);
        state.usage.used_bytes = state.usage.used_bytes.saturating_sub(len);
        state.usage.extents -= 1;
        if len == 0 {
            return;
        }
        let mut start = offset;
        if let Some(next) = state.free.remove(&(start + len)) {
            len += next;
        }
        if let Some((&before, &run)) = state.free.range(..start).next_back()
            && before + run == start
        {
            start = before;
            len += run;
        }
        state.free.insert(start, len);
    }
}

fn failed(operation: &'static str, error: std::io::Error) -> TierError {
    TierError::Io { operation, source: Arc::new(error) }
}

fn place(chunk: &ReadChunk) -> std::ops::Range<usize> {
    chunk.at..chunk.at + chunk.extent.len() as usize
}

fn pieces_of(chunks: &[ReadChunk], sealed_only: bool) -> Vec<ReadPiece> {
    let wanted = chunks.iter().filter(|chunk| chunk.extent.sum().is_some() || !sealed_only);
    let piece =
        |chunk: &ReadChunk| ReadPiece { offset: chunk.extent.offset(), range: place(chunk) };
    wanted.map(piece).collect()
}

impl Tier for TinyDisk {
    fn reserve(&self, lens: &[u32]) -> Result<Vec<Extent>, TierError> {
        if self.is_closed() {
            return Err(TierError::Closed);
        }
        let usage = self.usage();
        let mut extents = Vec::new();
        for len in lens {
            match self.take(*len) {
                Some(extent) => extents.push(extent),
                None => {
                    if self.bug == Bug::KeepsHalf {
                        std::mem::forget(extents);
                    }
                    return Err(TierError::Full {
                        requested_bytes: lens.iter().map(|len| self.footprint(*len)).sum(),
                        free_bytes: usage.capacity_bytes - usage.used_bytes,
                        source: None,
                    });
                }
            }
        }
        Ok(extents)
    }

    fn write(
        &self,
        pieces: Vec<(Extent, Bytes)>,
    ) -> BoxFuture<'static, Result<Vec<Extent>, TierError>> {
        if self.is_closed() {
            return Box::pin(ready(Err(TierError::Closed)));
        }
        let runs = pieces.iter().map(|(extent, chunk)| WriteRun {
            offset: extent.offset(),
            parts: vec![chunk.clone()],
        });
        let writing = self.driver.write(runs.collect(), Keep::none());
        let bug = self.bug;
        if bug == Bug::LeaksDropped {
            let mut pieces = std::mem::ManuallyDrop::new(pieces);
            return Box::pin(async move {
                let result = writing.await.1.map_err(|error| failed("write", error));
                result.map(|()| seal(std::mem::take(&mut *pieces), bug))
            });
        }
        let finish = async move {
            let result = writing.await.1.map_err(|error| failed("write", error));
            result.map(|()| seal(pieces, bug))
        };
        if bug == Bug::FreesEarly {
            return Box::pin(finish);
        }
        let task = tokio::spawn(finish);
        Box::pin(async move { task.await.expect("a write does not panic") })
    }

    fn read(
        &self,
        chunks: Vec<ReadChunk>,
        mut buf: IoBuf,
    ) -> BoxFuture<'static, (IoBuf, Result<(), TierError>)> {
        if self.is_closed() {
            return Box::pin(ready((buf, Err(TierError::Closed))));
        }
        for chunk in &chunks {
            match buf.get_mut(place(chunk)) {
                Some(bytes) => bytes.fill(0),
                None => {
                    let error = std::io::ErrorKind::InvalidInput.into();
                    return Box::pin(ready((buf, Err(failed("read", error)))));
                }
            }
        }
        if self.bug == Bug::IgnoresPlaces {
            let extents: Vec<_> = chunks.iter().map(|chunk| chunk.extent.clone()).collect();
            return self.read_pieces(ReadChunk::in_sequence(extents), buf);
        }
        self.read_pieces(chunks, buf)
    }

    fn footprint(&self, len: u32) -> u64 {
        u64::from(len).next_multiple_of(BLOCK)
    }

    fn usage(&self) -> TierUsage {
        let state = self.space.state.lock();
        let mut usage = state.usage;
        usage.largest_free_bytes = match self.bug {
            Bug::SaysAllIsOneRun => usage.capacity_bytes - usage.used_bytes,
            _ => state.free.values().max().copied().unwrap_or(0),
        };
        usage
    }

    fn describe(&self) -> Arc<str> {
        "tiny".into()
    }

    fn close(&self) -> BoxFuture<'static, Result<(), TierError>> {
        self.closed.store(true, Ordering::Release);
        if self.bug == Bug::NeverCloses {
            return Box::pin(ready(Ok(())));
        }
        let closing = self.driver.close();
        Box::pin(async move { closing.await.map_err(|error| failed("close", error)) })
    }
}

fn seal(pieces: Vec<(Extent, Bytes)>, bug: Bug) -> Vec<Extent> {
    let mut sums: Vec<u32> = pieces.iter().map(|(_, chunk)| crc32c::crc32c(chunk)).collect();
    if bug == Bug::SwapsSums {
        sums.reverse();
    }
    let sealed = pieces.into_iter().zip(sums).map(|((mut extent, _), sum)| {
        extent.seal(sum);
        extent
    });
    sealed.collect()
}

fn verify(chunks: &[ReadChunk], buf: &[u8]) -> Result<(), TierError> {
    for (chunk, read) in chunks.iter().enumerate() {
        let actual = crc32c::crc32c(&buf[place(read)]);
        if let Some(expected) = read.extent.sum().filter(|expected| *expected != actual) {
            return Err(TierError::Corrupt { chunk, expected, actual });
        }
    }
    Ok(())
}
