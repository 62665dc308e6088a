//! The limit of a wait for a device. Called by the tier.

use std::pin::pin;
use std::time::Duration;

use futures::future::{Either, select};
use futures_timer::Delay;

/// Waits for a device, which takes real time, also where a test has paused the clock of its
/// runtime.
pub(crate) async fn in_real_time<T>(limit: Duration, wait: impl Future<Output = T>) -> Option<T> {
    // A wait without end is a century.
    let limit = limit.min(Duration::from_secs(100 * 365 * 24 * 3600));
    match select(pin!(wait), Delay::new(limit)).await {
        Either::Left((output, _)) => Some(output),
        Either::Right(_) => None,
    }
}
