//! Device memory apart from its addresses: reservations, memory by handle, and mappings.
//!
//! Invariant: mappings are disjoint, each lies in one reservation, and its handle is known; memory
//! goes once its handle was released and no mapping is left. Called by the symbols, under the
//! world's lock.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::memory::GARBAGE;
use super::segments::Bytes;
use super::{Device, World};
use crate::codes::{Code, INVALID_VALUE, OUT_OF_MEMORY};
use crate::stream::Stream;

/// What addresses and lengths are multiples of, in bytes.
pub(crate) const GRANULARITY: u64 = 2 << 20;

/// Device memory that has a handle, and no address of its own.
#[derive(Debug)]
struct Created {
    device: Device,
    len: u64,
    bytes: Bytes,
    /// How many mappings it has.
    mapped: u64,
    released: bool,
}

/// The memory of a handle at an address.
#[derive(Debug)]
pub(crate) struct Mapping {
    handle: u64,
    pub(crate) len: u64,
    pub(crate) bytes: Bytes,
    /// The access flags of each device, as the driver's; none at first.
    pub(crate) access: HashMap<Device, u32>,
}

/// What is reserved, created and mapped.
#[derive(Debug, Default)]
pub(crate) struct Mapped {
    /// The length of each reservation.
    reserved: BTreeMap<u64, u64>,
    created: HashMap<u64, Created>,
    mappings: BTreeMap<u64, Mapping>,
}

impl Mapped {
    /// The bytes of memory with a handle, of all devices or of one.
    pub(crate) fn created_bytes(&self, device: Option<Device>) -> u64 {
        let of = self.created.values();
        let of = of.filter(|one| device.is_none_or(|device| one.device == device));
        of.map(|one| one.len).sum()
    }

    /// The handles whose memory is not gone.
    pub(crate) fn created(&self) -> u64 {
        self.created.len() as u64
    }

    pub(crate) fn mapped_bytes(&self) -> u64 {
        self.mappings.values().map(|mapping| mapping.len).sum()
    }

    pub(crate) fn reserved_bytes(&self) -> u64 {
        self.reserved.values().sum()
    }

    /// The mapping that holds this address, and where it begins.
    pub(crate) fn mapping_at(&self, address: u64) -> Option<(u64, &Mapping)> {
        let (&start, mapping) = self.mappings.range(..=address).next_back()?;
        (address - start < mapping.len).then_some((start, mapping))
    }

    /// Where the mappings begin of which this range consists; an error if it cuts one, or is not
    /// mapped throughout.
    fn whole(&self, range: &Range<u64>) -> Result<Vec<u64>, Code> {
        let mut starts = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let mapping = self.mappings.get(&at).ok_or(INVALID_VALUE)?;
            starts.push(at);
            at += mapping.len;
        }
        if at == range.end { Ok(starts) } else { Err(INVALID_VALUE) }
    }

    /// Removes a mapping, and its memory if nothing else holds that.
    fn remove(&mut self, start: u64) {
        let Some(mapping) = self.mappings.remove(&start) else { return };
        if let Some(created) = self.created.get_mut(&mapping.handle) {
            created.mapped -= 1;
            self.collect(mapping.handle);
        }
    }

    /// Ends the memory of a handle that was released and is mapped nowhere.
    fn collect(&mut self, handle: u64) {
        if self.created.get(&handle).is_some_and(|one| one.released && one.mapped == 0) {
            self.created.remove(&handle);
        }
    }

    /// The memory of a device goes, with the mappings of it.
    pub(crate) fn forget(&mut self, device: Device) {
        self.created.retain(|_, one| one.device != device);
        let created = &self.created;
        self.mappings.retain(|_, mapping| created.contains_key(&mapping.handle));
    }
}

/// A range whose ends are multiples of the granularity.
fn range_of(address: u64, len: u64) -> Result<Range<u64>, Code> {
    let end = address.checked_add(len).ok_or(INVALID_VALUE)?;
    let is_aligned = address.is_multiple_of(GRANULARITY) && len.is_multiple_of(GRANULARITY);
    if len > 0 && is_aligned { Ok(address..end) } else { Err(INVALID_VALUE) }
}

impl World {
    /// Reserves addresses, without memory behind them. An `alignment` of 0 is the granularity.
    pub(crate) fn reserve(&mut self, len: u64, alignment: u64) -> Result<u64, Code> {
        let alignment = alignment.max(GRANULARITY);
        if len == 0 || !len.is_multiple_of(GRANULARITY) || !alignment.is_power_of_two() {
            return Err(INVALID_VALUE);
        }
        let address = self.addresses(len, alignment)?;
        self.mapped.reserved.insert(address, len);
        Ok(address)
    }

    /// Gives back a whole reservation in which nothing is mapped.
    pub(crate) fn free_addresses(&mut self, address: u64, len: u64) -> Result<(), Code> {
        let range = range_of(address, len)?;
        let is_mapped = self.mapped.mappings.range(range).next().is_some();
        if is_mapped || self.mapped.reserved.get(&address) != Some(&len) {
            return Err(INVALID_VALUE);
        }
        self.mapped.reserved.remove(&address);
        Ok(())
    }

    /// Takes memory of a device; returns its handle.
    pub(crate) fn create_memory(&mut self, device: Device, len: u64) -> Result<u64, Code> {
        if len == 0 || !len.is_multiple_of(GRANULARITY) {
            return Err(INVALID_VALUE);
        }
        if let Some(code) = self.sticky(device) {
            return Err(code);
        }
        if len > self.free_bytes(device) {
            return Err(OUT_OF_MEMORY);
        }
        let bytes = Arc::new(Mutex::new(vec![GARBAGE; len as usize]));
        let handle = self.handle();
        let created = Created { device, len, bytes, mapped: 0, released: false };
        self.mapped.created.insert(handle, created);
        Ok(handle)
    }

    /// Ends a handle; its memory stays as long as it is mapped.
    pub(crate) fn release_memory(&mut self, handle: u64) -> Result<(), Code> {
        match self.mapped.created.get_mut(&handle) {
            Some(created) if !created.released => {
                created.released = true;
                self.mapped.collect(handle);
                Ok(())
            }
            _ => {
                self.violation(format!("the memory of handle {handle:x} was released twice"));
                Err(INVALID_VALUE)
            }
        }
    }

    /// Maps all memory of a handle at reserved addresses.
    pub(crate) fn map(&mut self, address: u64, len: u64, handle: u64) -> Result<(), Code> {
        let range = range_of(address, len)?;
        let mapped = &mut self.mapped;
        let reservation = mapped.reserved.range(..=address).next_back();
        if reservation.is_none_or(|(start, len)| start + len < range.end) {
            return Err(INVALID_VALUE);
        }
        if mapped.mapping_at(address).is_some() || mapped.mappings.range(range).next().is_some() {
            return Err(INVALID_VALUE);
        }
        match mapped.created.get_mut(&handle) {
            Some(created) if !created.released && created.len == len => {
                created.mapped += 1;
                let bytes = created.bytes.clone();
                let mapping = Mapping { handle, len, bytes, access: HashMap::new() };
                mapped.mappings.insert(address, mapping);
                Ok(())
            }
            _ => Err(INVALID_VALUE),
        }
    }

    /// Unmaps whole mappings. Unlike a free of memory it waits for nothing.
    pub(crate) fn unmap(&mut self, address: u64, len: u64) -> Result<(), Code> {
        let range = range_of(address, len)?;
        let starts = self.mapped.whole(&range)?;
        if self.is_accessed(&range) {
            self.violation("device memory was unmapped under an operation in flight".into());
        }
        starts.into_iter().for_each(|start| self.mapped.remove(start));
        Ok(())
    }

    /// Sets the access flags of devices to whole mappings.
    pub(crate) fn set_access(
        &mut self,
        address: u64,
        len: u64,
        flags: &[(Device, u32)],
    ) -> Result<(), Code> {
        for start in self.mapped.whole(&range_of(address, len)?)? {
            if let Some(mapping) = self.mapped.mappings.get_mut(&start) {
                mapping.access.extend(flags.iter().copied());
            }
        }
        Ok(())
    }

    /// Whether an operation in flight reads or writes this range of addresses.
    fn is_accessed(&self, range: &Range<u64>) -> bool {
        let works = |stream: &&Stream| self.sticky(stream.device).is_none();
        let streams = self.streams.values().filter(works);
        streams
            .flat_map(Stream::device_memory)
            .any(|access| access.range.start < range.end && range.start < access.range.end)
    }
}
