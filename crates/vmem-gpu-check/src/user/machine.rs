//! What others in the process do, and what the machine is.
//!
//! Invariant: whatever another library would do here is undone when a call returns. Called by the
//! parts.

#![allow(unsafe_code)]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cudarc::driver::{CudaContext, result, sys};
use libloading::Library;

use super::{Env, User};

/// Captures graphs, allocates and frees like a careless library, until it is stopped. Returns how
/// many captures succeeded.
///
/// # Errors
///
/// If a capture was broken by another thread.
pub(crate) fn capture_until(device: usize, stop: &AtomicBool) -> Result<usize> {
    let user = User::new(device)?;
    let memory = user.allocate(4096)?;
    let mut captures = 0;
    while !stop.load(Ordering::SeqCst) {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: a stream of this thread's own.
        unsafe { result::stream::begin_capture(user.stream.cu_stream(), mode) }
            .context("a capture")?;
        std::thread::sleep(Duration::from_millis(2));
        // SAFETY: the capture that was begun.
        let graph = unsafe { result::stream::end_capture(user.stream.cu_stream()) };
        graph.context("another thread broke the capture")?;
        captures += 1;
        drop(user.allocate(8192)?);
        // SAFETY: memory of this function, which waits below.
        unsafe { user.fill(memory.address, memory.len, 1, &user.stream) }?;
        user.stream.synchronize()?;
    }
    Ok(captures)
}

/// The context of this thread; 0 if it has none.
///
/// # Errors
///
/// What the driver says.
pub(crate) fn current_context() -> Result<usize> {
    let current = result::ctx::get_current().context("the current context")?;
    Ok(current.map_or(0, |context| context.addr()))
}

/// This thread has no context from now on.
///
/// # Errors
///
/// What the driver says.
pub(crate) fn without_context() -> Result<()> {
    // SAFETY: null is no context.
    unsafe { result::ctx::set_current(std::ptr::null_mut()) }.context("leaving the context")
}

/// The driver, for functions that cudarc does not have in the form of every version.
///
/// # Errors
///
/// Why it does not load.
pub(super) fn driver() -> std::result::Result<&'static Library, String> {
    let mut refused = String::new();
    // In the order of cudarc; the emulated one has the first name.
    for name in ["libcuda.so", "libcuda.so.1"] {
        // SAFETY: the driver, which is loaded already.
        match unsafe { Library::new(name) } {
            // For the life of the process, as the driver itself.
            Ok(library) => return Ok(Box::leak(Box::new(library))),
            Err(error) => refused = error.to_string(),
        }
    }
    Err(refused)
}

/// Processor time of this process so far.
///
/// # Errors
///
/// What the system says.
pub(crate) fn processor_time() -> Result<Duration> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: a place for the result.
    let told = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
    ensure!(told == 0, "asking for processor time");
    // SAFETY: it was filled in.
    let usage = unsafe { usage.assume_init() };
    let time = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64)
    };
    Ok(time(usage.ru_utime) + time(usage.ru_stime))
}

/// How the card is called, and which driver it has.
///
/// # Errors
///
/// What the driver says.
pub(crate) fn describe(env: &Env) -> Result<serde_json::Value> {
    let context = CudaContext::new(env.device).context("a context")?;
    let name = context.name().context("its name")?;
    let mut version = 0;
    // SAFETY: a place for the number.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().context("the driver's version")?;
    context.bind_to_thread()?;
    let (free, total) = result::mem_get_info().context("its memory")?;
    let module = Path::new("/proc/driver/nvidia/version");
    let module = std::fs::read_to_string(module).unwrap_or_default();
    let module = module.lines().next().unwrap_or_default().to_owned();
    Ok(serde_json::json!({
        "card": name, "cuda": version, "driver": module, "free_bytes": free, "total_bytes": total,
    }))
}
