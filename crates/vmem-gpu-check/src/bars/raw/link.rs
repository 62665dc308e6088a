//! Copies between pinned and device memory.
//!
//! Invariant: a link waits for its streams before its memory is read, and before it frees it.
//! Called by the bars.

#![allow(unsafe_code)]

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use cudarc::driver::{CudaStream, result, sys};

use super::tables::Tables;
use super::{Piece, Source};
use crate::user::{BatchCopy, DeviceMemory, Pinned, User};

/// Pinned memory, device memory, and streams on which is copied between them.
pub(in crate::bars) struct Link {
    pinned: Pinned,
    device: DeviceMemory,
    lanes: Vec<Arc<CudaStream>>,
    batch: std::result::Result<BatchCopy, String>,
    rows: Option<Rows>,
    tables: Option<Tables>,
}

/// Where rows are in pinned memory, as a kernel takes it.
struct Rows {
    addresses: DeviceMemory,
    count: usize,
    len: usize,
}

impl Link {
    /// With `len` bytes of each memory, and `streams` streams.
    pub(in crate::bars) fn new(
        user: &User,
        pinned: usize,
        device: usize,
        lanes: usize,
    ) -> Result<Self> {
        Self::over(user, user.pinned(pinned)?, user.allocate(device)?, lanes)
    }

    /// With host memory of the kind that a store has: mapped, and registered afterwards.
    pub(in crate::bars) fn registered(
        user: &User,
        pinned: usize,
        device: usize,
        lanes: usize,
    ) -> Result<Self> {
        Self::over(user, user.registered(pinned)?, user.allocate(device)?, lanes)
    }

    /// With memory of these kinds.
    pub(in crate::bars) fn over(
        user: &User,
        pinned: Pinned,
        device: DeviceMemory,
        lanes: usize,
    ) -> Result<Self> {
        let lanes = (0..lanes).map(|_| user.context.new_stream());
        let lanes = lanes.collect::<std::result::Result<Vec<_>, _>>().context("streams")?;
        let batch = BatchCopy::find();
        let mut link = Link { pinned, device, lanes, batch, rows: None, tables: None };
        if link.batch.is_ok() {
            // Found is not yet working.
            let tried = link.batch(0, true, &Piece::row(2, 16)).and_then(|()| link.wait());
            if let Err(error) = tried {
                link.batch = Err(format!("it was refused: {error:#}"));
            }
        }
        Ok(link)
    }

    pub(in crate::bars) fn stream(&self, lane: usize) -> &Arc<CudaStream> {
        &self.lanes[lane]
    }

    /// Why there are no batches; none if there are.
    pub(in crate::bars) fn no_batch(&self) -> Option<&str> {
        self.batch.as_ref().err().map(String::as_str)
    }

    /// Where the piece is, in host and in device memory.
    fn places(&self, piece: Piece) -> Result<(*mut u8, u64)> {
        let Piece { host, device, len } = piece;
        let within = |at: usize, all: usize| at.checked_add(len).is_some_and(|end| end <= all);
        ensure!(within(host, self.pinned.len()), "{piece:?} is outside of pinned memory");
        ensure!(within(device, self.device.len), "{piece:?} is outside of device memory");
        Ok((self.pinned.address().wrapping_add(host), self.device.address + device as u64))
    }

    /// Queues a copy to the device. On a thread that has the context.
    pub(in crate::bars) fn up(&self, lane: usize, piece: Piece) -> Result<()> {
        let (host, device) = self.places(piece)?;
        let stream = self.lanes[lane].cu_stream();
        // SAFETY: both are within memory of the link, which waits for its lanes before it is looked
        // at or freed.
        unsafe { sys::cuMemcpyHtoDAsync_v2(device, host.cast(), piece.len, stream) }
            .result()
            .context("a copy up")
    }

    /// Queues a copy from the device.
    pub(in crate::bars) fn down(&self, lane: usize, piece: Piece) -> Result<()> {
        let (host, device) = self.places(piece)?;
        let stream = self.lanes[lane].cu_stream();
        // SAFETY: as above.
        unsafe { sys::cuMemcpyDtoHAsync_v2(host.cast(), device, piece.len, stream) }
            .result()
            .context("a copy down")
    }

    /// Queues copies in one call.
    pub(in crate::bars) fn batch(&self, lane: usize, up: bool, pieces: &[Piece]) -> Result<()> {
        let batch = match &self.batch {
            Ok(batch) => batch,
            Err(why) => bail!("there are no batches: {why}"),
        };
        let mut to = Vec::new();
        let mut from = Vec::new();
        let mut lens: Vec<usize> = pieces.iter().map(|piece| piece.len).collect();
        for &piece in pieces {
            let (host, device) = self.places(piece)?;
            let host = host.expose_provenance() as u64;
            let (target, source) = if up { (device, host) } else { (host, device) };
            to.push(target);
            from.push(source);
        }
        // SAFETY: as for single copies; the driver takes copies of the lists.
        unsafe { batch.copy(&mut to, &mut from, &mut lens, &self.lanes[lane]) }
    }

    /// Waits for everything that was queued.
    pub(in crate::bars) fn wait(&self) -> Result<()> {
        self.lanes.iter().try_for_each(|lane| lane.synchronize()).context("waiting for copies")
    }

    /// The pinned memory.
    pub(in crate::bars) fn host(&mut self) -> Result<&mut [u8]> {
        self.wait()?;
        Ok(self.pinned.bytes_mut())
    }

    /// What is in device memory.
    pub(in crate::bars) fn device(&self) -> Result<Vec<u8>> {
        self.wait()?;
        self.device.read(&self.lanes[0])
    }

    /// Clears device memory: what it has later was copied later.
    pub(in crate::bars) fn clear_device(&self) -> Result<()> {
        self.wait()?;
        let at = self.device.address;
        let len = self.device.len;
        let lane = &self.lanes[0];
        lane.context().bind_to_thread()?;
        // SAFETY: the link's own memory, on its own stream.
        let cleared = unsafe { result::memset_d8_async(at, 0, len, lane.cu_stream()) };
        cleared.context("clearing device memory")?;
        self.wait()
    }

    /// Part of the device memory, for a kernel.
    pub(in crate::bars) fn part(&self, at: usize, len: usize) -> Source<'_> {
        Source::Memory { memory: &self.device, at, len }
    }

    /// Tells the device where rows of one length are in pinned memory.
    pub(in crate::bars) fn set_rows(&mut self, user: &User, pieces: &[Piece]) -> Result<()> {
        let len = pieces.first().context("no rows")?.len;
        ensure!(len % 16 == 0, "rows are of a multiple of 16 bytes");
        ensure!(pieces.len() * len <= self.device.len, "more rows than device memory");
        let mut list = Vec::new();
        for &piece in pieces {
            ensure!(piece.len == len && piece.host % 16 == 0, "{piece:?} is no row");
            let (host, _) = self.places(piece)?;
            list.extend_from_slice(&(host.expose_provenance() as u64).to_le_bytes());
        }
        let addresses = user.allocate(list.len())?;
        addresses.write(&list, &self.lanes[0])?;
        self.rows = Some(Rows { addresses, count: pieces.len(), len });
        Ok(())
    }

    /// Tells the tier's own kernel what it is to copy.
    pub(in crate::bars) fn set_tables(&mut self, user: &User, pieces: &[Piece]) -> Result<()> {
        self.wait()?;
        let copy = |&piece: &Piece| {
            let (host, device) = self.places(piece)?;
            Ok((device, host.expose_provenance() as u64, piece.len))
        };
        let copies = pieces.iter().map(copy).collect::<Result<Vec<_>>>()?;
        self.tables = Some(Tables::new(user, &copies)?);
        Ok(())
    }

    /// Queues these copies, by the tier's own kernel.
    pub(in crate::bars) fn tables(&self, lane: usize) -> Result<()> {
        let tables = self.tables.as_ref().context("no tables were set")?;
        // SAFETY: the copies are within memory of the link, which waits for its lanes before it is
        // looked at or freed, and keeps the tables as long.
        unsafe { tables.launch(&self.lanes[lane]) }
    }

    /// Queues a kernel that copies the rows into device memory, one behind the other.
    pub(in crate::bars) fn rows(&self, user: &User, lane: usize) -> Result<()> {
        let rows = self.rows.as_ref().context("no rows were set")?;
        let count = rows.count as u64;
        let len = rows.len as u64;
        let arguments = [self.device.address, rows.addresses.address, count, len];
        // A block for each row.
        let threads = count * 256;
        // SAFETY: the rows are within pinned memory, and fit device memory: that was looked at. The
        // link keeps all of it.
        unsafe { user.launch("vmem_rows", &arguments, threads, &self.lanes[lane]) }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.wait();
    }
}
