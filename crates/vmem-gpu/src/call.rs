//! A call over device memory of a caller: the copies that have begun, and whether more may begin.
//!
//! Invariant: no copy begins once the call was cancelled, and the cancelling side knows of each
//! copy that has begun. Called by the gathers, and by the lane that copies for them.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{DriverError, sys};
use parking_lot::{Mutex, MutexGuard};

use crate::owner::Held;

/// Between two looks at copies for which the caller has to wait itself.
const LOOK_PAUSE: Duration = Duration::from_micros(50);

/// Device memory of a caller, which promised that it stays until the call has ended.
#[derive(Clone, Debug)]
pub(crate) struct Foreign {
    pub(crate) address: u64,
    pub(crate) len: usize,
    pub(crate) call: Arc<Call>,
}

/// One call over memory of a caller.
#[derive(Debug)]
pub(crate) struct Call {
    state: Mutex<State>,
    /// So a copy that has begun keeps the memory, where that was handed over.
    _owner: Option<Arc<Held>>,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// The caller has gone: what was not begun is not begun any more.
    cancelled: bool,
    /// Copies that have begun and not ended.
    in_flight: usize,
}

/// A copy that has begun, until it has ended.
#[derive(Debug)]
pub(crate) struct Entered(Arc<Call>);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        assert!(state.in_flight > 0, "what ends has begun");
        state.in_flight -= 1;
    }
}

impl Foreign {
    /// Whether `len` bytes at `offset` lie within the memory.
    ///
    /// # Errors
    ///
    /// An invalid value.
    pub(crate) fn check(&self, offset: usize, len: usize) -> Result<(), DriverError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE)),
        }
    }
}

/// A call that is not cancelled while this lives.
pub(crate) struct Open<'a> {
    call: &'a Arc<Call>,
    state: MutexGuard<'a, State>,
}

impl<'a> Open<'a> {
    /// Only one thread opens several calls at once.
    pub(crate) fn of(call: &'a Arc<Call>) -> Self {
        Open { call, state: call.state.lock() }
    }

    pub(crate) fn is_of(&self, call: &Arc<Call>) -> bool {
        Arc::ptr_eq(self.call, call)
    }

    /// Whether a copy may begin.
    ///
    /// # Errors
    ///
    /// Not permitted if the call was cancelled.
    pub(crate) fn check(&self) -> Result<(), DriverError> {
        match self.state.cancelled {
            true => Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_PERMITTED)),
            false => Ok(()),
        }
    }

    /// A copy begins, before this ends.
    ///
    /// # Errors
    ///
    /// Not permitted if the call was cancelled.
    pub(crate) fn begin(&mut self) -> Result<Entered, DriverError> {
        self.check()?;
        self.state.in_flight += 1;
        Ok(Entered(self.call.clone()))
    }
}

impl Call {
    /// A call over memory that `owner` keeps, if the caller does not.
    pub(crate) fn over(owner: Option<Arc<Held>>) -> Arc<Self> {
        Arc::new(Call { state: Mutex::default(), _owner: owner })
    }

    /// Lets nothing more begin. Where copies are in flight, `order` puts the caller's work behind
    /// them; if it cannot, this waits for their ends.
    /// True if it was put behind any.
    pub(crate) fn cancel(&self, order: impl FnOnce() -> bool) -> bool {
        let mut state = self.state.lock();
        state.cancelled = true;
        if state.in_flight == 0 || vmem_core::planted!("gather-cancel") {
            return false;
        }
        if !vmem_core::planted!("gather-blocks") && order() {
            return true;
        }
        drop(state);
        while self.state.lock().in_flight > 0 {
            std::thread::sleep(LOOK_PAUSE);
        }
        false
    }
}
