//! A driver that moves no more than a given number of bytes a second.
//!
//! Invariant: the end of each call is computed from the end of the previous one, not from when that
//! was noticed, so that the coarse ticks of the timer do not reduce the rate. Called by tests of
//! slow disks over real drivers; a simulated disk has a bandwidth of its own.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};
use vmem_io::driver::Driver;

use super::{After, Around, Hook, OpKind, Span};

/// A driver whose reads and writes share a bandwidth, first come first served.
pub type ThrottleDriver = Around<Throttle>;

/// The hook of [`ThrottleDriver`].
#[derive(Debug)]
pub struct Throttle {
    state: Mutex<Pace>,
}

#[derive(Debug)]
struct Pace {
    bytes_per_second: u64,
    free_at: Option<Instant>,
}

impl ThrottleDriver {
    /// Holds `inner` to `bytes_per_second`, taken for 1 where it is 0.
    pub fn new(inner: Arc<dyn Driver>, bytes_per_second: u64) -> Arc<Self> {
        let state = Mutex::new(Pace { bytes_per_second, free_at: None });
        Around::with_hook(inner, Throttle { state })
    }

    /// Changes the rate for the calls that come.
    pub fn set_bytes_per_second(&self, bytes_per_second: u64) {
        self.hook.state.lock().bytes_per_second = bytes_per_second;
    }
}

impl Hook for Throttle {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn start(&self, kind: OpKind, spans: &[Span]) -> After {
        if !matches!(kind, OpKind::Read | OpKind::Write) {
            return Box::new(|_| Box::pin(async {}));
        }
        let bytes: u64 = spans.iter().map(|span| span.len).sum();
        let mut pace = self.state.lock();
        let rate = u128::from(pace.bytes_per_second.max(1));
        let nanos = (u128::from(bytes) * 1_000_000_000).div_ceil(rate);
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX / 2));
        let now = Instant::now();
        let end = pace.free_at.map_or(now, |free| free.max(now)) + takes;
        pace.free_at = Some(end);
        Box::new(move |_| Box::pin(sleep_until(end)))
    }
}
