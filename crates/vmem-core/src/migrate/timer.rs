//! Timers that write back what has been on a device alone for long enough.
//!
//! Invariant: an object has one timer at most, which keeps nothing but the little that the object
//! itself takes; it waits for a lease with nothing in its hands, and takes a turn for the copy
//! alone. One that has failed tries again, one of a version that is lost ends. Set by `kernel.rs`.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::write_back_from_device;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::object::Object;
use crate::task::spawn_named;

/// Before a timer tries again what has failed.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// How long a timer sleeps before it looks whether its object still is.
const LOOK_MAX: Duration = Duration::from_secs(60);
/// Longer than anybody waits, and short enough to be added to a time.
const PAUSE_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Has an object written back once it has been on a device alone for so long.
pub(crate) fn write_back_after(object: &Arc<Object>, pause: Duration) {
    if !object.sets_timer() {
        return;
    }
    let pause = pause.min(PAUSE_MAX);
    let runtime = object.shared.runtime.clone();
    let object = Arc::downgrade(object);
    drop(spawn_named(&runtime, "vmem-write-back", run(object, pause)));
}

async fn run(object: Weak<Object>, pause: Duration) {
    let mut not_before = Instant::now() + pause;
    loop {
        let now = Instant::now();
        tokio::time::sleep_until(not_before.min(now + LOOK_MAX)).await;
        let Some(object) = object.upgrade().filter(|object| !object.shared.is_closed()) else {
            return;
        };
        let Some(due) = object.timer_due(pause) else { return };
        not_before = due.max(not_before);
        if not_before > Instant::now() {
            continue;
        }
        if let Err(error) = write_back(&object).await {
            let handle = object.id;
            tracing::debug!(target: "vmem::migration", handle, %error, "it is tried again");
            not_before = Instant::now() + pause.max(RETRY_MIN);
        }
    }
}

/// Writes it back, in a task of the store.
async fn write_back(object: &Arc<Object>) -> Result<(), VirtualMemoryError> {
    let deadline = object.shared.deadline();
    if object.is_changing() {
        return object.gate_opened(&deadline).await;
    }
    let turn = object.shared.timer_turns.acquire().await;
    let _turn = turn.map_err(|_| VirtualMemoryError::Closed)?;
    let Some(pass) = object.try_gate() else { return Ok(()) };
    let (ended, outcome) = oneshot::channel();
    object.shared.spawn("vmem-write-back", async move {
        let written = write_back_from_device(&pass, MigrationCause::WriteBack, &deadline).await;
        drop(pass);
        let _ = ended.send(written);
    });
    outcome.await.unwrap_or(Err(VirtualMemoryError::Closed))
}
