//! Taking leases of one object or of several, all or none.
//!
//! Invariant: nothing is kept while space, a budget, a change or a kernel is waited for. With the
//! space for all missing objects their bytes are loaded, and each object is held once it is loaded.
//! Then all are taken in one step that waits for nothing; or none is, and the task waits for what
//! was in the way. So sets that want each other's objects never stand still, and a reader that
//! holds an object already gets it again even if a writer waits for it. Run as a task; called by
//! the leases.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::Result;
use super::lease::{Claim, LEASE, Taken, Turn, VramChange, VramHold, VramSet};
use super::lease_request::{LeaseRequest, Obstacle, wait};
use super::pin::{HoldGuard, Prepaid};
use crate::copy::OwnedCopy;
use crate::deadline::Deadline;
use crate::device::{DeviceRange, UseEnd};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::handle::VMemHandle;
use crate::migrate::{COPY_PAUSE, COPY_TRIES, Job, fill_device, write_back_from_device};
use crate::object::{GatePass, Object, Shared};
use crate::tier::{Device, DeviceSpace, Grant, HoldKind, Need};

/// Takes all that is asked for; for a task.
pub(super) async fn take(
    shared: Arc<Shared>,
    number: usize,
    request: Arc<LeaseRequest>,
    deadline: Deadline,
) -> Result<VramSet> {
    let device = shared.device(number)?;
    loop {
        match attempt(&shared, number, &request, &deadline).await? {
            Ok(set) => {
                if request.overwrite {
                    zero(device, &set).await?;
                }
                return Ok(set);
            }
            Err(blocked) => wait(&shared, number, blocked, &deadline).await?,
        }
        // Other tasks get a turn, so that the one in the way can go on.
        tokio::task::yield_now().await;
        if deadline.is_past() {
            return Err(deadline.error(LEASE));
        }
    }
}

/// Space first, for which it waits with nothing in its hands; then everything else, for which it
/// waits for nothing but the bytes.
async fn attempt(
    shared: &Arc<Shared>,
    number: usize,
    request: &LeaseRequest,
    deadline: &Deadline,
) -> Result<std::result::Result<VramSet, Obstacle>> {
    let mut objects = request.objects();
    // They are there, and held.
    objects.retain(|object| !request.follows(object, number));
    for object in objects.iter().filter(|object| request.keeps_version(object)) {
        keep_version(object, deadline).await?;
    }
    for object in objects.iter().filter(|object| object.is_changing()) {
        // Nothing leaves the device for a set that could not be taken anyway.
        object.gate_opened(deadline).await?;
    }
    let (there, missing): (Vec<_>, Vec<_>) =
        objects.iter().cloned().partition(|object| request.is_there(object, number));
    let (mut spaces, host_spaces) =
        spaces(shared, number, (&objects, &missing), request, deadline).await?;
    let tier = shared.device(number)?.tier();
    let mut prepaid = match Prepaid::try_charge(shared, tier, HoldKind::Lease, &objects)? {
        Ok(prepaid) => prepaid,
        Err(bytes) => return Ok(Err(Obstacle::Budget(bytes))),
    };
    // Dropped after the holds.
    let overwritten = missing.iter().filter(|object| request.overwrites(object));
    let _unfilled: Vec<_> =
        overwritten.map(|object| Unfilled { object: object.clone(), number }).collect();
    let mut held = Vec::new();
    for object in &there {
        match try_hold(number, request, object, &mut prepaid)? {
            Ok(hold) => held.push(hold),
            Err(blocked) => return Ok(Err(blocked)),
        }
    }
    let mut filling = FuturesUnordered::new();
    for object in missing {
        // None if it had some when space was asked for; if it has lost that since, it is missing
        // still.
        let first = crate::planted!("set-mixed").then(|| spaces.keys().min().copied()).flatten();
        let space = spaces.remove(&first.unwrap_or(object.id));
        let pass = match gate(&object)? {
            Ok(pass) => pass,
            Err(blocked) => return Ok(Err(blocked)),
        };
        filling.push(bring(request, number, (pass, space), deadline));
    }
    let mut blocked = None;
    while let Some(brought) = filling.next().await {
        let Some(pass) = brought? else {
            blocked = Some(Obstacle::Missing);
            continue;
        };
        match HoldGuard::count_prepaid(&pass, &mut prepaid)? {
            Some(hold) => held.push(hold),
            None => blocked = Some(Obstacle::Budget(footprint(pass.object(), number)?)),
        }
    }
    drop(filling);
    match blocked {
        Some(blocked) => Ok(Err(blocked)),
        None => try_take(shared, number, request, host_spaces),
    }
}

/// Space on the device for what is missing there, and in host memory for each version that will be
/// written, unless the object has that below the device: all of both, and nothing is kept while
/// either is waited for.
async fn spaces(
    shared: &Arc<Shared>,
    number: usize,
    (objects, missing): (&[Arc<Object>], &[Arc<Object>]),
    request: &LeaseRequest,
    deadline: &Deadline,
) -> Result<(HashMap<u64, DeviceRange>, HostSpaces)> {
    let state = &shared.device(number)?.state;
    let lens = |objects: &mut dyn Iterator<Item = &Arc<Object>>| {
        Need::set(objects.map(|object| (object.len, object.id)))
    };
    let spaceless: Vec<_> =
        missing.iter().filter(|object| !object.has_space_on(number)).cloned().collect();
    let on_device = lens(&mut spaceless.iter());
    let by_object = |spaces: Grant<DeviceSpace>| {
        spaceless.iter().map(|object| object.id).zip(spaces).collect::<HashMap<_, _>>()
    };
    let written = request.writes.iter().map(VMemHandle::object);
    let is_claimed = |object: &Object| objects.iter().any(|one| one.id == object.id);
    let written: Vec<_> = written
        .filter(|object| object.len > 0 && !object.has_floor() && is_claimed(object))
        .cloned()
        .collect();
    let in_host = lens(&mut written.iter());
    let by_id = |spaces: Vec<OwnedCopy>| -> HostSpaces {
        written.iter().map(|object| object.id).zip(spaces).collect()
    };
    shared.host.check_fits(shared.host.queue.footprint(&in_host))?;
    loop {
        let spaces = state.take(&on_device, deadline).await?;
        if let Some(host_spaces) = shared.try_host_spaces(&in_host) {
            return Ok((by_object(spaces), by_id(host_spaces)));
        }
        drop(spaces);
        let host_spaces = shared.host_spaces_or_error(&in_host, deadline).await?;
        if let Some(spaces) = state.queue.try_take(&on_device) {
            return Ok((by_object(spaces), by_id(host_spaces)));
        }
    }
}

/// Space in host memory, by the object that it is for.
type HostSpaces = HashMap<u64, OwnedCopy>;

/// Space for an object whose bytes do not matter: unless it was taken for good, it goes back.
struct Unfilled {
    object: Arc<Object>,
    number: usize,
}

impl Drop for Unfilled {
    fn drop(&mut self) {
        let Unfilled { object, number } = self;
        if let Some(pass) = object.try_gate()
            && !object.is_on(*number)
            && !object.devices_to_refresh().contains(number)
        {
            object.detach_from(&pass, *number);
        }
    }
}

/// Promotes one object; none if it has lost its memory there meanwhile.
async fn bring(
    request: &LeaseRequest,
    number: usize,
    (pass, space): (GatePass, Option<DeviceRange>),
    deadline: &Deadline,
) -> Result<Option<GatePass>> {
    let object = pass.object().clone();
    let with_bytes = !request.overwrites(&object);
    let job = Job::new(object, MigrationCause::Promote, *deadline);
    let is_there = fill_device(&job, number, (&pass, space), with_bytes).await?;
    Ok(is_there.then_some(pass))
}

fn footprint(object: &Object, number: usize) -> Result<u64> {
    Ok(object.shared.device(number)?.backend.footprint(object.len))
}

/// Holds an object that is on the device.
fn try_hold(
    number: usize,
    request: &LeaseRequest,
    object: &Arc<Object>,
    prepaid: &mut Prepaid,
) -> Result<std::result::Result<HoldGuard, Obstacle>> {
    let pass = match gate(object)? {
        Ok(pass) => pass,
        Err(blocked) => return Ok(Err(blocked)),
    };
    if !request.is_there(object, number) {
        return Ok(Err(Obstacle::Missing));
    }
    let held = HoldGuard::count_prepaid(&pass, prepaid)?;
    let footprint = footprint(object, number)?;
    Ok(held.ok_or(Obstacle::Budget(footprint)))
}

/// Whether a device alone has a version of it, which is not lost.
fn is_kept_there_alone(object: &Object) -> bool {
    object.is_dirty_on_device() && object.damage().is_none() && !crate::planted!("overwrite-loses")
}

/// Writes back what a device alone has, and what a lease is to change that loses nothing: its
/// caller may go half way, and then the version before is to be there.
async fn keep_version(object: &Arc<Object>, deadline: &Deadline) -> Result<()> {
    for attempt in 1.. {
        if !is_kept_there_alone(object) {
            break;
        }
        let pass = object.gate(deadline).await?;
        let written = write_back_from_device(&pass, MigrationCause::WriteBack, deadline).await;
        drop(pass);
        match written {
            // One that is lost by now is none to be kept.
            _ if object.damage().is_some() => break,
            Err(VirtualMemoryError::Device { .. }) if attempt < COPY_TRIES => {
                tokio::time::sleep(COPY_PAUSE).await;
            }
            written => return written,
        }
    }
    Ok(())
}

/// What is not written must not show what others left there.
async fn zero(device: &Device, set: &VramSet) -> Result<()> {
    for range in set.writes.iter().filter_map(VramChange::range) {
        device.backend.zero(range).await.map_err(|error| device.fault(error))?;
    }
    Ok(())
}

/// Takes all now, or says what is in the way.
fn try_take(
    shared: &Arc<Shared>,
    number: usize,
    request: &LeaseRequest,
    mut host_spaces: HostSpaces,
) -> Result<std::result::Result<VramSet, Obstacle>> {
    let mut reads = Vec::with_capacity(request.reads.len());
    for handle in &request.reads {
        match try_lease(shared, number, handle)? {
            Ok(hold) => reads.push(hold),
            Err(blocked) => return Ok(Err(blocked)),
        }
    }
    // One for each write, none where there is nothing to write.
    let mut claimed: Vec<Option<(Taken, Vec<UseEnd>)>> = Vec::with_capacity(request.writes.len());
    for handle in &request.writes {
        if handle.is_empty() {
            claimed.push(None);
            continue;
        }
        let turn = (!request.overwrite).then(|| try_turn(handle, number)).flatten();
        let space = host_spaces.remove(&handle.object().id);
        let taken = match turn {
            Some(turn) => Ok(Ok(turn)),
            None => try_claim(shared, number, request, handle, space),
        };
        match taken {
            Ok(Ok(taken)) => claimed.push(Some(taken)),
            refused => {
                claimed.into_iter().flatten().for_each(|(taken, _)| taken.give_up());
                return refused.map(|refused| refused.map(|_| unreachable!("it was refused")));
            }
        }
    }
    let in_order = claimed.into_iter().zip(&request.writes);
    let writes = in_order.map(|(claimed, handle)| {
        let (inner, after) = claimed.unzip();
        VramChange {
            inner,
            after: after.unwrap_or_default(),
            handle: handle.clone(),
            is_used: AtomicBool::new(false),
            touched: Vec::new(),
        }
    });
    let writes = writes.collect();
    Ok(Ok(VramSet { reads, writes }))
}

fn gate(object: &Arc<Object>) -> Result<std::result::Result<GatePass, Obstacle>> {
    let pass = object.gate_if_open()?;
    Ok(pass.ok_or_else(|| Obstacle::Changing(object.clone())))
}

fn try_lease(
    shared: &Arc<Shared>,
    number: usize,
    handle: &VMemHandle,
) -> Result<std::result::Result<VramHold, Obstacle>> {
    let object = handle.object();
    let device = shared.device(number)?;
    if let Some(hold) = follow(handle, number) {
        return Ok(Ok(hold));
    }
    let pass = match gate(object)? {
        Ok(pass) => pass,
        Err(blocked) => return Ok(Err(blocked)),
    };
    let range = object.share_on(number);
    if range.is_none() && object.len > 0 {
        return Ok(Err(Obstacle::Missing));
    }
    Ok(match HoldGuard::try_count(&pass, device.tier(), HoldKind::Lease)? {
        Some(held) => {
            Ok(VramHold { range, after: Vec::new(), _held: held, _handle: handle.clone() })
        }
        None => Err(Obstacle::Budget(device.backend.footprint(object.len))),
    })
}

fn try_claim(
    shared: &Arc<Shared>,
    number: usize,
    request: &LeaseRequest,
    handle: &VMemHandle,
    space: Option<OwnedCopy>,
) -> Result<std::result::Result<(Taken, Vec<UseEnd>), Obstacle>> {
    let object = handle.object();
    let overwrite = request.overwrite;
    let device = shared.device(number)?;
    let pass = match gate(object)? {
        Ok(pass) => pass,
        Err(blocked) => return Ok(Err(blocked)),
    };
    if space.is_none() && !object.has_floor() {
        // It has lost its space below meanwhile, or been written back.
        return Ok(Err(Obstacle::Missing));
    }
    if request.keeps_version(object) && is_kept_there_alone(object) {
        return Ok(Err(Obstacle::Missing));
    }
    let was_valid = object.is_on(number);
    if !(was_valid || overwrite && object.has_space_on(number)) {
        return Ok(Err(Obstacle::Missing));
    }
    let Some(held) = HoldGuard::try_count(&pass, device.tier(), HoldKind::Lease)? else {
        return Ok(Err(Obstacle::Budget(device.backend.footprint(object.len))));
    };
    // The zeros come by a copy stream, which nothing of the user's is behind.
    let Some((range, after)) = object.claim_on(&pass, number, overwrite) else {
        return Ok(Err(Obstacle::Used(object.clone(), overwrite)));
    };
    let is_overwritten = overwrite;
    let claim = Claim { device: number, range, was_valid, is_overwritten, space, pass, held };
    Ok(Ok((Taken::Claim(claim), after)))
}

/// A turn behind a kernel that has not ended, and what it is to come after.
fn try_turn(handle: &VMemHandle, number: usize) -> Option<(Taken, Vec<UseEnd>)> {
    let object = handle.object();
    let (successors, range, after) = object.succeed_on(number)?;
    let held = HoldGuard::counted(object, object.shared.devices()[number].tier());
    Some((Taken::Turn(Turn { range, successors, held }), after))
}

/// The version that a kernel writes which has not ended, for a kernel that comes behind it.
pub(super) fn follow(handle: &VMemHandle, number: usize) -> Option<VramHold> {
    let object = handle.object();
    let (range, after) = object.follow_on(number)?;
    let held = HoldGuard::counted(object, object.shared.devices()[number].tier());
    Some(VramHold { range: Some(range), after, _held: held, _handle: handle.clone() })
}
