//! What vmem assumes of a CUDA driver, asserted one by one: where a card differs, the emulated
//! driver is to be mended.
//!
//! Invariant: a part breaks nothing for another one: each has a process of its own. A difference
//! that costs vmem nothing is reported, and fails nothing. Called by `parts`.

#![allow(unsafe_code)]

mod habits;
mod memory;
mod pages;

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cudarc::driver::{CudaStream, DriverError, result, sys};
use serde_json::json;
use vmem::GpuSelection;
use vmem::backend::{DeviceBackend, DeviceError, IoBuf};

use self::memory::{copies, down, registration, stale_pages, up};
use crate::parts::{On, Outcome, Part};
use crate::user::Env;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
/// Long, for a device.
const SPIN: Duration = Duration::from_millis(60);

pub(crate) fn parts() -> Vec<Part> {
    let part = |name, run, about| Part { name, about, on: On::Both, run };
    vec![
        part(
            "contract-copies",
            copies,
            "pinned copies do not wait; pageable ones let go of their source",
        ),
        part(
            "contract-registration",
            registration,
            "registered twice, overlapping, and copies across borders",
        ),
        part(
            "contract-waiting",
            habits::waiting,
            "calls on threads of users wait for no kernel; which others do",
        ),
        part("contract-stale-pages", stale_pages, "registered memory is the pages that were there"),
        part("contract-events", events, "events have generations, and order streams"),
        part(
            "contract-host-functions",
            host_functions,
            "host functions: in order, and without the driver",
        ),
        part("contract-contexts", contexts, "contexts belong to threads"),
        part(
            "contract-no-context",
            habits::without_a_context,
            "streams and events on a thread without a context: served, or refused",
        ),
        part("contract-capture", capture, "a capture is broken by careless threads only"),
        part(
            "contract-event-captured",
            habits::captured_event,
            "an event that was recorded into a capture is not complete",
        ),
        part(
            "contract-slow-host-function",
            habits::slow_host_function,
            "an event does not wait for a host function of another stream",
        ),
        part(
            "contract-sizes",
            habits::registration_sizes,
            "memory of any size is registered in one piece",
        ),
        part("contract-memory", memory::memory, "memory that runs out, and comes again"),
        part("contract-queue", queue, "many launches behind a kernel"),
        part("contract-order", order, "streams without an event between them run side by side"),
        part("contract-pages", pages::pages, "device memory as pages that are mapped, and move"),
        part("contract-two-devices", memory::two_devices, "registered memory, where there are two"),
        part("contract-sticky", sticky, "an error that sticks"),
        part("conformance-device", conformance, "the backend: copies at random against a model"),
    ]
}

fn code<T>(result: std::result::Result<T, DriverError>) -> i32 {
    result.map_or_else(|DriverError(code)| code as i32, |_| 0)
}

fn events(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let first = &user.stream;
    let second = user.context.new_stream()?;
    let device = user.allocate(4096)?;
    let mut pinned = user.pinned(4096)?;
    let event = user.context.new_event(None)?;
    ensure!(event.try_is_complete()?, "an event that was never recorded is complete");
    user.spin(SPIN, first)?;
    // SAFETY: the memory is this part's, which waits below.
    unsafe { user.fill(device.address, 4096, 5, first) }?;
    event.record(first)?;
    ensure!(!event.try_is_complete()?, "behind a kernel");
    second.wait(&event)?;
    // Recorded again on an idle stream: an earlier waiter still waits for the kernel.
    let idle = user.context.new_stream()?;
    event.record(&idle)?;
    event.synchronize()?;
    ensure!(down(pinned.bytes_mut(), device.address, &second) == 0, "a copy");
    second.synchronize()?;
    ensure!(
        pinned.bytes().iter().all(|&byte| byte == 5),
        "the second stream did not wait for the first"
    );
    Ok(Outcome::Passed(json!(null)))
}

fn host_functions(env: &Env) -> Result<Outcome> {
    static ORDER: AtomicU32 = AtomicU32::new(0);
    static REFUSED: AtomicI32 = AtomicI32::new(-1);
    unsafe extern "C" fn first(_: *mut c_void) {
        ORDER.store(ORDER.load(Ordering::SeqCst) * 10 + 1, Ordering::SeqCst);
        REFUSED.store(code(result::mem_get_info()), Ordering::SeqCst);
    }
    unsafe extern "C" fn second(_: *mut c_void) {
        ORDER.store(ORDER.load(Ordering::SeqCst) * 10 + 2, Ordering::SeqCst);
    }
    let user = env.user()?;
    let kernel = &user.stream;
    let notices = user.context.new_stream()?;
    unsafe extern "C" fn nothing(_: *mut c_void) {}
    // The call for the first one of a process may wait for whatever the device does.
    // SAFETY: the function needs no argument.
    unsafe {
        result::stream::launch_host_function(notices.cu_stream(), nothing, std::ptr::null_mut())
    }?;
    notices.synchronize()?;
    user.spin(SPIN, kernel)?;
    let event = kernel.record_event(None)?;
    notices.wait(&event)?;
    for function in [first as unsafe extern "C" fn(*mut c_void), second] {
        let stream = notices.cu_stream();
        let nothing = std::ptr::null_mut();
        // SAFETY: the functions need no argument.
        unsafe { result::stream::launch_host_function(stream, function, nothing) }?;
    }
    std::thread::sleep(SPIN / 4);
    ensure!(ORDER.load(Ordering::SeqCst) == 0, "a host function ran before what it was behind");
    event.synchronize()?;
    let begun = Instant::now();
    while ORDER.load(Ordering::SeqCst) != 12 {
        ensure!(begun.elapsed() < Duration::from_secs(10), "they do not come: {ORDER:?}");
        std::thread::yield_now();
    }
    let late = begun.elapsed();
    // A driver may refuse it and need not: vmem never does it.
    let refused = REFUSED.load(Ordering::SeqCst);
    Ok(Outcome::Passed(json!({
        "after_the_event_us": late.as_micros() as u64, "a_call_of_the_driver_within": refused,
    })))
}

fn contexts(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let context = user.context.clone();
    let elsewhere = std::thread::spawn(move || {
        let without = code(result::mem_get_info());
        context.bind_to_thread()?;
        anyhow::Ok((without, code(result::mem_get_info())))
    });
    let (without, with) = elsewhere.join().map_err(|_| anyhow::anyhow!("it panicked"))??;
    ensure!(without == 201, "a thread without a context: {without}");
    ensure!(with == 0, "a thread with one: {with}");
    // The context that was pushed is current; after the pop the previous one is again.
    crate::user::without_context()?;
    // SAFETY: the context is retained by `user`.
    unsafe { sys::cuCtxPushCurrent_v2(user.context.cu_ctx()) }.result()?;
    ensure!(crate::user::current_context()? == user.context.cu_ctx().addr(), "pushed");
    let mut named = std::ptr::null_mut();
    // SAFETY: a stream of the user's, and a place for its context.
    unsafe { sys::cuStreamGetCtx(user.stream.cu_stream(), &mut named) }.result()?;
    ensure!(named == user.context.cu_ctx(), "a stream names another context");
    let mut popped = std::ptr::null_mut();
    // SAFETY: a place for what was pushed.
    unsafe { sys::cuCtxPopCurrent_v2(&mut popped) }.result()?;
    ensure!(crate::user::current_context()? == 0, "popped");
    Ok(Outcome::Passed(json!(null)))
}

fn capture(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let begin = || {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: a stream of this part.
        unsafe { result::stream::begin_capture(user.stream.cu_stream(), mode) }.context("a capture")
    };
    // SAFETY: ends the capture that was begun.
    let end = || code(unsafe { result::stream::end_capture(user.stream.cu_stream()) });
    let device = env.device;
    let allocate = move |relaxed: bool| {
        std::thread::spawn(move || {
            let context = cudarc::driver::CudaContext::new(device)?;
            context.bind_to_thread()?;
            let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            if relaxed {
                // SAFETY: a place for the mode.
                unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result()?;
            }
            // SAFETY: plain bytes, freed below.
            let memory = unsafe { result::malloc_sync(4096) };
            if let Ok(memory) = memory {
                // SAFETY: allocated just now.
                unsafe { result::free_sync(memory) }?;
            }
            anyhow::Ok(code(memory))
        })
        .join()
        .map_err(|_| anyhow::anyhow!("it panicked"))?
    };
    begin()?;
    let careful = allocate(true)?;
    let after = end();
    ensure!(careful == 0 && after == 0, "a relaxed thread: {careful}, the capture: {after}");
    begin()?;
    let careless = allocate(false)?;
    let after = end();
    ensure!(
        careless != 0 || after != 0,
        "a careless thread broke nothing: vmem's care would be idle"
    );
    Ok(Outcome::Passed(json!({"careless_allocation": careless, "its_capture": after})))
}

fn queue(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let device = user.allocate(64)?;
    // SAFETY: the memory is this part's, which waits below.
    unsafe { user.fill(device.address, 64, 0, &user.stream) }?;
    user.spin(SPIN * 3, &user.stream)?;
    let mut launched = 0_u64;
    let mut longest = Duration::ZERO;
    let begun = Instant::now();
    while begun.elapsed() < SPIN * 5 && launched < 5000 {
        let call = Instant::now();
        // SAFETY: as above.
        unsafe { user.add(device.address, 64, 1, &user.stream) }?;
        longest = longest.max(call.elapsed());
        launched += 1;
    }
    user.stream.synchronize()?;
    ensure!(device.read(&user.stream)?.iter().all(|&byte| byte == launched as u8), "each ran once");
    // That a call blocks where the queue is full is why vmem calls from threads of its own.
    Ok(Outcome::Passed(
        json!({"launched": launched, "longest_call_us": longest.as_micros() as u64}),
    ))
}

fn order(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let other = user.context.new_stream()?;
    let device = user.allocate(4096)?;
    let mut pinned = user.pinned(4096)?;
    user.spin(SPIN * 2, &user.stream)?;
    let begun = Instant::now();
    ensure!(up(device.address, pinned.bytes(), &other) == 0, "a copy on another stream");
    other.synchronize()?;
    let took = begun.elapsed();
    user.stream.synchronize()?;
    ensure!(took < SPIN, "a copy waited for a kernel of another stream: {took:?}");
    ensure!(down(pinned.bytes_mut(), device.address, &other) == 0, "and back");
    other.synchronize()?;
    Ok(Outcome::Passed(json!({"copy_beside_a_kernel_us": took.as_micros() as u64})))
}

/// The last thing that its process does with the device.
fn sticky(env: &Env) -> Result<Outcome> {
    static CALLED: AtomicBool = AtomicBool::new(false);
    unsafe extern "C" fn called(_: *mut c_void) {
        CALLED.store(true, Ordering::SeqCst);
    }
    let user = env.user()?;
    let stream = &user.stream;
    let notices = user.context.new_stream()?;
    let before = stream.record_event(None)?;
    before.synchronize()?;
    // So that the event is recorded before the error.
    user.spin(SPIN, stream)?;
    // SAFETY: it is no memory at all, which is what is tried.
    unsafe { user.fill(8, 64, 1, stream) }?;
    let event = stream.record_event(None)?;
    let waits = notices.wait(&event);
    let function = waits.and_then(|()| {
        let stream = notices.cu_stream();
        let nothing = std::ptr::null_mut();
        // SAFETY: the function needs no argument.
        unsafe { result::stream::launch_host_function(stream, called, nothing) }
    });
    let begun = Instant::now();
    let told = loop {
        match event.try_is_complete() {
            Ok(true) => anyhow::bail!("the event of a kernel that failed is complete"),
            Ok(false) => ensure!(begun.elapsed() < Duration::from_secs(20), "no error comes"),
            Err(error) => break code::<()>(Err(error)),
        }
        std::thread::yield_now();
    };
    ensure!(told == 700 || told == 719, "an illegal address: {told}");
    // All others of the context report it too; also those that were complete before.
    let of_before = code(before.try_is_complete());
    let of_copy = code(stream.record_event(None));
    ensure!(of_copy != 0, "work is accepted after an error that sticks");
    let drained = code(stream.synchronize());
    ensure!(drained != 0, "waiting says nothing of it");
    std::thread::sleep(Duration::from_millis(100));
    Ok(Outcome::Passed(json!({
        "code": told, "an_event_of_before": of_before, "host_function_accepted": function.is_ok(),
        "host_function_called": CALLED.load(Ordering::SeqCst),
    })))
}

/// Copies at random against a model, each backend operation with buffers of its own.
fn conformance(env: &Env) -> Result<Outcome> {
    use futures::stream::{FuturesUnordered, StreamExt};
    use rand::Rng;
    let capacity = env.scaled(64 * MIB, 8 * MIB) as u64;
    let opened = vmem_gpu::open_device(&GpuSelection::Device(env.device), Some(capacity))?;
    let device = opened.device.with_context(|| opened.reason.to_string())?;
    let device: &dyn DeviceBackend = &*device;
    ensure!(device.usage().capacity_bytes == capacity, "{:?}", device.usage());
    ensure!(device.reserve(capacity as usize + 1).is_none(), "more than there is");
    let steps = env.scaled(20_000, 1500);
    let mut rng = env.rng();
    let moved = AtomicU64::new(0);
    env.block_on(async {
        let mut live = Vec::new();
        for step in 0..steps {
            let len = rng.random_range(1..200 * KIB);
            while live.len() >= 32 {
                live.swap_remove(rng.random_range(0..live.len()));
            }
            let Some(range) = device.reserve(len) else {
                ensure!(!live.is_empty(), "no space in an empty device");
                live.clear();
                continue;
            };
            ensure!(range.address() % 256 == 0 && range.footprint() >= len as u64, "{range:?}");
            let range = std::sync::Arc::new(range);
            let seed = step as u8;
            // Zeros, and parts over them, at once: the lane keeps their order.
            let zeroed = device.zero(range.clone());
            let (from, to) = {
                let a = rng.random_range(0..=len);
                let b = rng.random_range(0..=len);
                (a.min(b), a.max(b))
            };
            let part: Vec<u8> = (from..to).map(|at| (at as u8) ^ seed).collect();
            let uploaded = device.upload(range.clone(), from, part.clone().into());
            zeroed.await?;
            uploaded.await?;
            let parts: FuturesUnordered<_> = [0..from, from..to, to..len]
                .into_iter()
                .map(|part| {
                    let into = IoBuf::from_vec(vec![0xEE; part.len() + 9]);
                    let down = device.download(range.clone(), part.start, part.len(), into, 4);
                    async move { (part, down.await) }
                })
                .collect();
            for (range, (into, outcome)) in parts.collect::<Vec<_>>().await {
                outcome?;
                let inside = from <= range.start && range.end <= to && !range.is_empty();
                let right = into[4..4 + range.len()].iter().enumerate().all(|(at, &byte)| {
                    let at = range.start + at;
                    byte == if inside && at >= from && at < to { (at as u8) ^ seed } else { 0 }
                });
                ensure!(right, "step {step}: {range:?}");
                let around = into[..4].iter().chain(&into[4 + range.len()..]);
                ensure!(around.copied().all(|byte| byte == 0xEE), "step {step}: beside the buffer");
                moved.fetch_add(range.len() as u64, Ordering::Relaxed);
            }
            let outside = device.upload(range.clone(), len, vec![1].into()).await;
            ensure!(matches!(outside, Err(DeviceError::Failed { .. })), "outside: {outside:?}");
            live.push(range);
        }
        live.clear();
        ensure!(device.usage().used_bytes == 0, "{:?}", device.usage());
        device.close().await?;
        let closed = device.reserve(10).map(std::sync::Arc::new);
        if let Some(range) = closed {
            ensure!(matches!(device.zero(range).await, Err(DeviceError::Closed)), "after its end");
        }
        Ok(())
    })?;
    Ok(Outcome::Passed(json!({"steps": steps, "compared_bytes": moved.into_inner()})))
}
