//! Virtual memory management: addresses, memory by handle, mappings, and access to these.
//!
//! Invariant: a call that is refused changes nothing. Called in place of the driver's functions.

#![allow(unsafe_code)]

use super::{DevicePointer, Guard, Needs, current_device, enter, is_device};
use crate::codes::{Code, INVALID_DEVICE, INVALID_VALUE, NOT_SUPPORTED, OK};
use crate::raw;
use crate::world::{Device, GRANULARITY, drain, world};

/// Where memory is, or what accesses it: the driver's `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Location {
    /// 1 is a device.
    kind: i32,
    id: Device,
}

/// What memory is created: the driver's `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Properties {
    /// 1 is memory that stays where it is.
    kind: i32,
    _handle_types: i32,
    location: Location,
    _metadata: usize,
    _flags: [u8; 8],
}

/// The access of a device: the driver's `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Grant {
    location: Location,
    /// 0 none, 1 read, 3 read and write.
    flags: u32,
}

const DEVICE: i32 = 1;
const PINNED: i32 = 1;

/// What these functions have in common: a device that supports them.
fn manage(mut guard: Guard, work: impl FnOnce(&mut Guard) -> Result<(), Code>) -> Code {
    if !guard.paged {
        return NOT_SUPPORTED;
    }
    work(&mut guard).map_or_else(|code| code, |()| OK)
}

fn device_of(guard: &Guard, location: Location) -> Result<Device, Code> {
    match location.kind {
        DEVICE if is_device(guard, location.id) => Ok(location.id),
        DEVICE => Err(INVALID_DEVICE),
        _ => Err(INVALID_VALUE),
    }
}

/// The device whose memory these properties mean.
fn device_with(guard: &Guard, properties: *const Properties) -> Result<Device, Code> {
    let properties = raw::get(properties).filter(|properties| properties.kind == PINNED);
    device_of(guard, properties.ok_or(INVALID_VALUE)?.location)
}

/// Flags that a function takes and none of which is defined.
fn no_flags(flags: u64) -> Result<(), Code> {
    if flags == 0 { Ok(()) } else { Err(INVALID_VALUE) }
}

driver! {
    Init fn cuMemGetAllocationGranularity(
        granularity: *mut usize, properties: *const Properties, option: i32,
    ) |guard| {
        manage(guard, |world| {
            device_with(world, properties)?;
            // The least, and the recommended one.
            if granularity.is_null() || !matches!(option, 0 | 1) {
                return Err(INVALID_VALUE);
            }
            raw::put(granularity, GRANULARITY as usize);
            Ok(())
        })
    }
    Quiet fn cuMemAddressReserve(
        pointer: *mut DevicePointer, bytes: usize, alignment: usize, _hint: DevicePointer,
        flags: u64,
    ) |guard| {
        manage(guard, |world| {
            no_flags(flags)?;
            if pointer.is_null() {
                return Err(INVALID_VALUE);
            }
            raw::put(pointer, world.reserve(bytes as u64, alignment as u64)?);
            Ok(())
        })
    }
    Quiet fn cuMemAddressFree(pointer: DevicePointer, bytes: usize) |guard| {
        manage(guard, |world| world.free_addresses(pointer, bytes as u64))
    }
    Quiet fn cuMemCreate(
        created: *mut u64, bytes: usize, properties: *const Properties, flags: u64,
    ) |guard| {
        manage(guard, |world| {
            no_flags(flags)?;
            let device = device_with(world, properties)?;
            if created.is_null() {
                return Err(INVALID_VALUE);
            }
            raw::put(created, world.create_memory(device, bytes as u64)?);
            Ok(())
        })
    }
    Quiet fn cuMemRelease(created: u64) |guard| {
        manage(guard, |world| world.release_memory(created))
    }
    Quiet fn cuMemMap(
        pointer: DevicePointer, bytes: usize, offset: usize, created: u64, flags: u64,
    ) |guard| {
        manage(guard, |world| {
            no_flags(flags)?;
            // The driver supports no other.
            if offset != 0 {
                return Err(INVALID_VALUE);
            }
            world.map(pointer, bytes as u64, created)
        })
    }
    Quiet fn cuMemUnmap(pointer: DevicePointer, bytes: usize) |guard| {
        let waits = guard.unmap_waits;
        let code = manage(guard, |world| world.unmap(pointer, bytes as u64));
        if waits && code == OK {
            drop(drain(world(), Some(current_device())));
        }
        code
    }
    Quiet fn cuMemSetAccess(
        pointer: DevicePointer, bytes: usize, grants: *const Grant, count: usize,
    ) |guard| {
        manage(guard, |world| {
            let grant = |nth| {
                let grant = raw::element(grants, nth).ok_or(INVALID_VALUE)?;
                let device = device_of(world, grant.location)?;
                let flags = matches!(grant.flags, 0 | 1 | 3).then_some(grant.flags);
                Ok((device, flags.ok_or(INVALID_VALUE)?))
            };
            let flags = (0..count).map(grant).collect::<Result<Vec<_>, Code>>()?;
            if flags.is_empty() {
                return Err(INVALID_VALUE);
            }
            world.set_access(pointer, bytes as u64, &flags)
        })
    }
}
