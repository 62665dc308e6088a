//! Pins and prefetches, each with an end.
//!
//! Invariant: a pin ends by its time, by DELETE, with its version of the object, or with the
//! service; none keeps an object that no name leads to. A prefetch ends by its time. Called by
//! `routes`; `put` reports changes of names.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use vmem::{MemoryTier, PinGuard};

use crate::error::ApiError;
use crate::list::query;
use crate::name::Name;
use crate::state::App;

/// How long a pin is kept unless the request says so, in seconds.
const PIN_SECONDS: u64 = 60;

/// The pins by the names of their objects.
#[derive(Debug)]
pub(crate) struct Pins {
    table: Mutex<BTreeMap<String, Pinned>>,
    slots: Arc<Semaphore>,
}

#[derive(Debug)]
struct Pinned {
    told: Told,
    object: u64,
    timer: JoinHandle<()>,
    _guard: PinGuard,
    _slot: OwnedSemaphorePermit,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.timer.abort();
    }
}

/// A pin, as it is listed.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Told {
    name: String,
    tier: String,
    etag: String,
    until: String,
}

/// The query of a pin or a prefetch.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wanted {
    #[serde(default = "host")]
    tier: String,
    seconds: Option<u64>,
}

fn host() -> String {
    MemoryTier::Host.to_string()
}

impl Wanted {
    fn tier(&self) -> Result<MemoryTier, ApiError> {
        let why = || ApiError::bad_request("invalid_query", "tier is host, vram or disk");
        self.tier.parse().map_err(|_| why())
    }

    /// For how long, up to `max`.
    fn time(&self, default: Duration, max: Duration) -> Result<Duration, ApiError> {
        let time = self.seconds.map_or(default.min(max), Duration::from_secs);
        if time.is_zero() || time > max {
            let why = format!("seconds are from 1 to {}", max.as_secs());
            return Err(ApiError::bad_request("invalid_query", why));
        }
        Ok(time)
    }
}

impl Pins {
    pub(crate) fn new(max: usize) -> Self {
        Pins { table: Mutex::default(), slots: Arc::new(Semaphore::new(max)) }
    }

    /// Ends the pin of a version that has the name no more.
    pub(crate) fn release_replaced(&self, name: &str, current: Option<u64>) {
        let mut table = self.table.lock();
        let is_other = table.get(name).is_some_and(|pinned| Some(pinned.object) != current);
        let ended = if is_other { table.remove(name) } else { None };
        drop(table);
        drop(ended);
    }

    /// Ends a pin. Whether there was one.
    fn release(&self, name: &str) -> bool {
        let ended = self.table.lock().remove(name);
        ended.is_some()
    }

    /// Ends all.
    pub(crate) fn release_all(&self) {
        let ended = std::mem::take(&mut *self.table.lock());
        drop(ended);
    }
}

/// Pins an object, for a time.
pub(crate) async fn pin(
    State(app): State<App>,
    name: Name,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<Json<Told>, ApiError> {
    let wanted = query(wanted)?;
    let tier = wanted.tier()?;
    let time = wanted.time(Duration::from_secs(PIN_SECONDS), app.limits.max_pin)?;
    let full = |_| ApiError::unavailable("too_many_pins", "there are all the pins there may be");
    let slot = app.pins.slots.clone().try_acquire_owned().map_err(full)?;
    let (handle, entry) = app.vmem.open_entry(name.as_str()).await?;
    let guard = app.vmem.pin(&handle, tier).await?;
    let told = Told {
        name: name.as_str().to_owned(),
        tier: tier.to_string(),
        etag: format!("\"{}\"", entry.version),
        until: httpdate::fmt_http_date(SystemTime::now() + time),
    };
    let pins = Arc::downgrade(&app.pins);
    let key = told.name.clone();
    let timer = tokio::spawn(async move {
        tokio::time::sleep(time).await;
        if let Some(pins) = pins.upgrade() {
            pins.release(&key);
        }
    });
    let pinned =
        Pinned { told: told.clone(), object: handle.id(), timer, _guard: guard, _slot: slot };
    let before = app.pins.table.lock().insert(told.name.clone(), pinned);
    drop(before);
    // The name may have gone to another version before the table had this pin.
    let current = app.vmem.open_entry(name.as_str()).await.ok().map(|(now, _)| now.id());
    app.pins.release_replaced(name.as_str(), current);
    Ok(Json(told))
}

/// Lists the pins.
pub(crate) async fn pins(State(app): State<App>) -> Json<Vec<Told>> {
    Json(app.pins.table.lock().values().map(|pinned| pinned.told.clone()).collect())
}

/// Ends a pin.
pub(crate) async fn unpin(State(app): State<App>, name: Name) -> Result<StatusCode, ApiError> {
    if app.pins.release(name.as_str()) {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(ApiError::new(StatusCode::NOT_FOUND, "not_pinned", "no pin is on this name"))
}

/// Begins to promote an object; it goes on behind the answer, for a time.
pub(crate) async fn prefetch(
    State(app): State<App>,
    name: Name,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<StatusCode, ApiError> {
    let wanted = query(wanted)?;
    let tier = wanted.tier()?;
    let max = app.limits.prefetch_timeout;
    let time = wanted.time(max, max)?;
    let full = |_| ApiError::unavailable("busy", "there are all the prefetches there may be");
    let slot = app.prefetches.clone().try_acquire_owned().map_err(full)?;
    let handle = app.vmem.open_named(name.as_str()).await?;
    let prefetch = app.vmem.prefetch(&handle, tier);
    tokio::spawn(async move {
        let _slot = slot;
        match tokio::time::timeout(time, prefetch).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, name = name.as_str(), "no prefetch"),
            Err(_) => tracing::debug!(name = name.as_str(), "a prefetch took too long"),
        }
    });
    Ok(StatusCode::ACCEPTED)
}
