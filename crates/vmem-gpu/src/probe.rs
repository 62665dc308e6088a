//! Whether there is a CUDA driver that has everything that is needed here.
//!
//! Invariant: nothing of cudarc is called before each function that it may look up was found: it
//! panics over one that is missing. Nothing that cudarc has only where it loads the driver itself
//! is used, for beside crates such as candle it is linked (`checks/cudarc-union`). Called when a
//! store is opened.

#![allow(unsafe_code)]

use std::fmt::Write;
use std::panic::{UnwindSafe, catch_unwind};

use libloading::Library;

/// The names of the driver, in the order in which cudarc tries those that exist.
#[cfg(not(windows))]
const NAMES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];
#[cfg(windows)]
const NAMES: [&str; 1] = ["nvcuda.dll"];

/// Every function of the driver that this crate reaches, through cudarc or directly.
const FUNCTIONS: [&str; 47] = [
    "cuCtxGetCurrent",
    "cuCtxGetStreamPriorityRange",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetUuid",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchHostFunc",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamCreate",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamGetCtx",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuThreadExchangeStreamCaptureMode",
];

/// Looks for the driver and for its functions.
///
/// # Errors
///
/// What is missing, in words.
pub(crate) fn find_driver() -> Result<(), String> {
    let mut refused = String::new();
    for name in NAMES {
        // SAFETY: loading the driver runs its initialisers, which the user asks for by opening a
        // store on a GPU.
        match unsafe { Library::new(name) } {
            Ok(library) => return check(&library, name),
            Err(error) => {
                // What the loader said, which names the file; the error itself does not.
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                let cause = cause.unwrap_or_else(|| format!("{name}: {error}"));
                let _ = write!(refused, "{}{cause}", if refused.is_empty() { "" } else { "; " });
            }
        }
    }
    Err(format!("no CUDA driver: {refused}"))
}

/// The driver that is loaded.
pub(crate) fn loaded() -> Option<Library> {
    // SAFETY: its initialisers have run.
    NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok())
}

fn check(library: &Library, name: &str) -> Result<(), String> {
    let missing = |function: &&&str| {
        // SAFETY: the symbol is looked up and never used.
        unsafe { library.get::<*const ()>(function.as_bytes()) }.is_err()
    };
    let missing: Vec<_> = FUNCTIONS.iter().filter(missing).copied().collect();
    match missing.is_empty() || vmem_core::planted!("probe-symbols") {
        true => Ok(()),
        false => Err(format!("the CUDA driver {name} is too old: it lacks {}", missing.join(", "))),
    }
}

/// Calls the driver for the first time. A panic of cudarc, over a library that it finds and we do
/// not, is an error like another.
///
/// # Errors
///
/// What `work` says, or the text of its panic.
pub(crate) fn guarded<T>(
    work: impl FnOnce() -> Result<T, String> + UnwindSafe,
) -> Result<T, String> {
    catch_unwind(work).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("the CUDA driver cannot be used: {}", text.unwrap_or("no reason given")))
    })
}
