//! Completions that come late, and out of order.
//!
//! Invariant: the delays are drawn in the order of the calls, so that one seed gives each call the
//! same delay whatever the completions do. Called by tests of races and reordering.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use tokio::time::sleep;
use vmem_io::driver::Driver;

use super::{After, Around, Hook, OpKind, Span};
use crate::Seed;

/// A driver whose completions each come a random time after the operation has ended.
pub type DelayDriver = Around<Delay>;

/// The hook of [`DelayDriver`].
#[derive(Debug)]
pub struct Delay {
    state: Mutex<(SmallRng, Range<Duration>)>,
}

impl DelayDriver {
    /// Delays each completion of `inner` by a time from `delays`.
    pub fn new(inner: Arc<dyn Driver>, seed: Seed, delays: Range<Duration>) -> Arc<Self> {
        let state = Mutex::new((seed.rng(), delays));
        Around::with_hook(inner, Delay { state })
    }

    /// Draws the delays of later calls from another range; an empty one is no delay.
    pub fn set_delays(&self, delays: Range<Duration>) {
        self.hook.state.lock().1 = delays;
    }
}

impl Hook for Delay {
    fn name(&self) -> &'static str {
        "delay"
    }

    fn start(&self, _kind: OpKind, _spans: &[Span]) -> After {
        let (rng, delays) = &mut *self.state.lock();
        let delay = match delays.is_empty() {
            true => delays.start,
            false => rng.random_range(delays.clone()),
        };
        Box::new(move |_| Box::pin(sleep(delay)))
    }
}
