//! What the current tokio runtime offers to a store.
//!
//! Invariant: what is missing is a typed error with the remedy, and nothing is printed. Called when
//! a store opens, and by drivers that try what the runtime has.
//!
//! tokio says by a panic alone that a runtime has no timer or no I/O driver (there is a request for
//! a question that can be asked, tokio-rs/tokio#8361). The panic is caught here, and for that
//! moment a filter in front of the process's panic hook keeps it from being printed; every other
//! panic passes. Where panics abort the process nothing is tried, and tokio speaks for itself
//! later.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::error::VirtualMemoryError;

/// The runtime to which the caller belongs.
///
/// # Errors
///
/// [`UnsuitableRuntime`](VirtualMemoryError::UnsuitableRuntime) outside of a runtime.
///
/// ```
/// assert!(vmem_core::backend::current_runtime().is_err());
/// ```
pub fn current_runtime() -> Result<Handle, VirtualMemoryError> {
    Handle::try_current().map_err(|_| VirtualMemoryError::UnsuitableRuntime {
        missing: "this is not inside of a tokio runtime",
        remedy: "call it from a task, or inside of `Runtime::block_on` or `Runtime::enter`",
    })
}

/// Whether the current runtime can carry a store: it has a timer. An I/O driver is not needed.
///
/// # Errors
///
/// [`UnsuitableRuntime`](VirtualMemoryError::UnsuitableRuntime) with what is missing.
pub fn check_runtime() -> Result<(), VirtualMemoryError> {
    current_runtime()?;
    if cfg!(panic = "abort") {
        return Ok(());
    }
    // It is bound to the timer when it is made, and never polled.
    let probed = quietly(|| drop(tokio::time::sleep(Duration::ZERO)));
    probed.ok_or(VirtualMemoryError::UnsuitableRuntime {
        missing: "the tokio runtime has no timer",
        remedy: "build it with `enable_time` or `enable_all`",
    })
}

thread_local! {
    /// Whether this thread tries something that may panic.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Does something that tells by a panic that it cannot be done. Afterwards the hook is what it was.
/// None if `work` panicked, which is not printed. Not to be nested: one at a time in a process.
#[doc(hidden)]
pub fn quietly<T>(work: impl FnOnce() -> T) -> Option<T> {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock();
    // A thread that unwinds may not change the hook, and is not silenced then.
    let filter = (!thread::panicking()).then(Filter::put);
    QUIET.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(false);
    if let Some(filter) = filter {
        filter.take_away();
    }
    outcome.ok()
}

type Hook = Box<dyn Fn(&PanicHookInfo<'_>) + Send + Sync>;

/// A filter in front of the previous hook.
struct Filter {
    hook: Arc<Hook>,
    /// Where the filter is, to recognise a hook that is set meanwhile.
    address: *const (),
}

impl Filter {
    fn put() -> Self {
        let hook = Arc::new(take_hook());
        let passed = Arc::clone(&hook);
        let filter: Hook = Box::new(move |panic| {
            if !QUIET.try_with(Cell::get).unwrap_or(false) {
                passed(panic);
            }
        });
        let address = address_of(&filter);
        set_hook(filter);
        Filter { hook, address }
    }

    fn take_away(self) {
        let now = take_hook();
        if address_of(&now) != self.address {
            // Other code has set a hook, which may well call the filter.
            return set_hook(now);
        }
        drop(now);
        match Arc::try_unwrap(self.hook) {
            Ok(hook) => set_hook(hook),
            Err(shared) => set_hook(Box::new(move |panic| shared(panic))),
        }
    }
}

fn address_of(hook: &Hook) -> *const () {
    std::ptr::from_ref(&**hook).cast()
}
