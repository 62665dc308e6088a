//! Memory of the devices, and of the host as far as devices reach it.
//!
//! Invariant: allocations and reservations are disjoint, with a gap behind each; so are ranges of
//! pinned memory. Called by the symbols and the streams, under the world's lock.

use std::sync::{Arc, Mutex};

use super::segments::Bytes;
use super::{DEVICE_BASE, DEVICE_END, Device, World};
use crate::codes::{ALREADY_REGISTERED, Code, INVALID_VALUE, OK, OUT_OF_MEMORY};
use crate::pages::Pages;
use crate::raw::HostMemory;
use crate::stream::Stream;

/// The gap behind an allocation or a reservation, so that an access past its end hits no other.
const GUARD: u64 = 4096;
/// What fresh memory holds.
pub(super) const GARBAGE: u8 = 0xC7;

/// Device memory.
#[derive(Clone, Debug)]
pub(crate) struct Allocation {
    pub(crate) device: Device,
    pub(crate) len: u64,
    pub(crate) bytes: Bytes,
}

/// Host memory that all devices reach directly.
#[derive(Clone, Debug)]
pub(crate) struct Pinned {
    /// In whose context that was asked for.
    device: Device,
    pub(crate) memory: HostMemory,
    /// None where the system pins nothing.
    pub(crate) pages: Option<Arc<Pages>>,
    /// Allocated by the driver, not registered.
    pub(crate) allocated: bool,
}

/// How some host memory lies to what is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    Pinned,
    Pageable,
    /// Across a border.
    Broken,
}

impl World {
    /// The bytes that are allocated or created on all devices, or on one.
    pub(crate) fn used(&self, device: Option<Device>) -> u64 {
        let all = self.allocations.values();
        let of = all.filter(|one| device.is_none_or(|device| one.device == device));
        of.map(|one| one.len).sum::<u64>() + self.mapped.created_bytes(device)
    }

    pub(crate) fn free_bytes(&self, device: Device) -> u64 {
        self.total.saturating_sub(self.used(Some(device))).saturating_sub(self.others)
    }

    pub(crate) fn allocate(&mut self, device: Device, len: u64) -> Result<u64, Code> {
        if len == 0 {
            return Err(INVALID_VALUE);
        }
        if len > self.free_bytes(device) {
            return Err(OUT_OF_MEMORY);
        }
        let address = self.addresses(len, 512)?;
        let bytes = Arc::new(Mutex::new(vec![GARBAGE; len as usize]));
        self.allocations.insert(address, Allocation { device, len, bytes });
        Ok(address)
    }

    /// Addresses that were never used: a multiple of `alignment`, which is a power of two.
    pub(super) fn addresses(&mut self, len: u64, alignment: u64) -> Result<u64, Code> {
        let address = self.next_address.checked_next_multiple_of(alignment);
        let end = address.and_then(|address| address.checked_add(len)?.checked_add(GUARD));
        match (address, end) {
            (Some(address), Some(end)) if end <= DEVICE_END => {
                self.next_address = end;
                Ok(address)
            }
            _ => Err(OUT_OF_MEMORY),
        }
    }

    /// Frees an allocation. One of before a reset is gone already, and its owner late.
    pub(crate) fn free(&mut self, address: u64) -> Result<(), Code> {
        if self.allocations.remove(&address).is_none() && address >= self.begins_at {
            self.violation(format!("device memory {address:x} was freed twice"));
            return Err(INVALID_VALUE);
        }
        Ok(())
    }

    /// Whether an address is one of device memory, live or not.
    pub(crate) fn is_of_device(&self, address: u64) -> bool {
        (DEVICE_BASE..DEVICE_END).contains(&address)
    }

    pub(crate) fn reach(&self, memory: HostMemory) -> Reach {
        let end = memory.address + memory.len;
        let mut touched = self.pinned.values().filter(|pinned| {
            let other = pinned.memory;
            other.address < end && memory.address < other.address + other.len
        });
        match (touched.next(), touched.next()) {
            (None, _) => Reach::Pageable,
            (Some(one), None)
                if one.memory.address <= memory.address
                    && end <= one.memory.address + one.memory.len =>
            {
                Reach::Pinned
            }
            _ => Reach::Broken,
        }
    }

    /// The pages behind host memory, if it is pinned.
    pub(crate) fn pages(&self, memory: HostMemory) -> Option<Arc<Pages>> {
        let (_, pinned) = self.pinned.range(..=memory.address).next_back()?;
        let end = pinned.memory.address + pinned.memory.len;
        if memory.address + memory.len <= end { pinned.pages.clone() } else { None }
    }

    /// Makes host memory pinned.
    pub(crate) fn pin(&mut self, device: Device, memory: HostMemory, allocated: bool) -> Code {
        if memory.len == 0 || memory.address == 0 {
            return INVALID_VALUE;
        }
        if self.reach(memory) != Reach::Pageable {
            return ALREADY_REGISTERED;
        }
        let registered: u64 = self.pinned.values().map(|pinned| pinned.memory.len as u64).sum();
        if registered + memory.len as u64 > self.registered_max {
            return OUT_OF_MEMORY;
        }
        let pages = Pages::pin(memory).map(Arc::new);
        self.pinned.insert(memory.address, Pinned { device, memory, pages, allocated });
        OK
    }

    /// The context of a device that has failed goes, and with it what belongs to it. That of a
    /// device that works is to be empty by then, but for host memory that no copy uses.
    pub(crate) fn end_context(&mut self, device: Device) {
        if self.sticky(device).is_some() {
            self.allocations.retain(|_, allocation| allocation.device != device);
            self.mapped.forget(device);
            self.pinned.retain(|_, pinned| pinned.allocated || pinned.device != device);
        }
        let mut of_it = self.pinned.values().filter(|pinned| pinned.device == device);
        if of_it.any(|pinned| self.is_in_flight(pinned.memory)) {
            self.violation("host memory went with its context under a copy in flight".into());
        }
    }

    /// Whether an operation that has not ended uses this host memory.
    pub(crate) fn is_in_flight(&self, memory: HostMemory) -> bool {
        let end = memory.address + memory.len;
        self.streams
            .values()
            .flat_map(Stream::host_memory)
            .any(|used| used.address < end && memory.address < used.address + used.len)
    }
}
