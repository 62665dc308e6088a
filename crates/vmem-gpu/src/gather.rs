//! Between many pieces of objects, in any tier, and one device buffer of the caller.
//!
//! Invariant: the buffer is touched after what the caller queued on its stream before, and by nothing any more when the call has
//! ended; one that is cancelled waits for the copies that have begun, for nothing else would keep them from writing to
//! memory that the caller has back. Called by users.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use vmem_core::backend::DeviceError;
use vmem_core::{VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::card::{Call, Foreign, Source};
use crate::lease::{check_stream, device_error, tier};
use crate::tier::CudaTier;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Pieces of one call that are read, or under way, at once.
const PIECES_MAX: usize = 32;
/// What is taken out of a buffer at a time, in bytes.
const TAKE_BYTES: usize = 1 << 20;

/// A device buffer of the caller, and the stream in whose order it is used.
#[derive(Debug)]
pub struct DeviceTarget<'a> {
    address: u64,
    len: usize,
    stream: Arc<CudaStream>,
    borrowed: PhantomData<&'a mut [u8]>,
}

impl<'a> DeviceTarget<'a> {
    /// A slice, in the order of its stream.
    pub fn from_slice(slice: &'a mut CudaSlice<u8>) -> Self {
        let (stream, len) = (slice.stream().clone(), slice.len());
        // Whatever used it on other streams comes before what its stream does from here on.
        let (address, before) = slice.device_ptr_mut(&stream);
        drop(before);
        DeviceTarget { address, len, stream, borrowed: PhantomData }
    }

    /// `len` bytes of device memory, in the order of `stream`.
    ///
    /// # Safety
    ///
    /// They are device memory of the context of `stream`, and nobody else uses them until the calls that are given this
    /// target have ended or were dropped.
    #[allow(unsafe_code)]
    pub unsafe fn from_raw(address: u64, len: usize, stream: &Arc<CudaStream>) -> Self {
        DeviceTarget { address, len, stream: stream.clone(), borrowed: PhantomData }
    }

    /// Its length, in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Waits for what the caller queued before, so that nobody else's copies stand behind that.
    async fn begin(&self, vmem: &VirtualMemory) -> Result<Running> {
        check_stream(vmem, &self.stream)?;
        let tier = tier(vmem)?;
        let before = {
            let card = tier.card()?;
            let recorded = card.visit(|| {
                let event = self.stream.record_event(None)?;
                Ok((event.try_is_complete()?, event))
            });
            recorded.and_then(|recorded| recorded)
        };
        let (passed, event) = before.map_err(|error| device_error("recording an event", error))?;
        if !passed {
            let waited = tier.watch(event, Box::new(())).await;
            waited.map_err(|_| VirtualMemoryError::Closed)?.map_err(DeviceError::public)?;
        }
        let call = Arc::new(Call::default());
        Ok(Running(Foreign { address: self.address, len: self.len, call }))
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => {
                let have = self.len;
                let reason =
                    format!("{len} bytes at {offset} are outside of a buffer of {have} bytes");
                let (field, reason) = ("target", reason.into());
                Err(VirtualMemoryError::InvalidConfig { field, reason })
            }
        }
    }
}

/// A call over the caller's memory. Dropped, it lets nothing more begin, and waits for what has.
struct Running(Foreign);

impl Drop for Running {
    fn drop(&mut self) {
        let call = &self.0.call;
        call.cancelled.store(true, Ordering::SeqCst);
        // For nothing after a call that was not cancelled: all its copies have answered, and let go before.
        while Arc::strong_count(call) > 1 {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// A piece of a gather: the object, the part of it, and where in the buffer that goes.
pub type Gathered<'a> = (&'a VMemHandle, Range<usize>, usize);
/// A piece of a scatter: where in the buffer it comes from, the object, and the part of it.
pub type Scattered<'a> = (usize, &'a VMemHandle, Range<usize>);

pub(crate) async fn gather(
    vmem: &VirtualMemory,
    pieces: &[Gathered<'_>],
    target: &DeviceTarget<'_>,
) -> Result<()> {
    for (handle, range, offset) in pieces {
        check_range(handle, range)?;
        target.check(*offset, range.len())?;
    }
    let tier = tier(vmem)?;
    let running = target.begin(vmem).await?;
    let mut copies: FuturesUnordered<BoxFuture<'_, Result<()>>> = FuturesUnordered::new();
    let mut outcome = Ok(());
    for (handle, range, offset) in pieces.iter().cloned() {
        if copies.len() >= PIECES_MAX
            && let Some(copied) = copies.next().await
        {
            outcome = outcome.and(copied);
        }
        if outcome.is_err() {
            break;
        }
        if !range.is_empty() {
            let to = running.0.clone();
            copies.push(Box::pin(give(vmem, tier, handle, range, to, offset)));
        }
    }
    while let Some(copied) = copies.next().await {
        outcome = outcome.and(copied);
    }
    outcome
}

async fn give(
    vmem: &VirtualMemory,
    tier: &CudaTier,
    handle: &VMemHandle,
    range: Range<usize>,
    to: Foreign,
    offset: usize,
) -> Result<()> {
    let share = vmem.share_in_vram(handle)?;
    let source = match &share {
        Some(share) => {
            let (offset, len) = (range.start, range.len());
            Source::Device { range: share.range(), offset, len }
        }
        None => Source::Host(vmem.read_at(handle, range).await?),
    };
    tier.give(to, offset, source).await.map_err(DeviceError::public)
}

pub(crate) async fn scatter(
    vmem: &VirtualMemory,
    target: &DeviceTarget<'_>,
    pieces: &[Scattered<'_>],
) -> Result<()> {
    for (offset, handle, range) in pieces {
        check_range(handle, range)?;
        target.check(*offset, range.len())?;
    }
    let tier = tier(vmem)?;
    let running = target.begin(vmem).await?;
    for (offset, handle, range) in pieces.iter().cloned() {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(TAKE_BYTES);
            let from = offset + (at - range.start);
            let buf = vmem.scratch(len).await?;
            let (buf, outcome) = tier.take(running.0.clone(), from, len, buf).await;
            outcome.map_err(DeviceError::public)?;
            vmem.write_at(handle, at, &buf[..len]).await?;
            at += len;
        }
    }
    Ok(())
}

fn check_range(handle: &VMemHandle, range: &Range<usize>) -> Result<()> {
    if range.start <= range.end && range.end <= handle.len() {
        return Ok(());
    }
    let (start, end, len) = (range.start, range.end, handle.len());
    Err(VirtualMemoryError::OutOfRange { handle: handle.id(), start, end, len })
}
