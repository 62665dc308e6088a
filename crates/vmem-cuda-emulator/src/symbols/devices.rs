//! Devices, contexts and versions.
//!
//! Invariant: a context belongs to the thread that it is current on. Called as the driver's.

use std::ffi::c_char;

use super::{
    CONTEXT, Guard, Handle, Needs, address, current_device, enter, handle, host, is_device,
};
use crate::codes::{Code, INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, OK};
use crate::raw::{self};
use crate::world::{CAPTURE_MODE, CURRENT, current, wait};

driver! {
    Nothing fn cuDriverGetVersion(version: *mut i32) |_guard| {
        raw::put(version, 12_080);
        OK
    }
    Init fn cuDeviceGetCount(count: *mut i32) |guard| {
        raw::put(count, guard.devices);
        OK
    }
    Init fn cuDeviceGet(device: *mut i32, ordinal: i32) |guard| {
        if !is_device(&guard, ordinal) {
            return INVALID_DEVICE;
        }
        raw::put(device, ordinal);
        OK
    }
    Init fn cuDeviceGetName(name: *mut c_char, len: i32, device: i32) |guard| {
        if !is_device(&guard, device) || len < 1 {
            return INVALID_DEVICE;
        }
        let mut text = b"vmem emulated GPU".to_vec();
        text.truncate(len as usize - 1);
        text.push(0);
        host(name.cast_const().cast(), text.len()).write(&text);
        OK
    }
    Init fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: i32) |guard| {
        if !is_device(&guard, device) {
            return INVALID_DEVICE;
        }
        raw::put(uuid, [0xE0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, device as u8]);
        OK
    }
    Init fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: i32) |guard| {
        if !is_device(&guard, device) {
            return INVALID_DEVICE;
        }
        raw::put(uuid, [0xE0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, device as u8]);
        OK
    }
    Init fn cuDeviceTotalMem_v2(bytes: *mut usize, device: i32) |guard| {
        if !is_device(&guard, device) {
            return INVALID_DEVICE;
        }
        raw::put(bytes, guard.total as usize);
        OK
    }
    Init fn cuDeviceGetAttribute(value: *mut i32, attribute: i32, device: i32) |guard| {
        if !is_device(&guard, device) {
            return INVALID_DEVICE;
        }
        // Threads of a block, of a warp, multiprocessors, capability, addressing, priorities,
        // pools; mappings of memory.
        let known = match attribute {
            1 => 1024,
            10 => 32,
            16 => 4,
            75 => 9,
            76 => 0,
            41 | 78 | 115 => 1,
            91 => i32::from(guard.addressed_alike),
            102 => i32::from(guard.paged),
            _ => 0,
        };
        raw::put(value, known);
        OK
    }

    Init fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: i32) |guard| {
        let mut guard = guard;
        if !is_device(&guard, device) {
            return INVALID_DEVICE;
        }
        if let Some(code) = guard.sticky(device) {
            return code;
        }
        let number = CONTEXT + device as u64;
        *guard.retained.entry(number).or_default() += 1;
        raw::put(context, handle(number));
        OK
    }
    Init fn cuDevicePrimaryCtxRelease_v2(device: i32) |guard| {
        let mut guard = guard;
        let retained = guard.retained.entry(CONTEXT + device as u64).or_default();
        if *retained == 0 {
            guard.violation("a context was released more often than retained".into());
            return INVALID_CONTEXT;
        }
        *retained -= 1;
        if *retained == 0 {
            guard.end_context(device);
        }
        OK
    }
    Init fn cuCtxGetCurrent(context: *mut Handle) |_guard| {
        raw::put(context, handle(current()));
        OK
    }
    Init fn cuCtxSetCurrent(context: Handle) |_guard| {
        CURRENT.with_borrow_mut(|stack| {
            stack.pop();
            if !context.is_null() {
                stack.push(address(context));
            }
        });
        OK
    }
    Init fn cuCtxPushCurrent_v2(context: Handle) |_guard| {
        if context.is_null() {
            return INVALID_CONTEXT;
        }
        CURRENT.with_borrow_mut(|stack| stack.push(address(context)));
        OK
    }
    Init fn cuCtxPopCurrent_v2(context: *mut Handle) |_guard| {
        match CURRENT.with_borrow_mut(Vec::pop) {
            Some(popped) => {
                raw::put(context, handle(popped));
                OK
            }
            None => INVALID_CONTEXT,
        }
    }
    Context fn cuCtxGetDevice(device: *mut i32) |_guard| {
        raw::put(device, current_device());
        OK
    }
    Quiet fn cuCtxSynchronize() |guard| {
        let mut guard = guard;
        guard.count("context_synchronisations", 1);
        let device = current_device();
        while !guard.is_idle(Some(device)) {
            guard = wait(guard);
        }
        let streams = guard.streams.values().filter(|stream| stream.device == device);
        let clocks: Vec<_> = streams.map(|stream| stream.clock.clone()).collect();
        for clock in &clocks {
            guard.seen.join(clock);
        }
        guard.sticky(device).unwrap_or(OK)
    }
    Context fn cuCtxGetStreamPriorityRange(least: *mut i32, greatest: *mut i32) |_guard| {
        raw::put(least, 0);
        raw::put(greatest, -5);
        OK
    }
    Init fn cuThreadExchangeStreamCaptureMode(mode: *mut i32) |_guard| {
        let Some(new) = raw::get(mode) else { return INVALID_VALUE };
        raw::put(mode, CAPTURE_MODE.replace(new));
        OK
    }

}
