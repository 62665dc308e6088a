//! Errors and figures as users see them.
//!
//! Invariant: the bytes of a tier come from its ledger; counters may lag. Called by the public
//! methods.

use super::Shared;
use crate::console::{Now, TierNow};
use crate::error::VirtualMemoryError;
use crate::latency::ReadStage;
use crate::memory_tier::MemoryTier;
use crate::notice::{Incident, Notices};
use crate::object::{OBJECT_BYTES, RARE_BYTES};
use crate::stats::{TierStats, VirtualMemoryStats, get};
use crate::storage::TierError;
use crate::tier::{Device, HeldObject, Space, Storage, TierState};

impl Shared {
    /// The public form of what the disk said of this object, for a request that ends with it: a
    /// refusal is counted.
    pub(crate) fn tier_error(&self, handle: u64, error: TierError) -> VirtualMemoryError {
        self.refused(self.attempt_error(handle, error))
    }

    /// The error of a request that ends with it: a refusal of a tier below host memory is counted.
    pub(crate) fn refused(&self, error: VirtualMemoryError) -> VirtualMemoryError {
        if let VirtualMemoryError::TierFull { tier, .. } = error {
            self.notices(tier).refusal(&error);
        }
        error
    }

    /// The public form of what the disk said of this object, for an attempt that others may follow,
    /// or that is one of several with the same cause.
    pub(crate) fn attempt_error(&self, handle: u64, error: TierError) -> VirtualMemoryError {
        match error {
            // It is the last tier that is full: what the others lack space for goes there.
            TierError::Full { requested_bytes, free_bytes, .. } => {
                let last = self.storage().last().expect("invariant: there is a disk");
                let capacity_bytes = last.state.space().capacity_bytes();
                let tier = last.tier();
                VirtualMemoryError::TierFull { tier, requested_bytes, free_bytes, capacity_bytes }
            }
            TierError::Corrupt { chunk, expected, actual } => {
                VirtualMemoryError::Corrupt { handle, chunk: chunk as u64, expected, actual }
            }
            TierError::Io { operation, source } => VirtualMemoryError::Io { operation, source },
            TierError::Closed => VirtualMemoryError::Closed,
        }
    }

    /// What operators learn of this tier; of host memory, for one that the store does not have.
    pub(crate) fn notices(&self, tier: MemoryTier) -> &Notices {
        if let Some(Storage { state, .. }) = self.storage_of(tier) {
            state.notices()
        } else if let Some(Device { state, .. }) = self.device_of(tier) {
            state.notices()
        } else {
            self.host.notices()
        }
    }

    /// What went wrong lately, the newest first.
    pub(crate) fn incidents(&self) -> Vec<Incident> {
        let devices = self.devices.iter().map(|device| device.state.notices());
        let storage = self.storage().iter().map(|storage| storage.state.notices());
        let all = devices.chain([self.host.notices()]).chain(storage);
        let mut incidents: Vec<_> = all.flat_map(Notices::incidents).collect();
        incidents.sort_by_key(|incident| std::cmp::Reverse(incident.at));
        incidents
    }

    /// The objects that pins and leases hold, the largest first; at most this many.
    pub(crate) fn held_objects(&self, most: usize) -> Vec<HeldObject> {
        let devices = self.devices.iter().map(|device| (device.tier(), &device.state.holds));
        let storage = self.storage().iter().map(|storage| (storage.tier(), &storage.state.holds));
        let all = devices.chain([(MemoryTier::Host, &self.host.holds)]).chain(storage);
        let mut held: Vec<_> = all.flat_map(|(tier, holds)| holds.largest(tier, most)).collect();
        held.sort_by_key(|one| (std::cmp::Reverse(one.bytes), one.handle));
        held.truncate(most);
        for one in &mut held {
            one.name = self.table.get(one.handle).and_then(|object| object.named.get()?.current());
        }
        held
    }

    /// One tier, now.
    pub(crate) fn tier_stats(&self, tier: MemoryTier) -> TierStats {
        let arena = &self.host.space().arena;
        match tier {
            MemoryTier::Host => self.host.notices().counted(TierStats {
                used_bytes: arena.used_bytes(),
                capacity_bytes: arena.capacity_bytes(),
                peak_bytes: arena.peak_bytes(),
                objects: get(&self.host.objects),
                hits: self.copies.hits(),
                largest_free_bytes: arena.largest_free_bytes(),
                ..TierStats::default()
            }),
            MemoryTier::Disk | MemoryTier::Remote => {
                self.storage_of(tier).map_or_else(TierStats::default, Storage::stats)
            }
            MemoryTier::Vram | MemoryTier::OtherVram(_) => {
                self.device_of(tier).map_or_else(TierStats::default, Device::stats)
            }
        }
    }

    /// What tokio-console shows.
    pub(crate) fn now(&self) -> Now {
        let devices = self.devices.iter().map(|device| self.tier_now(&device.state));
        let storage = self.storage().iter().map(|storage| self.tier_now(&storage.state));
        Now {
            tiers: devices.chain([self.tier_now(&self.host)]).chain(storage).collect(),
            reads: ReadStage::ALL
                .map(|stage| (stage.as_str(), self.latencies.in_stage(stage)))
                .to_vec(),
            held_bytes: self.copies.held_bytes(),
            migrations: get(&self.counters.in_flight),
        }
    }

    fn tier_now<S: Space>(&self, state: &TierState<S>) -> TierNow {
        let TierStats { used_bytes, capacity_bytes, .. } = self.tier_stats(state.tier);
        TierNow {
            tier: state.tier,
            used_bytes,
            capacity_bytes,
            pinned_bytes: state.holds.bytes().total(),
            waiters: state.queue.len(),
        }
    }

    /// Objects on devices, and in tiers below host memory that others lie below.
    fn objects_with_rare_fields(&self) -> u64 {
        let on_devices = self.devices.iter().map(|device| get(&device.state.objects));
        let evicting = self.storage().split_last().map_or(&[][..], |(_, evicting)| evicting);
        on_devices.chain(evicting.iter().map(|storage| get(&storage.state.objects))).sum()
    }

    pub(crate) fn stats(&self) -> VirtualMemoryStats {
        let counters = &self.counters;
        let waiting = |device: &Device| device.state.queue.len() as u64;
        let objects = self.table.len() as u64;
        let read = |tier| self.storage_of(tier).map_or(0, |storage| get(&storage.read_bytes));
        let written = |tier| self.storage_of(tier).map_or(0, |storage| get(&storage.written_bytes));
        VirtualMemoryStats {
            vram: self.tier_stats(MemoryTier::Vram),
            host: self.tier_stats(MemoryTier::Host),
            disk: self.tier_stats(MemoryTier::Disk),
            remote: self.tier_stats(MemoryTier::Remote),
            objects,
            metadata_bytes: objects * OBJECT_BYTES
                + self.objects_with_rare_fields() * RARE_BYTES
                + self.devices.iter().map(|device| device.gathers.memory_bytes()).sum::<u64>()
                + get(&counters.map_bytes),
            staging_bytes: self.limits.staging_capacity,
            stream_bytes: self.windows.used_bytes(),
            registered_bytes: self.host.space().arena.registered_bytes(),
            held_bytes: self.copies.held_bytes(),
            pinned_bytes: self.host.holds.bytes().total(),
            dirty_bytes: get(&counters.dirty_bytes),
            vram_dirty_bytes: get(&counters.vram_dirty_bytes),
            waiters: self.host.queue.len() as u64
                + self.devices.iter().map(waiting).sum::<u64>()
                + self.storage().iter().map(|one| one.state.queue.len() as u64).sum::<u64>(),
            migrations_in_flight: get(&counters.in_flight),
            misses: get(&counters.misses),
            reads_failed: self.latencies.failed(),
            reads_cancelled: self.latencies.cancelled(),
            evictions: get(&counters.evictions),
            promotions: get(&counters.promotions),
            clean_drops: get(&counters.clean_drops),
            relocated_bytes: get(&counters.relocated_bytes),
            host_to_vram_bytes: get(&counters.host_to_vram_bytes),
            vram_to_host_bytes: get(&counters.vram_to_host_bytes),
            disk_to_host_bytes: read(MemoryTier::Disk),
            host_to_disk_bytes: written(MemoryTier::Disk),
            remote_to_host_bytes: read(MemoryTier::Remote),
            host_to_remote_bytes: written(MemoryTier::Remote),
            errors: get(&counters.errors),
            spans_left_out: self.read_spans.left_out_total()
                + self.migration_spans.left_out_total(),
            latencies: Some(self.latencies.clone()),
            totals: Some(self.totals.clone()),
            // The figures of the names are added by the owner of the names.
            ..VirtualMemoryStats::default()
        }
    }
}
