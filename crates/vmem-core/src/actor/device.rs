//! Serves those who wait for device memory.
//!
//! Invariant: what is in device memory has its bytes below, so a victim is dropped at once, and no more than the
//! first request needs is dropped for it. A prefetch makes nothing leave that was used after it was asked for. Run by the
//! actor; it never waits.

use crate::policy::{Pass, Pick, Probe};
use crate::shared::Shared;
use crate::stats::add;
use crate::tier::Refused;
use crate::vram::Vram;

/// Victims that are tried in one turn.
const TRIES_MAX: usize = 4096;

/// Serves the queue, and makes space for what waits on. True if there is more to do at once.
pub(super) fn serve(shared: &Shared, vram: &Vram) -> bool {
    if vram.queue.len() == 0 {
        return false;
    }
    if let Some(error) = vram.lost() {
        vram.queue.refuse(|_, _| Some(Refused::Error(error.clone())));
        return false;
    }
    let mut pass = None;
    for _ in 0..TRIES_MAX {
        let wanted = vram.queue.serve(vram.pins.bytes());
        if wanted.demand_bytes + wanted.prefetch_bytes == 0 {
            refuse_hopeless(vram);
            return false;
        }
        let colder_than = match wanted.prefetch_asked.filter(|_| wanted.demand_bytes == 0) {
            Some(asked) => shared.now().saturating_sub(asked.elapsed().as_nanos() as u64),
            None => u64::MAX,
        };
        let pass = pass.get_or_insert_with(|| Pass::colder_than(colder_than));
        if !evict(shared, vram, pass, colder_than) {
            refuse_hopeless(vram);
            return false;
        }
    }
    true
}

/// Answers those who have another way.
fn refuse_hopeless(vram: &Vram) {
    vram.queue.refuse(|need, _| need.may_spill.then_some(Refused::Spill));
}

/// Drops the copy that is needed least, if it was not used since. False if none can go.
fn evict(shared: &Shared, vram: &Vram, pass: &mut Pass, colder_than: u64) -> bool {
    loop {
        let pick = vram.policy.lock().victim(pass, &mut |id| probe(shared, id, colder_than));
        let id = match pick {
            Pick::Victim { id, .. } => id,
            Pick::Retry => continue,
            Pick::Empty => return false,
        };
        let Some(object) = shared.find(id) else { continue };
        if object.try_gate_quietly().is_some_and(|pass| object.leave_vram(&pass)) {
            add(&shared.counters.evictions, 1);
            add(&shared.counters.clean_drops, 1);
            return true;
        }
    }
}

/// How an object stands in VRAM, for the policy.
fn probe(shared: &Shared, id: u64, colder_than: u64) -> Probe {
    let Some(object) = shared.find(id) else { return Probe::Gone };
    if object.vram_pins() > 0 {
        Probe::Pinned
    } else if object.is_used_in_vram() || object.is_changing() {
        Probe::Busy { stamp: shared.now() }
    } else if object.stamp() >= colder_than {
        Probe::Unfit
    } else {
        Probe::Evictable { stamp: object.stamp(), touches: object.take_touches() }
    }
}
