//! Sets of objects that are read together, all or none.
//!
//! Ownership: while the task waits for space it holds nothing; what it was granted is enough for
//! each object that it then reads, so it never waits for space again. Called by `read_many`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{StreamExt, TryStreamExt};

use super::{Job, fetch_with};
use crate::copy::{Found, OwnedCopy};
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::latency;
use crate::object::{Object, Shared};
use crate::parcel::{SetAside, parcel_on};
use crate::tier::Need;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

impl SetAside for Vec<Bytes> {
    fn is_shared(&self) -> bool {
        true
    }
}

/// Reads of one set that are in flight at once.
const IN_FLIGHT_MAX: usize = 64;

/// Reads the bytes of each object, in order. Each object comes with whether it is promoted. The
/// caller will hold `to_hold` bytes, which count towards `max_held`.
pub(crate) async fn read_set(
    shared: Arc<Shared>,
    objects: Arc<[(Arc<Object>, bool)]>,
    to_hold: u64,
    deadline: Deadline,
) -> Result<Vec<Bytes>> {
    let _promise = shared.promise(to_hold, &deadline).await?;
    // The first try has space for the objects that are missing; if one was evicted meanwhile, the
    // second has space for all.
    match read_granted(&shared, &objects, deadline, false).await {
        Err(VirtualMemoryError::TierFull { .. }) => {
            read_granted(&shared, &objects, deadline, true).await
        }
        outcome => outcome,
    }
}

async fn read_granted(
    shared: &Arc<Shared>,
    objects: &[(Arc<Object>, bool)],
    deadline: Deadline,
    for_all: bool,
) -> Result<Vec<Bytes>> {
    let mut seen = HashSet::new();
    let distinct: Vec<_> = objects.iter().filter(|(object, _)| seen.insert(object.id)).collect();
    let missing: Vec<_> = distinct
        .iter()
        .map(|(object, _)| object)
        .filter(|object| object.len > 0 && (for_all || !object.has_host_space()))
        .map(|object| (object.len, object.id))
        .collect();
    let mut spaces = granted(shared, &missing, &deadline).await?;
    let mut reads = Vec::with_capacity(distinct.len());
    for (object, stay) in distinct {
        let taken = spaces.remove(&object.id);
        let id = object.id;
        let object = object.clone();
        let stay = *stay;
        reads.push(async move { read_one(object, stay, taken, deadline).await.map(|b| (id, b)) });
    }
    let reads = futures::stream::iter(reads).buffer_unordered(IN_FLIGHT_MAX);
    let all: HashMap<u64, Bytes> = reads.try_collect().await?;
    Ok(objects.iter().map(|(object, _)| all[&object.id].clone()).collect())
}

async fn granted(
    shared: &Arc<Shared>,
    missing: &[(usize, u64)],
    deadline: &Deadline,
) -> Result<HashMap<u64, OwnedCopy>> {
    if missing.is_empty() || crate::planted!("set-holds") {
        return Ok(HashMap::new());
    }
    let need = Need::set(missing.iter().copied());
    let spaces = shared.host_spaces_or_error(&need, deadline).await?;
    Ok(missing.iter().map(|&(_, id)| id).zip(spaces).collect())
}

async fn read_one(
    object: Arc<Object>,
    stay: bool,
    taken: Option<OwnedCopy>,
    deadline: Deadline,
) -> Result<Bytes> {
    if let Some(damage) = object.damage() {
        return Err(damage);
    }
    if let Found::Copy(guard) = object.copy.acquire(&object.shared.copies) {
        object.touch();
        return Ok(guard.into_bytes());
    }
    // Others may join this read. It joins no other, since that may wait for space, and this one
    // does not.
    let (delivery, flight) = parcel_on(latency::current());
    let mut delivery = Some(delivery);
    let (_, started) = object.join_or_start(|| flight.clone());
    if !started {
        delivery = None;
    }
    let mut job = Job::new(object.clone(), MigrationCause::Read, deadline);
    // An object that was resident and has been evicted fails instead of waiting for space, since
    // others of the set have space.
    (job.stay, job.may_spill) = (stay, taken.is_none());
    let outcome = fetch_with(&job, taken).await;
    if let Some(delivery) = delivery {
        object.end_flight(&flight.downgrade());
        drop(flight);
        let counted = outcome.is_ok().then_some(&object.shared.unclaimed);
        drop(delivery.deliver(outcome.clone(), counted));
    }
    outcome
}
