//! Errors and figures as users see them.
//!
//! Invariant: the bytes of a tier come from its ledger; counters may lag. Called by the public
//! methods.

use super::Shared;
use crate::disk::DiskError;
use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;
use crate::object::{OBJECT_BYTES, RARE_BYTES};
use crate::stats::{TierStats, VirtualMemoryStats, get};
use crate::tier::Device;

impl Shared {
    /// The public form of what the disk said of this object.
    pub(crate) fn disk_error(&self, handle: u64, error: DiskError) -> VirtualMemoryError {
        match error {
            DiskError::Full { requested_bytes, free_bytes, .. } => VirtualMemoryError::TierFull {
                tier: MemoryTier::Disk,
                requested_bytes,
                free_bytes,
                capacity_bytes: self.disk.usage().capacity_bytes,
            },
            DiskError::Corrupt { chunk, expected, actual } => {
                VirtualMemoryError::Corrupt { handle, chunk: chunk as u64, expected, actual }
            }
            DiskError::Io { operation, source } => VirtualMemoryError::Io { operation, source },
            DiskError::Closed => VirtualMemoryError::Closed,
        }
    }

    /// One tier, now.
    pub(crate) fn tier_stats(&self, tier: MemoryTier) -> TierStats {
        let arena = &self.host.space().arena;
        let disk = self.disk.usage();
        match tier {
            MemoryTier::Host => TierStats {
                used_bytes: arena.used_bytes(),
                capacity_bytes: arena.capacity_bytes(),
                peak_bytes: arena.peak_bytes(),
                objects: get(&self.host.objects),
                hits: self.copies.hits(),
                largest_free_bytes: arena.largest_free_bytes(),
            },
            MemoryTier::Disk => TierStats {
                used_bytes: disk.used_bytes,
                capacity_bytes: disk.capacity_bytes,
                peak_bytes: disk.peak_bytes,
                objects: get(&self.counters.disk_objects),
                hits: get(&self.counters.disk_hits),
                largest_free_bytes: disk.largest_free_bytes,
            },
            MemoryTier::Vram | MemoryTier::OtherVram(_) => {
                self.device_of(tier).map_or_else(TierStats::default, Device::stats)
            }
        }
    }

    pub(crate) fn stats(&self) -> VirtualMemoryStats {
        let counters = &self.counters;
        let waiting = |device: &Device| device.state.queue.len() as u64;
        let objects = self.table.len() as u64;
        VirtualMemoryStats {
            vram: self.tier_stats(MemoryTier::Vram),
            host: self.tier_stats(MemoryTier::Host),
            disk: self.tier_stats(MemoryTier::Disk),
            objects,
            metadata_bytes: objects * OBJECT_BYTES
                + self.devices.iter().map(|device| get(&device.state.objects)).sum::<u64>()
                    * RARE_BYTES
                + get(&counters.map_bytes),
            staging_bytes: self.limits.staging_capacity,
            stream_bytes: self.windows.used_bytes(),
            registered_bytes: self.host.space().arena.registered_bytes(),
            held_bytes: self.copies.held_bytes(),
            pinned_bytes: self.host.holds.bytes().total(),
            dirty_bytes: get(&counters.dirty_bytes),
            waiters: self.host.queue.len() as u64 + self.devices.iter().map(waiting).sum::<u64>(),
            migrations_in_flight: get(&counters.in_flight),
            misses: get(&counters.misses),
            evictions: get(&counters.evictions),
            promotions: get(&counters.promotions),
            clean_drops: get(&counters.clean_drops),
            relocated_bytes: get(&counters.relocated_bytes),
            host_to_vram_bytes: get(&counters.host_to_vram_bytes),
            vram_to_host_bytes: get(&counters.vram_to_host_bytes),
            disk_to_host_bytes: get(&counters.disk_to_host_bytes),
            host_to_disk_bytes: get(&counters.host_to_disk_bytes),
            errors: get(&counters.errors),
            // The figures of the names are added by the owner of the names.
            ..VirtualMemoryStats::default()
        }
    }
}
