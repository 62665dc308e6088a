//! The driver's functions, as C knows them.
//!
//! Invariant: none of them panics across the border; each checks, in this order: a host function
//! may call none, a failure that was injected, an error that sticks, initialisation, a current
//! context. Called by cudarc.

#![allow(unsafe_code)]
#![allow(non_snake_case, reason = "the names are the driver's")]
#![allow(unreachable_pub, reason = "they are exported from the library, not from the crate")]

use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::MutexGuard;

use crate::raw::{self, HostFunction, HostMemory};
use crate::stream::{self, Stream, Work};
use crate::world::{
    CAPTURE_INVALIDATED, CAPTURE_MODE, CAPTURE_UNSUPPORTED, CHANGED, CURRENT, Capture, Code,
    DEFAULT_STREAM, Event, IN_HOST_FUNCTION, INVALID_CONTEXT, INVALID_DEVICE,
    INVALID_DEVICE_FUNCTION, INVALID_HANDLE, INVALID_VALUE, NO_DEVICE, NOT_FOUND, NOT_INITIALIZED,
    NOT_PERMITTED, NOT_READY, NOT_REGISTERED, OK, PER_THREAD, UNKNOWN, World, drain, wait, world,
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
        if CURRENT.with_borrow(|stack| stack.last().is_none_or(|&context| context == 0)) {
            return INVALID_CONTEXT;
        }
        if let Some(code) = guard.sticky {
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

fn address(handle: Handle) -> u64 {
    handle.addr() as u64
}

fn handle(number: u64) -> Handle {
    std::ptr::without_provenance_mut(number as usize)
}

fn host(pointer: *const c_void, len: usize) -> HostMemory {
    HostMemory { address: pointer.expose_provenance(), len }
}

/// The stream behind a handle: the null stream and each thread's own are made when they are first
/// used.
fn stream_of(guard: &mut Guard, given: Handle) -> u64 {
    thread_local! {
        static MINE: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
    }
    let number = match address(given) {
        0 | 1 => DEFAULT_STREAM,
        2 => {
            if MINE.get() == 0 {
                MINE.set(PER_THREAD + guard.handle());
            }
            MINE.get()
        }
        number => return number,
    };
    if !guard.streams.contains_key(&number) {
        stream::create(guard, number, 0, 0);
    }
    number
}

fn issue(mut guard: Guard, given: Handle, work: Work) -> Code {
    let number = stream_of(&mut guard, given);
    stream::submit(guard, number, work).map_or_else(|code| code, |_| OK)
}

/// Issues work and waits for it.
fn issue_and_wait(mut guard: Guard, work: Work) -> Code {
    let number = stream_of(&mut guard, handle(0));
    match stream::submit(guard, number, work) {
        Ok(_) => stream::synchronize(world(), number),
        Err(code) => code,
    }
}

fn new_stream(mut guard: Guard, place: *mut Handle, flags: u32, priority: i32) -> Code {
    let number = guard.handle();
    stream::create(&mut guard, number, flags, priority);
    guard.count("live_streams", 1);
    raw::put(place, handle(number));
    OK
}

/// A stream that waits for an event of a capture takes part in it.
fn join_capture(world: &mut World, number: u64, id: u64) -> Code {
    let joined = world.streams.values().filter_map(|stream| stream.capturing);
    let Some(capture) = joined.into_iter().find(|capture| capture.id == id) else {
        return INVALID_VALUE;
    };
    match world.streams.get_mut(&number) {
        Some(stream) => {
            stream.capturing.get_or_insert(capture);
            OK
        }
        None => INVALID_HANDLE,
    }
}

fn is_device(guard: &Guard, device: i32) -> bool {
    (0..guard.devices).contains(&device)
}

fn load_module(mut guard: Guard, place: *mut Handle, image: *const c_void) -> Code {
    let Some(text) = raw::text(image.cast()) else { return INVALID_VALUE };
    let entry = |part: &str| {
        part.split(|c: char| !c.is_alphanumeric() && c != '_').next().map(str::to_owned)
    };
    let entries =
        text.split(".entry").skip(1).filter_map(|part| entry(part.trim_start())).collect();
    let number = guard.handle();
    guard.modules.insert(number, entries);
    raw::put(place, handle(number));
    OK
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
        // pools.
        let known = match attribute {
            1 => 1024,
            10 => 32,
            16 => 4,
            75 => 9,
            76 => 0,
            41 | 78 | 115 => 1,
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
        if let Some(code) = guard.sticky {
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
        OK
    }
    Init fn cuCtxGetCurrent(context: *mut Handle) |_guard| {
        let current = CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0));
        raw::put(context, handle(current));
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
        let current = CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(CONTEXT));
        raw::put(device, (current - CONTEXT) as i32);
        OK
    }
    Quiet fn cuCtxSynchronize() |guard| {
        let mut guard = guard;
        guard.count("context_synchronisations", 1);
        while !guard.is_idle() && guard.sticky.is_none() {
            guard = wait(guard);
        }
        let clocks: Vec<_> = guard.streams.values().map(|stream| stream.clock.clone()).collect();
        for clock in &clocks {
            guard.seen.join(clock);
        }
        guard.sticky.unwrap_or(OK)
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

    Context fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |guard| {
        raw::put(free, guard.free_bytes() as usize);
        raw::put(total, guard.total as usize);
        OK
    }
    Quiet fn cuMemAlloc_v2(pointer: *mut DevicePointer, bytes: usize) |guard| {
        let mut guard = guard;
        match guard.allocate(bytes as u64) {
            Ok(address) => {
                raw::put(pointer, address);
                OK
            }
            Err(code) => code,
        }
    }
    Quiet fn cuMemFree_v2(pointer: DevicePointer) |guard| {
        let mut guard = drain(guard);
        match guard.allocations.remove(&pointer) {
            Some(_) => OK,
            None => {
                guard.violation(format!("device memory {pointer:x} was freed twice"));
                INVALID_VALUE
            }
        }
    }
    Context fn cuMemAllocAsync(pointer: *mut DevicePointer, bytes: usize, _stream: Handle) |guard| {
        let mut guard = guard;
        match guard.allocate(bytes as u64) {
            Ok(address) => {
                raw::put(pointer, address);
                OK
            }
            Err(code) => code,
        }
    }
    Context fn cuMemFreeAsync(pointer: DevicePointer, stream: Handle) |guard| {
        issue(guard, stream, Work::Free { address: pointer })
    }
    Quiet fn cuMemHostRegister_v2(pointer: Handle, bytes: usize, _flags: u32) |guard| {
        let mut guard = guard;
        guard.pin(host(pointer, bytes), false)
    }
    Quiet fn cuMemHostUnregister(pointer: Handle) |guard| {
        let mut guard = guard;
        let address = pointer.addr();
        match guard.pinned.get(&address).cloned() {
            Some(pinned) if !pinned.allocated => {
                if guard.is_in_flight(pinned.memory) {
                    guard.violation("host memory was unregistered under a copy in flight".into());
                }
                // As a card was seen to do: it waits for kernels, whatever memory they use.
                guard = drain(guard);
                guard.pinned.remove(&address);
                OK
            }
            _ => NOT_REGISTERED,
        }
    }
    Context fn cuMemHostAlloc(place: *mut Handle, bytes: usize, _flags: u32) |guard| {
        let mut guard = guard;
        // Given back by `cuMemFreeHost` alone.
        let memory = Box::leak(vec![0_u8; bytes].into_boxed_slice());
        let pointer: Handle = memory.as_mut_ptr().cast();
        let code = guard.pin(host(pointer, bytes), true);
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
                guard = drain(guard);
                guard.pinned.remove(&address);
                drop(guard);
                let len = pinned.memory.len;
                let memory = std::ptr::slice_from_raw_parts_mut(pointer.cast::<u8>(), len);
                // SAFETY: it is the box that `cuMemHostAlloc` leaked, and it was in the table once.
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

    Context fn cuStreamCreate(stream: *mut Handle, flags: u32) |guard| {
        new_stream(guard, stream, flags, 0)
    }
    Context fn cuStreamCreateWithPriority(stream: *mut Handle, flags: u32, priority: i32) |guard| {
        new_stream(guard, stream, flags, priority)
    }
    Context fn cuStreamDestroy_v2(stream: Handle) |guard| {
        let mut guard = guard;
        match guard.streams.get_mut(&address(stream)) {
            Some(stream) if !stream.destroyed => {
                stream.destroyed = true;
                CHANGED.notify_all();
                OK
            }
            _ => INVALID_HANDLE,
        }
    }
    Quiet fn cuStreamSynchronize(stream: Handle) |guard| {
        let mut guard = guard;
        let number = stream_of(&mut guard, stream);
        stream::synchronize(guard, number)
    }
    Quiet fn cuStreamQuery(stream: Handle) |guard| {
        let mut guard = guard;
        let number = stream_of(&mut guard, stream);
        let Some(stream) = guard.streams.get(&number) else { return INVALID_HANDLE };
        if let Some(capture) = stream.capturing {
            guard.invalidate(|other| other.id == capture.id);
            return CAPTURE_UNSUPPORTED;
        }
        if stream.done < stream.submitted {
            return NOT_READY;
        }
        let clock = stream.clock.clone();
        guard.seen.join(&clock);
        OK
    }
    Context fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: u32) |guard| {
        let Some(event) = guard.events.get(&address(event)) else { return INVALID_HANDLE };
        let last = event.last;
        let clock = event.clock.clone();
        let captured = event.captured;
        let mut guard = guard;
        let number = stream_of(&mut guard, stream);
        if let Some(id) = captured {
            return join_capture(&mut guard, number, id);
        }
        let Some(until) = last else { return OK };
        if let Some(stream) = guard.streams.get_mut(&number)
            && stream.capturing.is_none()
        {
            stream.clock.join(&clock);
        }
        stream::submit(guard, number, Work::Wait { until }).map_or_else(|code| code, |_| OK)
    }
    Context fn cuStreamGetPriority(stream: Handle, priority: *mut i32) |guard| {
        let found = guard.streams.get(&address(stream)).map(|stream| stream.priority);
        found.map_or(INVALID_HANDLE, |found| { raw::put(priority, found); OK })
    }
    Context fn cuStreamGetFlags(stream: Handle, flags: *mut u32) |guard| {
        let found = guard.streams.get(&address(stream)).map(|stream| stream.flags);
        found.map_or(INVALID_HANDLE, |found| { raw::put(flags, found); OK })
    }
    Context fn cuStreamIsCapturing(stream: Handle, status: *mut i32) |guard| {
        let capturing = guard.streams.get(&address(stream)).and_then(|stream| stream.capturing);
        raw::put(status, capturing.map_or(0, |capture| 1 + i32::from(capture.invalid)));
        OK
    }
    Context fn cuStreamBeginCapture_v2(stream: Handle, mode: i32) |guard| {
        let mut guard = guard;
        let capture = Capture { id: guard.handle(), mode, invalid: false };
        match guard.streams.get_mut(&address(stream)) {
            Some(stream) => {
                stream.capturing = Some(capture);
                OK
            }
            None => INVALID_HANDLE,
        }
    }
    Context fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) |guard| {
        let mut guard = guard;
        raw::put(graph, handle(0));
        let Some(stream) = guard.streams.get_mut(&address(stream)) else { return INVALID_HANDLE };
        let Some(ended) = stream.capturing else { return INVALID_VALUE };
        let takes_part = |stream: &&mut Stream| {
            stream.capturing.is_some_and(|capture| capture.id == ended.id)
        };
        guard.streams.values_mut().filter(takes_part).for_each(|stream| stream.capturing = None);
        if ended.invalid { CAPTURE_INVALIDATED } else { OK }
    }
    Context fn cuLaunchHostFunc(
        stream: Handle, function: Option<unsafe extern "C" fn(Handle)>, argument: Handle,
    ) |guard| {
        let Some(function) = function else { return INVALID_VALUE };
        let function = HostFunction { function, argument: argument.expose_provenance() };
        issue(guard, stream, Work::HostFunction(function))
    }

    Context fn cuEventCreate(event: *mut Handle, _flags: u32) |guard| {
        let mut guard = guard;
        let number = guard.handle();
        guard.events.insert(number, Event::default());
        raw::put(event, handle(number));
        OK
    }
    Context fn cuEventDestroy_v2(event: Handle) |guard| {
        let mut guard = guard;
        guard.events.remove(&address(event)).map_or(INVALID_HANDLE, |_| OK)
    }
    Context fn cuEventRecord(event: Handle, stream: Handle) |guard| {
        if !guard.events.contains_key(&address(event)) {
            return INVALID_HANDLE;
        }
        issue(guard, stream, Work::Record { event: address(event) })
    }
    Quiet fn cuEventQuery(event: Handle) |guard| {
        let mut guard = guard;
        let Some(event) = guard.events.get(&address(event)) else { return INVALID_HANDLE };
        let last = event.last;
        let clock = event.clock.clone();
        let captured = event.captured;
        if let Some(code) = guard.captured_event(captured) {
            return code;
        }
        if last.is_some_and(|last| !guard.has_ended(last)) {
            return NOT_READY;
        }
        guard.seen.join(&clock);
        OK
    }
    Quiet fn cuEventSynchronize(event: Handle) |guard| {
        let mut guard = guard;
        let Some(event) = guard.events.get(&address(event)) else { return INVALID_HANDLE };
        let last = event.last;
        let clock = event.clock.clone();
        let captured = event.captured;
        if let Some(code) = guard.captured_event(captured) {
            return code;
        }
        while last.is_some_and(|last| !guard.has_ended(last)) && guard.sticky.is_none() {
            guard = wait(guard);
        }
        guard.seen.join(&clock);
        guard.sticky.unwrap_or(OK)
    }
    Context fn cuEventElapsedTime(milliseconds: *mut f32, from: Handle, to: Handle) |guard| {
        let at = |event: Handle| guard.events.get(&address(event)).and_then(|event| event.at);
        let (Some(from), Some(to)) = (at(from), at(to)) else { return NOT_READY };
        raw::put(milliseconds, to.duration_since(from).as_secs_f32() * 1000.0);
        OK
    }

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
        let entries = guard.modules.get(&address(module));
        if !entries.is_some_and(|entries| entries.contains(&name)) {
            return NOT_FOUND;
        }
        let number = guard.handle();
        guard.functions.insert(number, name);
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
        let Some(name) = guard.functions.get(&address(function)) else { return INVALID_HANDLE };
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
        CAPTURE_UNSUPPORTED => c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        CAPTURE_INVALIDATED => c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        905 => c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
        907 => c"CUDA_ERROR_CAPTURED_EVENT",
        _ => c"CUDA_ERROR_UNKNOWN",
    }
}
