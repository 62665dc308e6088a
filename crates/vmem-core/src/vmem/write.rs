//! Writing.
//!
//! Invariant: a write is visible as a whole or not at all. Either it changes bytes that have no
//! reader, in one go that no await interrupts, or it fills a new version that is published at the
//! end. The caller's data is copied before the future returns, into memory that the runtime owns; a
//! write that is dropped half way leaves the previous version.
//!
//! Where the new version goes: in place, if it is small and the old one has no reader; into host
//! memory, if there is space or eviction can make some; else through staging to disk. The caller's
//! future only copies its data there, within a poll, and never holds the gate across one: what the
//! version needs besides, and its publication, is done by a task (`migrate/write.rs`).

use std::ops::Range;
use std::sync::Arc;

use super::read::check_range;
use super::{Result, VirtualMemory};
use crate::asker;
use crate::buffer::IoBuf;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::handle::VMemHandle;
use crate::migrate::{self, DiskWrite, Finished, Job, NewVersion, Turn};
use crate::object::{GatePass, Object};
use crate::parcel::{Parcel, parcel};
use crate::tier::{Class, Need, Refused};

/// A copy of at most this many bytes is made in one go, in place.
const IN_PLACE_MAX: usize = 256 * 1024;

/// The outcome of a look at the object under its gate.
enum Look {
    /// The write was done in place.
    Written,
    /// It takes this space, which `allocate` reserved.
    Spare(NewVersion),
    /// It takes new space for the whole object; with `may_spill` it goes to disk if there is none.
    Space { may_spill: bool },
    /// The object, which is small, is to be promoted first.
    Promote,
    /// It goes to disk.
    Disk,
}

impl VirtualMemory {
    /// Replaces all bytes of the object. Readers keep the version that they read; later reads get
    /// the new one. Writes to one object apply in the order in which they complete. One that is
    /// dropped applies whole or not at all: if it was about to, then a moment after the drop, but
    /// before any later write.
    ///
    /// # Errors
    ///
    /// `SizeMismatch` if `data` is not as long as the object; `HandleNotFound`, `Closed`;
    /// `TierFull` if neither host memory nor disk has space for the version that a held reader
    /// forces, `TimedOut`, `Io`. After an error the object is as it was.
    pub async fn write(&self, handle: &VMemHandle, data: impl AsRef<[u8]> + Send) -> Result<()> {
        tokio::task::coop::consume_budget().await;
        let object = self.check(handle)?;
        let data = data.as_ref();
        if data.len() != object.len {
            return Err(VirtualMemoryError::SizeMismatch {
                handle: object.id,
                expected: object.len,
                actual: data.len(),
            });
        }
        Box::pin(self.write_range(object, 0..data.len(), data)).await?;
        self.bring_home(object);
        Ok(())
    }

    /// Replaces a part of the object, from `offset` bytes from its start.
    ///
    /// # Errors
    ///
    /// Those of [`write`](Self::write); `OutOfRange`; and, where the rest of a chunk has to be
    /// read first, `Corrupt`.
    pub async fn write_at(
        &self,
        handle: &VMemHandle,
        offset: usize,
        data: impl AsRef<[u8]> + Send,
    ) -> Result<()> {
        tokio::task::coop::consume_budget().await;
        let object = self.check(handle)?;
        let data = data.as_ref();
        let end = offset.saturating_add(data.len());
        check_range(object, &(offset..end))?;
        Box::pin(self.write_range(object, offset..end, data)).await?;
        self.bring_home(object);
        Ok(())
    }

    /// Builds all bytes of the object in place: `fill` gets zeros in host memory. If it panics the
    /// object is as it was.
    ///
    /// # Errors
    ///
    /// Those of [`write`](Self::write), and, since the bytes must be in host memory,
    /// `ExceedsCapacity` and `AllPinned`.
    pub async fn write_with<F>(&self, handle: &VMemHandle, fill: F) -> Result<()>
    where
        F: FnOnce(&mut [u8]) + Send,
    {
        tokio::task::coop::consume_budget().await;
        let object = self.check(handle)?;
        if object.len == 0 {
            fill(&mut []);
            return Ok(());
        }
        Box::pin(async {
            let deadline = self.shared.deadline();
            let spare = match object.gate_if_open()? {
                Some(pass) => NewVersion::spare(&pass),
                None => None,
            };
            let mut version = match spare {
                Some(version) => version,
                None => {
                    let space = self.shared.host_space_or_error(&need(object), &deadline).await?;
                    NewVersion::taken(object, space)
                }
            };
            let bytes = version.bytes();
            bytes.fill(0);
            fill(bytes);
            self.publish(version, 0..object.len, &deadline).await?;
            object.touch();
            Ok(())
        })
        .await?;
        self.bring_home(object);
        Ok(())
    }

    async fn write_range(
        &self,
        object: &Arc<Object>,
        range: Range<usize>,
        data: &[u8],
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let deadline = self.shared.deadline();
        object.touch();
        loop {
            if self.write_to_host(object, &range, data, &deadline).await? {
                return Ok(());
            }
            // There is no space for two versions: the write is done in place, in one go, rather
            // than fail.
            if let Some(pass) = object.gate_if_open()?
                && object.write_in_place(&pass, range.clone(), data)
            {
                return Ok(());
            }
            match self.write_to_disk(object, &range, data, &deadline).await? {
                Finished::Published => return Ok(()),
                // It was pinned to host memory meanwhile.
                Finished::Pinned if deadline.is_past() => return Err(deadline.error("writing")),
                Finished::Pinned => {}
            }
        }
    }

    /// Writes to host memory; false if the new version is better on disk, or finds no space here.
    async fn write_to_host(
        &self,
        object: &Arc<Object>,
        range: &Range<usize>,
        data: &[u8],
        deadline: &Deadline,
    ) -> Result<bool> {
        let mut promoted = false;
        loop {
            let look = match object.gate_if_open()? {
                Some(pass) => self.look(&pass, range, data, promoted),
                None if data.len() <= IN_PLACE_MAX => {
                    object.gate_opened(deadline).await?;
                    continue;
                }
                // A large write makes a new version anyway, and need not wait for the gate.
                None => Look::Space { may_spill: object.pins() == 0 },
            };
            let version = match look {
                Look::Written => return Ok(true),
                Look::Disk => return Ok(false),
                Look::Promote => {
                    promoted = self.promote_for_write(object, deadline).await?;
                    None
                }
                Look::Spare(version) => Some(version),
                Look::Space { may_spill } => {
                    match self.take_space(object, may_spill, deadline).await? {
                        None => return Ok(false),
                        version => version,
                    }
                }
            };
            if let Some(version) = version {
                if let Some(version) = self.fill(version, range, data).await {
                    self.publish(version, range.clone(), deadline).await?;
                    return Ok(true);
                }
                // The space was taken back; space that was reserved for the object is reserved
                // again.
                self.check_open()?;
            }
            if deadline.is_past() {
                return Err(deadline.error("writing"));
            }
        }
    }

    /// Decides how to write, or writes at once if that takes no wait.
    fn look(&self, pass: &GatePass, range: &Range<usize>, data: &[u8], promoted: bool) -> Look {
        let object = pass.object();
        let small = data.len() <= IN_PLACE_MAX;
        if small && object.write_in_place(pass, range.clone(), data) {
            return Look::Written;
        }
        let fits = self.shared.fits_host(object.len);
        if object.copy.is_some() {
            return Look::Space { may_spill: object.pins() == 0 };
        }
        if let Some(version) = NewVersion::spare(pass) {
            return Look::Spare(version);
        }
        let whole = range.len() == object.len;
        if object.home.level().is_some() || !fits {
            return Look::Disk;
        }
        match (whole, object.len <= IN_PLACE_MAX && !promoted) {
            (true, _) => Look::Space { may_spill: true },
            (false, true) => Look::Promote,
            (false, false) => Look::Disk,
        }
    }

    /// Promotes a small object to host memory, where a part of it is better written, if there is
    /// space for it right now. True if it was tried.
    async fn promote_for_write(&self, object: &Arc<Object>, deadline: &Deadline) -> Result<bool> {
        let Some(space) = self.shared.try_host_space(&need(object).or_spill()) else {
            return Ok(true);
        };
        let job = Job::new(object.clone(), MigrationCause::Read, *deadline);
        let promoted = async move { migrate::fetch_with(&job, Some(space)).await.map(drop) };
        let parcel = self.shared.spawn_for_caller("vmem-promote", promoted);
        self.shared.answer(&parcel, deadline, "promoting an object to write to it").await?;
        Ok(true)
    }

    /// Takes space for a new version in host memory; `None` if it can only go to disk.
    async fn take_space(
        &self,
        object: &Arc<Object>,
        may_spill: bool,
        deadline: &Deadline,
    ) -> Result<Option<NewVersion>> {
        if !self.shared.fits_host(object.len) {
            return Ok(None);
        }
        let taken = |space| Some(NewVersion::taken(object, space));
        if !may_spill {
            // It must not leave host memory.
            return self.shared.host_space_or_error(&need(object), deadline).await.map(taken);
        }
        match self.shared.host_space(&need(object).or_spill(), deadline).await {
            Ok(space) => Ok(taken(space)),
            Err(Refused::Error(VirtualMemoryError::Closed)) => Err(VirtualMemoryError::Closed),
            Err(_) => Ok(None),
        }
    }

    /// Copies the caller's data to where it belongs in the new version, a piece a poll. `None` if
    /// the space was taken back, since others waited for it and this future was not polled.
    async fn fill(
        &self,
        mut version: NewVersion,
        range: &Range<usize>,
        data: &[u8],
    ) -> Option<NewVersion> {
        if data.len() <= IN_PLACE_MAX {
            version.bytes()[range.clone()].copy_from_slice(data);
            return Some(version);
        }
        let lent = Parcel::lend(version);
        for (nth, piece) in data.chunks(IN_PLACE_MAX).enumerate() {
            let start = range.start + nth * IN_PLACE_MAX;
            lent.with(&self.shared.unclaimed, |version| {
                version.bytes()[start..start + piece.len()].copy_from_slice(piece);
            })?;
            tokio::task::yield_now().await;
        }
        lent.take_back()
    }

    /// Publishes a version that has the caller's data at `range`.
    async fn publish(
        &self,
        version: NewVersion,
        range: Range<usize>,
        deadline: &Deadline,
    ) -> Result<()> {
        let object = version.object().clone();
        let at_once = range.len() == object.len;
        if at_once && let Some(pass) = object.gate_if_open()? {
            version.publish_whole(&pass);
            return Ok(());
        }
        let (reply, parcel) = parcel();
        let work = migrate::publish_version(version, range, *deadline, reply);
        self.shared.spawn("vmem-write", asker::awaited(work));
        self.shared.answer(&parcel, deadline, "publishing a write").await.map(drop)
    }

    /// Writes through staging: every chunk that the range touches goes to a new extent. Between two
    /// pieces a task owns the write, or it lies in a parcel: if others find no space on disk it is
    /// taken back, and the write begins again.
    async fn write_to_disk(
        &self,
        object: &Arc<Object>,
        range: &Range<usize>,
        data: &[u8],
        deadline: &Deadline,
    ) -> Result<Finished> {
        // Once a piece was taken back, since this future was not polled, the write uses memory of
        // its own.
        let mut owned = false;
        let write = loop {
            let submitted = self.submit_all(object, range, data, &mut owned, deadline).await?;
            if let Some(write) = submitted {
                break write;
            }
            self.check_open()?;
            if deadline.is_past() {
                return Err(deadline.error("writing to disk"));
            }
        };
        let (reply, parcel) = parcel();
        let work = migrate::finish_disk_write(write, *deadline, reply);
        self.shared.spawn("vmem-write", asker::awaited(work));
        let finished = self.shared.answer(&parcel, deadline, "writing to disk").await?;
        // This answer is not taken back; if it were, the write would begin again.
        Ok(finished.unwrap_or(Finished::Pinned))
    }

    /// Submits all chunks that the data covers whole. `None` if the write was taken back.
    async fn submit_all(
        &self,
        object: &Arc<Object>,
        range: &Range<usize>,
        data: &[u8],
        owned: &mut bool,
        deadline: &Deadline,
    ) -> Result<Option<DiskWrite>> {
        let write = DiskWrite::new(object, range, data);
        if write.is_submitted() {
            return Ok(Some(write));
        }
        let begun = migrate::begin_disk_write(write, *owned, *deadline);
        let mut turn = self.shared.spawn_for_caller("vmem-write", begun);
        loop {
            let answer = self.shared.answer(&turn, deadline, "writing to disk").await?;
            let Some(Turn { write, piece }) = answer else { return Ok(None) };
            let Some(mut write) = write.take_back() else { return Ok(None) };
            let piece = piece.and_then(Parcel::take_back);
            *owned |= piece.is_none();
            let bytes = write.next_bytes(piece.is_none());
            let mut piece = piece.unwrap_or_else(|| IoBuf::from_vec(vec![0; bytes.len()]));
            let start = bytes.start - range.start;
            piece[..bytes.len()].copy_from_slice(&data[start..start + bytes.len()]);
            write.submit(piece, bytes);
            if write.is_submitted() {
                return Ok(Some(write));
            }
            let next = migrate::next_turn(write, *owned, *deadline);
            turn = self.shared.spawn_for_caller("vmem-write", next);
        }
    }
}

fn need(object: &Object) -> Need {
    Need::one(object.len, object.id, Class::Demand)
}
