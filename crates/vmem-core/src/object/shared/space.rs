//! Space: in host memory, in staging, on disk.
//!
//! Invariant: a request for space waits in the queue of its tier, with a deadline, and holds no
//! space meanwhile. Called by migrations and writes.

use smallvec::SmallVec;

use super::Shared;
use crate::buffer::IoBuf;
use crate::copy::OwnedCopy;
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::host::HostArena;
use crate::latency::{self, ReadStage};
use crate::memory_tier::MemoryTier;
use crate::object::NO_OBJECT;
use crate::parcel::GRACE;
use crate::storage::{Extent, TierError};
use crate::tier::{Class, Device, Grant, HostSpace, Need, Refused, Space, Storage};

impl Shared {
    /// A piece of staging, for bytes that come from this tier or go there; for a task. Pieces that
    /// their callers do not claim are taken back.
    ///
    /// # Errors
    ///
    /// `TimedOut` at the deadline.
    pub(crate) async fn staging(
        &self,
        tier: MemoryTier,
        deadline: &Deadline,
    ) -> Result<IoBuf, VirtualMemoryError> {
        // All else ends at the disk, which has no share: with that all stands still anyway.
        let below_disk = tier.level().filter(|&level| level > 0);
        let share = tier.device().or(below_disk.map(|level| self.devices.len() + level - 1));
        let acquired = async {
            let acquire = self.staging.acquire(share);
            tokio::pin!(acquire);
            loop {
                tokio::select! {
                    biased;
                    piece = &mut acquire => return IoBuf::from_staging(piece),
                    () = tokio::time::sleep(GRACE) => drop(self.unclaimed.recall()),
                }
            }
        };
        let late = |Late| deadline.error("waiting for staging memory");
        let _stage = latency::enter(ReadStage::Space);
        deadline.bound(acquired).await.map_err(late)
    }

    /// The largest object that host memory could ever hold, in bytes of footprint.
    pub(crate) fn host_capacity_bytes(&self) -> u64 {
        self.host.space().arena.capacity_bytes()
    }

    /// Whether an object of this length can be host-resident at all.
    pub(crate) fn fits_host(&self, len: usize) -> bool {
        HostArena::footprint(len) <= self.host_capacity_bytes()
    }

    /// As [`fits_host`](Self::fits_host), for callers without an alternative.
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity`.
    pub(crate) fn check_fits_host(&self, len: usize) -> Result<(), VirtualMemoryError> {
        self.host.check_fits(HostArena::footprint(len))
    }

    /// Space in host memory for one object, if there is some now.
    pub(crate) fn try_host_space(&self, need: &Need) -> Option<OwnedCopy> {
        self.try_host_spaces(need)?.pop()
    }

    /// Space in host memory for each object of the request, if there is some for all now.
    pub(crate) fn try_host_spaces(&self, need: &Need) -> Option<Vec<OwnedCopy>> {
        self.host.queue.try_take(need).map(|grant| self.copies_in(grant))
    }

    /// Space in host memory for one object, as soon as there is some.
    pub(crate) async fn host_space(
        &self,
        need: &Need,
        deadline: &Deadline,
    ) -> Result<OwnedCopy, Refused> {
        self.host.queue.take(need, deadline).await.map(|grant| self.only_copy_in(grant))
    }

    /// As [`host_space`](Self::host_space), for callers without an alternative.
    pub(crate) async fn host_space_or_error(
        &self,
        need: &Need,
        deadline: &Deadline,
    ) -> Result<OwnedCopy, VirtualMemoryError> {
        self.host.take(need, deadline).await.map(|grant| self.only_copy_in(grant))
    }

    /// Space in host memory for each object of the request, as soon as there is some for all.
    pub(crate) async fn host_spaces_or_error(
        &self,
        need: &Need,
        deadline: &Deadline,
    ) -> Result<Vec<OwnedCopy>, VirtualMemoryError> {
        self.host.take(need, deadline).await.map(|grant| self.copies_in(grant))
    }

    /// What was granted, with descriptors. The evictor is woken if that crossed the high watermark.
    fn copies_in(&self, grant: Grant<HostSpace>) -> Vec<OwnedCopy> {
        let used = self.host.space().arena.used_bytes();
        assert!(used <= self.host_capacity_bytes(), "{used} bytes of host memory");
        if used > self.limits.marks.high_bytes {
            self.wake.now();
        }
        grant.into_iter().map(|slot| OwnedCopy::new(&self.copies, slot)).collect()
    }

    fn only_copy_in(&self, grant: Grant<HostSpace>) -> OwnedCopy {
        assert!(grant.len() == 1, "space for {} objects was asked for as one's", grant.len());
        self.copies_in(grant).pop().expect("invariant: a grant has space for each object")
    }

    /// Wakes the waiters after space was freed.
    pub(crate) fn space_was_freed(&self) {
        self.wake.if_waiting();
        self.devices.iter().for_each(Device::ring);
    }

    // ---- Below host memory -------------------------------------------------------------------

    /// Space in the tier `level` or, where that is full, in a slower one; at once or not at all. If
    /// there is none, extents that callers do not claim are taken back first.
    pub(crate) fn reserve(&self, level: usize, lens: &[u32]) -> Result<Vec<Extent>, TierError> {
        let reserved = match self.try_reserve(level, lens) {
            Err(TierError::Full { .. }) => {
                self.recall_extents();
                self.try_reserve(level, lens)
            }
            outcome => outcome,
        };
        let is_whole = reserved.as_ref().map_or(true, |extents| extents.len() == lens.len());
        assert!(is_whole, "an extent is reserved for each length, or none");
        reserved
    }

    /// As `reserve`, but before it fails it waits for what may leave a tier, and for what may come
    /// back within the grace. The lengths are those of chunks of one object, in order.
    pub(crate) async fn reserve_soon(
        &self,
        level: usize,
        lens: &[u32],
        deadline: &Deadline,
    ) -> Result<Vec<Extent>, TierError> {
        let full = match self.reserve(level, lens) {
            Err(full @ TierError::Full { .. }) => full,
            outcome => return outcome,
        };
        if let Some(extents) = self.make_space_below(level, lens, deadline).await? {
            return Ok(extents);
        }
        match self.extents_come_back().await {
            true => self.reserve(level, lens),
            false => Err(full),
        }
    }

    /// Space that the tiers from `level` on make by letting go what slower ones, which are full,
    /// have already. None at once if there is nothing like that. For chunks of one object, in
    /// order.
    ///
    /// # Errors
    ///
    /// `Closed`.
    pub(crate) async fn make_space_below(
        &self,
        level: usize,
        lens: &[u32],
        deadline: &Deadline,
    ) -> Result<Option<Vec<Extent>>, TierError> {
        let len = lens.iter().map(|&len| len as usize).sum();
        let need = Need::one(len, NO_OBJECT, Class::Demand).or_spill();
        for Storage { state, .. } in self.evicting(level) {
            let reach = state.space().capacity_bytes().saturating_sub(state.unevictable_bytes());
            if state.queue.footprint(&need) > reach {
                continue;
            }
            match state.queue.take(&need, deadline).await {
                Ok(mut grant) => return Ok(grant.pop()),
                Err(Refused::Error(VirtualMemoryError::Closed)) => return Err(TierError::Closed),
                Err(_) => {}
            }
        }
        Ok(None)
    }

    /// The tiers below host memory from `level` on that objects leave for slower ones.
    fn evicting(&self, level: usize) -> &[Storage] {
        let last = self.storage().len() - 1;
        self.storage().get(level..last).unwrap_or_default()
    }

    fn try_reserve(&self, level: usize, lens: &[u32]) -> Result<Vec<Extent>, TierError> {
        let mut is_waited_for = SmallVec::<[&Storage; 1]>::new();
        for storage in self.evicting(level) {
            // Requests that wait for space here come first: the next tier is left to this one.
            if !storage.state.lets_pass(lens) {
                is_waited_for.push(storage);
                continue;
            }
            match self.reserve_in(storage, lens) {
                Err(TierError::Full { .. }) => {}
                outcome => return outcome,
            }
        }
        let last = self.storage().last().expect("invariant: there is a disk");
        let mut outcome = last.state.space().reserve(lens);
        for storage in is_waited_for {
            if !matches!(outcome, Err(TierError::Full { .. })) {
                break;
            }
            // There is no other.
            outcome = self.reserve_in(storage, lens);
        }
        outcome
    }

    fn reserve_in(&self, storage: &Storage, lens: &[u32]) -> Result<Vec<Extent>, TierError> {
        let state = &storage.state;
        let extents = state.space().reserve(lens)?;
        state.queue.count_pass();
        if state.space().used_bytes() > state.marks.high_bytes {
            self.wake.now();
        }
        Ok(extents)
    }

    /// Takes back what has lain for the grace with extents on disk, or with versions that keep
    /// some. Returns whether something lies there for less.
    fn recall_extents(&self) -> bool {
        self.unclaimed.recall().is_some() | self.unfinished.recall().is_some()
    }

    /// Waits until what lies aside now has lain there for the grace, and takes it back. False at
    /// once if nothing does.
    async fn extents_come_back(&self) -> bool {
        if !self.recall_extents() {
            return false;
        }
        let grace = self.deadline_in(GRACE);
        let Err(Late) = grace.bound(std::future::pending::<std::convert::Infallible>()).await;
        self.recall_extents();
        true
    }
}
