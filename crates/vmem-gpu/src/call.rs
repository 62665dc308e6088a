//! A call over device memory of a caller: the copies that have begun, and whether more may begin.
//!
//! Invariant: no copy begins once the call was cancelled, and the cancelling side knows of each
//! copy that has begun. Called by the gathers, and by the lane that copies for them.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{DriverError, sys};
use parking_lot::{Mutex, MutexGuard};

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
#[derive(Debug, Default)]
pub(crate) struct Call(Mutex<State>);

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
        let mut state = self.0.0.lock();
        assert!(state.in_flight > 0, "what ends has begun");
        state.in_flight -= 1;
    }
}

impl Foreign {
    /// A copy on `len` bytes at `offset` begins. The call is not cancelled while the guard lives.
    ///
    /// # Errors
    ///
    /// Not permitted if the call was cancelled; an invalid value outside of the memory.
    pub(crate) fn enter(
        &self,
        offset: usize,
        len: usize,
        entered: &mut Option<Entered>,
    ) -> Result<MutexGuard<'_, State>, DriverError> {
        let mut state = self.call.0.lock();
        if state.cancelled {
            return Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_PERMITTED));
        }
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE));
        }
        state.in_flight += 1;
        *entered = Some(Entered(self.call.clone()));
        Ok(state)
    }
}

impl Call {
    /// Lets nothing more begin. Where copies are in flight, `order` puts the caller's work behind
    /// them; if it cannot, this waits for their ends.
    /// True if it was put behind any.
    pub(crate) fn cancel(&self, order: impl FnOnce() -> bool) -> bool {
        let mut state = self.0.lock();
        state.cancelled = true;
        if state.in_flight == 0 || vmem_core::planted!("gather-cancel") {
            return false;
        }
        if order() {
            return true;
        }
        drop(state);
        while self.0.lock().in_flight > 0 {
            std::thread::sleep(LOOK_PAUSE);
        }
        false
    }
}
