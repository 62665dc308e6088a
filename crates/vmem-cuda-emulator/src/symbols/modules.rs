//! Modules and kernels: the few that are known by name, played on heap memory.
//!
//! Invariant: a function is launched only if its module names it. Called as the driver's.

use std::ffi::{c_char, c_void};

use super::{
    Guard, Handle, Needs, address, copy_between, current_device, enter, handle, issue, stream_of,
};
use crate::codes::{Code, INVALID_DEVICE_FUNCTION, INVALID_HANDLE, INVALID_VALUE, NOT_FOUND, OK};
use crate::raw::{self, HostMemory};
use crate::stream::{Op, Work};
use crate::world::Reach;

fn load_module(mut guard: Guard, place: *mut Handle, image: *const c_void) -> Code {
    let Some(text) = raw::text(image.cast()) else { return INVALID_VALUE };
    let entry = |part: &str| {
        part.split(|c: char| !c.is_alphanumeric() && c != '_').next().map(str::to_owned)
    };
    let entries =
        text.split(".entry").skip(1).filter_map(|part| entry(part.trim_start())).collect();
    let number = guard.handle();
    guard.modules.insert(number, (current_device(), entries));
    raw::put(place, handle(number));
    OK
}

/// The kernel of the tier that copies what a table lists: where to, where from, how many bytes.
fn launch_pieces(guard: Guard, stream: Handle, parameters: *mut *mut c_void) -> Code {
    let word = |nth| raw::get::<u64>(raw::nth(parameters, nth)?.cast_const().cast());
    let (Some(table), Some(count)) = (word(0), word(1)) else { return INVALID_VALUE };
    let table = HostMemory { address: table as usize, len: count as usize * 24 };
    let bytes = table.read();
    let words =
        bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap_or([0; 8])));
    let words: Vec<u64> = words.collect();
    let mut guard = guard;
    if words.chunks_exact(3).any(|entry| entry[0] % 16 != entry[1] % 16) {
        guard.violation("a kernel that copies got a piece whose addresses differ modulo 16".into());
    }
    let copies = words.chunks_exact(3).map(|entry| {
        let work = copy_between(&guard, entry[0], entry[1], entry[2]);
        Op::issued(work, Reach::Pinned)
    });
    let copies = copies.collect();
    issue(guard, stream, Work::Pieces { table, copies })
}

driver! {
    Context fn cuModuleLoadData(module: *mut Handle, image: *const c_void) |guard| {
        load_module(guard, module, image)
    }
    Context fn cuModuleLoadDataEx(
        module: *mut Handle, image: *const c_void, _count: u32, _options: *mut i32,
        _values: *mut Handle,
    ) |guard| {
        load_module(guard, module, image)
    }
    Context fn cuModuleUnload(module: Handle) |guard| {
        let mut guard = guard;
        guard.modules.remove(&address(module)).map_or(INVALID_HANDLE, |_| OK)
    }
    Context fn cuModuleGetFunction(
        function: *mut Handle, module: Handle, name: *const c_char,
    ) |guard| {
        let mut guard = guard;
        let Some(name) = raw::text(name) else { return INVALID_VALUE };
        let Some((device, entries)) = guard.modules.get(&address(module)) else {
            return NOT_FOUND;
        };
        if !entries.contains(&name) {
            return NOT_FOUND;
        }
        let device = *device;
        let number = guard.handle();
        guard.functions.insert(number, (device, name));
        raw::put(function, handle(number));
        OK
    }
    Context fn cuFuncGetAttribute(value: *mut i32, _attribute: i32, _function: Handle) |_guard| {
        raw::put(value, 0);
        OK
    }
    Context fn cuLaunchKernel(
        function: Handle, _grid_x: u32, _grid_y: u32, _grid_z: u32, _block_x: u32, _block_y: u32,
        _block_z: u32, _shared: u32, stream: Handle, parameters: *mut *mut c_void,
        _extra: *mut *mut c_void,
    ) |guard| {
        let mut guard = guard;
        let number = stream_of(&mut guard, stream);
        let Some((device, name)) = guard.functions.get(&address(function)) else {
            return INVALID_HANDLE;
        };
        // A function belongs to a context, and runs on streams of that alone.
        if guard.streams.get(&number).is_none_or(|stream| stream.device != *device) {
            return INVALID_HANDLE;
        }
        if name == "vmem_pieces" {
            return launch_pieces(guard, stream, parameters);
        }
        let known = ["vmem_fill", "vmem_add", "vmem_copy", "vmem_slow_copy", "vmem_spin"];
        let Some(name) = known.into_iter().find(|known| known == name) else {
            return INVALID_DEVICE_FUNCTION;
        };
        let place = |nth| Some(raw::nth(parameters, nth)?.cast_const());
        let word = |nth| raw::get::<u64>(place(nth)?.cast());
        let byte = |nth| raw::get::<u8>(place(nth)?.cast());
        if name == "vmem_spin" {
            let Some(nanoseconds) = word(0) else { return INVALID_VALUE };
            return issue(guard, stream, Work::Kernel { name, arguments: [nanoseconds, 0, 0, 0] });
        }
        let third = if name.ends_with("copy") { word(2) } else { byte(2).map(u64::from) };
        let (Some(a), Some(b), Some(c)) = (word(0), word(1), third) else { return INVALID_VALUE };
        issue(guard, stream, Work::Kernel { name, arguments: [a, b, c, 0] })
    }

}
