//! Timers that write back what has been on a device alone for long enough.
//!
//! Invariant: an object has one timer at most, which keeps nothing but the little that the object
//! itself takes; it sleeps until the earliest moment that was asked for, waits for a lease with
//! nothing in its hands, and takes a turn for the copy alone. One that has failed tries again, one
//! of a version that is lost ends. Set by `kernel.rs`.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::write_back_from_device;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::object::Object;
use crate::task::spawn_named;

/// Before a timer tries again what has failed, at first; twice as long each time.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// The longest such backoff.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// How long a timer sleeps before it looks whether its object still is.
const LOOK_MAX: Duration = Duration::from_secs(60);
/// Longer than anybody waits, and short enough to be added to a time.
const PAUSE_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Has an object written back once it has been on a device alone for so long, or earlier.
pub(crate) fn write_back_after(object: &Arc<Object>, pause: Duration) {
    let due = Instant::now() + pause.min(PAUSE_MAX);
    if let Some(earlier) = object.set_due(due) {
        let runtime = object.shared.runtime.clone();
        let object = Arc::downgrade(object);
        drop(spawn_named(&runtime, "vmem-write-back", run(object, due, earlier)));
    }
}

async fn run(object: Weak<Object>, mut due: Instant, earlier: Arc<Notify>) {
    let mut backoff = RETRY_MIN;
    loop {
        let look = Instant::now() + LOOK_MAX;
        tokio::select! {
            biased;
            () = earlier.notified() => {}
            () = tokio::time::sleep_until(due.min(look)) => {}
        }
        let Some(object) = object.upgrade().filter(|object| !object.shared.is_closed()) else {
            return;
        };
        let Some(next) = object.timer_due() else { return };
        due = next;
        if due > Instant::now() {
            continue;
        }
        match write_back(&object).await {
            Ok(true) => backoff = RETRY_MIN,
            Ok(false) => {}
            Err(error) => {
                let handle = object.id;
                tracing::debug!(target: "vmem::migration", handle, %error, "it is tried again");
                object.postpone(due, Instant::now() + backoff);
                backoff = (2 * backoff).min(RETRY_MAX);
            }
        }
    }
}

/// Writes it back, in a task of the store. False if something else changes it first.
async fn write_back(object: &Arc<Object>) -> Result<bool, VirtualMemoryError> {
    let deadline = object.shared.deadline();
    if object.is_changing() {
        return object.gate_opened(&deadline).await.map(|()| false);
    }
    let turn = object.shared.timer_turns.acquire().await;
    let _turn = turn.map_err(|_| VirtualMemoryError::Closed)?;
    let Some(pass) = object.try_gate() else { return Ok(false) };
    let (ended, outcome) = oneshot::channel();
    object.shared.spawn("vmem-write-back", async move {
        let written = write_back_from_device(&pass, MigrationCause::WriteBack, &deadline).await;
        drop(pass);
        let _ = ended.send(written);
    });
    outcome.await.unwrap_or(Err(VirtualMemoryError::Closed)).map(|()| true)
}
