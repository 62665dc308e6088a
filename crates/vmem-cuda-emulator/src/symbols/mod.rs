//! The driver's functions, as C knows them.
//!
//! Invariant: none of them panics across the border; each checks, in this order: a host function
//! may call none, a failure that was injected, initialisation, a current context, an error that
//! sticks to its device. What it does on a stream fails with the error of the stream's device too.
//! Called by cudarc.

#![allow(unsafe_code)]
#![allow(non_snake_case, reason = "the names are the driver's")]
#![allow(unreachable_pub, reason = "they are exported from the library, not from the crate")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::MutexGuard;

use crate::codes::{
    CAPTURE_INVALIDATED, CAPTURE_UNSUPPORTED, Code, INVALID_CONTEXT, INVALID_DEVICE,
    INVALID_DEVICE_FUNCTION, INVALID_HANDLE, INVALID_VALUE, NO_DEVICE, NOT_FOUND, NOT_INITIALIZED,
    NOT_PERMITTED, NOT_READY, NOT_REGISTERED, NOT_SUPPORTED, OK, UNKNOWN,
};
use crate::raw::{self, HostMemory};
use crate::stream::{self, Work};
use crate::world::{
    CAPTURE_MODE, CURRENT, Capture, Device, IN_HOST_FUNCTION, PER_THREAD, World, current, world,
};

type Handle = *mut c_void;
type DevicePointer = u64;
type Guard = MutexGuard<'static, World>;

const CONTEXT: u64 = 0xC0DE_0000;

/// What a function needs before it does anything.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    Nothing,
    Init,
    Context,
    /// A context, and no capture in global mode of which this thread may know nothing.
    Quiet,
}

fn enter(name: &'static str, needs: Needs, work: impl FnOnce(Guard) -> Code) -> Code {
    let entered = AssertUnwindSafe(|| {
        if IN_HOST_FUNCTION.get() {
            return NOT_PERMITTED;
        }
        let mut guard = world();
        *guard.calls.entry(name).or_default() += 1;
        if let Some(at) = guard.injected.iter().position(|(function, ..)| function == name) {
            guard.injected[at].1 -= 1;
            if guard.injected[at].1 == 0 {
                return guard.injected.swap_remove(at).2;
            }
        }
        if let Some(&code) = guard.refused.get(name) {
            return code;
        }
        if needs == Needs::Nothing {
            return work(guard);
        }
        if !guard.initialized {
            return NOT_INITIALIZED;
        }
        if needs == Needs::Init {
            return work(guard);
        }
        if current() == 0 {
            return INVALID_CONTEXT;
        }
        if let Some(code) = guard.sticky(current_device()) {
            return code;
        }
        let mut streams = guard.streams.values();
        let global = |capture: &Capture| capture.mode == 0;
        let captured = streams.any(|stream| stream.capturing.as_ref().is_some_and(global));
        if needs == Needs::Quiet && captured && CAPTURE_MODE.get() != 2 {
            guard.invalidate(global);
            return CAPTURE_UNSUPPORTED;
        }
        work(guard)
    });
    catch_unwind(entered).unwrap_or(UNKNOWN)
}

/// The functions, with what each needs.
macro_rules! driver {
    ($(
        $needs:ident fn $name:ident($($arg:ident: $kind:ty),* $(,)?) |$guard:ident| $body:block
    )*) => {$(
        /// As the driver's.
        ///
        /// # Safety
        ///
        /// As the driver's: outputs are valid places, and memory that an operation uses is valid
        /// until it has ended.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $kind),*) -> Code {
            enter(stringify!($name), Needs::$needs, |$guard: Guard| $body)
        }
    )*};
}

// Behind the macro that they use.
mod devices;
mod graphs;
mod mapped;
mod memory;
mod modules;
mod streams;

/// The device of the context that is current on this thread; the first one if none is.
fn current_device() -> Device {
    let current = CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(CONTEXT));
    current.saturating_sub(CONTEXT) as Device
}

fn address(handle: Handle) -> u64 {
    handle.addr() as u64
}

fn handle(number: u64) -> Handle {
    std::ptr::without_provenance_mut(number as usize)
}

fn host(pointer: *const c_void, len: usize) -> HostMemory {
    HostMemory { address: pointer.expose_provenance(), len }
}

/// The stream behind a handle: the null stream and each thread's own, of each device, are made when
/// they are first used.
fn stream_of(guard: &mut Guard, given: Handle) -> u64 {
    thread_local! {
        static MINE: RefCell<HashMap<Device, u64>> = RefCell::default();
    }
    let device = current_device();
    let number = match address(given) {
        0 | 1 => device as u64,
        2 => MINE.with_borrow_mut(|mine| {
            *mine.entry(device).or_insert_with(|| PER_THREAD + guard.handle())
        }),
        number => return number,
    };
    if !guard.streams.contains_key(&number) {
        stream::create(guard, number, device, 0, 0);
    }
    number
}

fn issue(mut guard: Guard, given: Handle, work: Work) -> Code {
    let number = stream_of(&mut guard, given);
    stream::submit(guard, number, work).map_or_else(|code| code, |_| OK)
}

/// A copy whose direction follows from the addresses, as in unified addressing.
fn copy_between(guard: &Guard, to: u64, from: u64, len: u64) -> Work {
    let memory = |address: u64| HostMemory { address: address as usize, len: len as usize };
    match (guard.is_of_device(to), guard.is_of_device(from)) {
        (true, false) => Work::Up { to, from: memory(from) },
        (false, true) => Work::Down { to: memory(to), from },
        // Memory of the host on both sides is refused when it is carried out.
        _ => Work::Copy { to, from, len },
    }
}

/// Issues work and waits for it.
fn issue_and_wait(mut guard: Guard, work: Work) -> Code {
    let number = stream_of(&mut guard, handle(0));
    match stream::submit(guard, number, work) {
        Ok(_) => stream::synchronize(world(), number),
        Err(code) => code,
    }
}

fn is_device(guard: &Guard, device: Device) -> bool {
    (0..guard.devices).contains(&device)
}

driver! {
    Nothing fn cuInit(_flags: u32) |guard| {
        let mut guard = guard;
        if guard.devices == 0 {
            return NO_DEVICE;
        }
        guard.initialized = true;
        OK
    }
    Nothing fn cuGetErrorName(code: Code, name: *mut *const c_char) |_guard| {
        raw::put(name, describe(code).as_ptr());
        OK
    }
    Nothing fn cuGetErrorString(code: Code, text: *mut *const c_char) |_guard| {
        raw::put(text, describe(code).as_ptr());
        OK
    }
}

fn describe(code: Code) -> &'static std::ffi::CStr {
    match code {
        OK => c"CUDA_SUCCESS",
        INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        2 => c"CUDA_ERROR_OUT_OF_MEMORY",
        NOT_INITIALIZED => c"CUDA_ERROR_NOT_INITIALIZED",
        INVALID_DEVICE_FUNCTION => c"CUDA_ERROR_INVALID_DEVICE_FUNCTION",
        NO_DEVICE => c"CUDA_ERROR_NO_DEVICE",
        INVALID_DEVICE => c"CUDA_ERROR_INVALID_DEVICE",
        INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        INVALID_HANDLE => c"CUDA_ERROR_INVALID_HANDLE",
        NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
        NOT_READY => c"CUDA_ERROR_NOT_READY",
        700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        712 => c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        NOT_REGISTERED => c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        719 => c"CUDA_ERROR_LAUNCH_FAILED",
        NOT_PERMITTED => c"CUDA_ERROR_NOT_PERMITTED",
        NOT_SUPPORTED => c"CUDA_ERROR_NOT_SUPPORTED",
        CAPTURE_UNSUPPORTED => c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        CAPTURE_INVALIDATED => c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        905 => c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
        907 => c"CUDA_ERROR_CAPTURED_EVENT",
        _ => c"CUDA_ERROR_UNKNOWN",
    }
}
