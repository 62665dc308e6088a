//! Memory of the device and of the host, and copies between them.
//!
//! Invariant: memory is freed only once no operation in flight uses it. Called in place of the
//! driver's functions.

#![allow(unsafe_code)]

use std::ffi::c_void;

use super::{
    DevicePointer, Guard, Handle, Needs, copy_between, current_device, enter, host, issue,
    issue_and_wait, stream_of,
};
use crate::codes::{Code, INVALID_HANDLE, INVALID_VALUE, NOT_REGISTERED, OK};
use crate::raw::{self};
use crate::stream::Work;
use crate::world::{Device, drain, world};

fn allocate(mut guard: Guard, place: *mut DevicePointer, device: Device, bytes: usize) -> Code {
    match guard.allocate(device, bytes as u64) {
        Ok(address) => {
            raw::put(place, address);
            OK
        }
        Err(code) => code,
    }
}

driver! {
    Context fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |guard| {
        raw::put(free, guard.free_bytes(current_device()) as usize);
        raw::put(total, guard.total as usize);
        OK
    }
    Quiet fn cuMemAlloc_v2(pointer: *mut DevicePointer, bytes: usize) |guard| {
        allocate(guard, pointer, current_device(), bytes)
    }
    Quiet fn cuMemFree_v2(pointer: DevicePointer) |guard| {
        let mut guard = drain(guard, Some(current_device()));
        guard.free(pointer).map_or_else(|code| code, |()| OK)
    }
    Context fn cuMemAllocAsync(pointer: *mut DevicePointer, bytes: usize, stream: Handle) |guard| {
        let mut guard = guard;
        let number = stream_of(&mut guard, stream);
        let Some(device) = guard.streams.get(&number).map(|stream| stream.device) else {
            return INVALID_HANDLE;
        };
        allocate(guard, pointer, device, bytes)
    }
    Context fn cuMemFreeAsync(pointer: DevicePointer, stream: Handle) |guard| {
        issue(guard, stream, Work::Free { address: pointer })
    }
    Quiet fn cuMemHostRegister_v2(pointer: Handle, bytes: usize, _flags: u32) |guard| {
        let mut guard = guard;
        guard.pin(current_device(), host(pointer, bytes), false)
    }
    Quiet fn cuMemHostUnregister(pointer: Handle) |guard| {
        let mut guard = guard;
        let address = pointer.addr();
        match guard.pinned.get(&address).cloned() {
            Some(pinned) if !pinned.allocated => {
                if guard.is_in_flight(pinned.memory) {
                    guard.violation("host memory was unregistered under a copy in flight".into());
                }
                // Real drivers do so too: they wait for all kernels, whatever memory these use.
                guard = drain(guard, None);
                guard.pinned.remove(&address);
                OK
            }
            _ => NOT_REGISTERED,
        }
    }
    Context fn cuMemHostAlloc(place: *mut Handle, bytes: usize, _flags: u32) |guard| {
        let mut guard = guard;
        // Only `cuMemFreeHost` frees it.
        let memory = Box::leak(vec![0_u8; bytes].into_boxed_slice());
        let pointer: Handle = memory.as_mut_ptr().cast();
        let code = guard.pin(current_device(), host(pointer, bytes), true);
        raw::put(place, pointer);
        code
    }
    Context fn cuMemFreeHost(pointer: Handle) |guard| {
        let mut guard = guard;
        let address = pointer.addr();
        match guard.pinned.get(&address).cloned() {
            Some(pinned) if pinned.allocated => {
                if guard.is_in_flight(pinned.memory) {
                    guard.violation("host memory was freed under a copy in flight".into());
                }
                guard = drain(guard, None);
                guard.pinned.remove(&address);
                drop(guard);
                let len = pinned.memory.len;
                let memory = std::ptr::slice_from_raw_parts_mut(pointer.cast::<u8>(), len);
                // SAFETY: it is the box that `cuMemHostAlloc` leaked, and it was removed from the
                // table only once.
                drop(unsafe { Box::from_raw(memory) });
                OK
            }
            _ => INVALID_VALUE,
        }
    }

    Context fn cuMemcpyHtoDAsync_v2(
        to: DevicePointer, from: *const c_void, bytes: usize, stream: Handle,
    ) |guard| {
        issue(guard, stream, Work::Up { to, from: host(from, bytes) })
    }
    Context fn cuMemcpyDtoHAsync_v2(
        to: Handle, from: DevicePointer, bytes: usize, stream: Handle,
    ) |guard| {
        issue(guard, stream, Work::Down { to: host(to, bytes), from })
    }
    Context fn cuMemcpyDtoDAsync_v2(
        to: DevicePointer, from: DevicePointer, bytes: usize, stream: Handle,
    ) |guard| {
        issue(guard, stream, Work::Copy { to, from, len: bytes as u64 })
    }
    Context fn cuMemcpyBatchAsync(
        to: *mut DevicePointer, from: *mut DevicePointer, bytes: *mut usize, count: usize,
        attributes: *mut c_void, _indices: *mut usize, attribute_count: usize,
        _failed: *mut usize, stream: Handle,
    ) |guard| {
        let is_default = stream.addr() <= 1;
        if count == 0 || attribute_count == 0 || attributes.is_null() || is_default {
            return INVALID_VALUE;
        }
        let entry = |nth| {
            Some((raw::element(to, nth)?, raw::element(from, nth)?, raw::element(bytes, nth)?))
        };
        let Some(entries) = (0..count).map(entry).collect::<Option<Vec<_>>>() else {
            return INVALID_VALUE;
        };
        if entries.iter().any(|&(.., len)| len == 0) {
            return INVALID_VALUE;
        }
        let copies = entries
            .into_iter()
            .map(|(to, from, len)| copy_between(&guard, to, from, len as u64))
            .collect::<Vec<_>>();
        drop(guard);
        // All are accepted, or the first that is not ends it, as a driver may.
        let mut copies = copies.into_iter().map(|copy| issue(world(), stream, copy));
        copies.find(|&code| code != OK).unwrap_or(OK)
    }
    Quiet fn cuMemcpyHtoD_v2(to: DevicePointer, from: *const c_void, bytes: usize) |guard| {
        issue_and_wait(guard, Work::Up { to, from: host(from, bytes) })
    }
    Quiet fn cuMemcpyDtoH_v2(to: Handle, from: DevicePointer, bytes: usize) |guard| {
        issue_and_wait(guard, Work::Down { to: host(to, bytes), from })
    }
    Context fn cuMemsetD8Async(to: DevicePointer, value: u8, bytes: usize, stream: Handle) |guard| {
        issue(guard, stream, Work::Fill { to, pattern: vec![value], len: bytes as u64 })
    }
    Context fn cuMemsetD32Async(
        to: DevicePointer, value: u32, count: usize, stream: Handle,
    ) |guard| {
        let pattern = value.to_le_bytes().to_vec();
        issue(guard, stream, Work::Fill { to, pattern, len: count as u64 * 4 })
    }
    Quiet fn cuMemsetD8_v2(to: DevicePointer, value: u8, bytes: usize) |guard| {
        issue_and_wait(guard, Work::Fill { to, pattern: vec![value], len: bytes as u64 })
    }

}
