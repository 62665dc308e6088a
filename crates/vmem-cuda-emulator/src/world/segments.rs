//! The memory behind a range of addresses, for an operation.
//!
//! Invariant: the segments of a range are in the order of its addresses and cover all of it: one
//! allocation, or mappings that are adjacent. Found by the streams under the world's lock, and read
//! and written without it.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Device, World};
use crate::codes::{Code, ILLEGAL_ADDRESS};

/// The bytes of an allocation, or of a handle.
pub(crate) type Bytes = Arc<Mutex<Vec<u8>>>;

/// The flags of an access, as the driver's.
const READ: u32 = 1;
const READ_WRITE: u32 = 3;

#[derive(Debug)]
struct Segment {
    bytes: Bytes,
    range: Range<usize>,
}

/// The memory behind a range of addresses.
#[derive(Debug)]
pub(crate) struct Segments(Vec<Segment>);

impl Segments {
    pub(crate) fn read(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.0.iter().map(|one| one.range.len()).sum());
        for Segment { bytes, range } in &self.0 {
            let bytes = bytes.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend_from_slice(&bytes[range.clone()]);
        }
        all
    }

    /// Writes all of the range: `from` is as long.
    pub(crate) fn write(&self, mut from: &[u8]) {
        for Segment { bytes, range } in &self.0 {
            let (part, rest) = from.split_at(range.len());
            let mut bytes = bytes.lock().unwrap_or_else(PoisonError::into_inner);
            bytes[range.clone()].copy_from_slice(part);
            from = rest;
        }
    }
}

impl World {
    /// The memory that an operation reads: `kernel` is the device on which it runs, if it is a
    /// kernel. A copy finds the memory of any device; a kernel has no access to a peer's, unless
    /// that was granted.
    pub(crate) fn readable(
        &self,
        kernel: Option<Device>,
        address: u64,
        len: u64,
    ) -> Result<Segments, Code> {
        self.segments(kernel, address, len, READ)
    }

    /// The memory that an operation writes; otherwise as above.
    pub(crate) fn writable(
        &self,
        kernel: Option<Device>,
        address: u64,
        len: u64,
    ) -> Result<Segments, Code> {
        self.segments(kernel, address, len, READ_WRITE)
    }

    fn segments(
        &self,
        kernel: Option<Device>,
        address: u64,
        len: u64,
        needed: u32,
    ) -> Result<Segments, Code> {
        let plain = || Some(Segments(vec![self.plain(kernel, address, len)?]));
        let mapped = || self.mapped_segments(kernel, address, len, needed);
        plain().or_else(mapped).ok_or(ILLEGAL_ADDRESS)
    }

    /// The range, if one allocation holds all of it.
    fn plain(&self, kernel: Option<Device>, address: u64, len: u64) -> Option<Segment> {
        let (&start, allocation) = self.allocations.range(..=address).next_back()?;
        let offset = address - start;
        let end = offset.checked_add(len)?;
        let is_own = kernel.is_none_or(|device| allocation.device == device);
        let bytes = allocation.bytes.clone();
        (is_own && end <= allocation.len)
            .then_some(Segment { bytes, range: offset as usize..end as usize })
    }

    /// The range, if all of it is mapped and access was granted: to the device of a kernel, or to
    /// any for a copy.
    fn mapped_segments(
        &self,
        kernel: Option<Device>,
        address: u64,
        len: u64,
        needed: u32,
    ) -> Option<Segments> {
        let end = address.checked_add(len)?;
        let mut at = address;
        let mut segments = Vec::new();
        loop {
            let (start, mapping) = self.mapped.mapping_at(at)?;
            let mut granted = mapping.access.iter().filter(|&(_, flags)| flags & needed == needed);
            if !granted.any(|(&device, _)| kernel.is_none_or(|kernel| kernel == device)) {
                return None;
            }
            let until = end.min(start + mapping.len);
            let range = (at - start) as usize..(until - start) as usize;
            segments.push(Segment { bytes: mapping.bytes.clone(), range });
            at = until;
            if at == end {
                return Some(Segments(segments));
            }
        }
    }
}
