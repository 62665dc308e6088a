//! Scenario 4: futures dropped at every point at which they can be.
//!
//! Excluded: a cancelled call that leaks space, a pin, a reader count, a staging piece or an
//! object; that tears or loses bytes; or that frees a buffer which the disk still uses. Noticed by
//! figures that are exact again after each drop, by contents that no order of the calls explains,
//! by memory that the driver poisoned, and, for the two pieces of staging, by a call that never
//! ends.

mod bench;

use vmem::MemoryTier;

use crate::support::{KIB, MIB};
use bench::Bench;

const VRAM: MemoryTier = MemoryTier::Vram;
const SPACE: usize = 768 * KIB;
const VRAM_BYTES: usize = 2 * MIB;
/// Small: one chunk. Middling: more than is ever copied in one go. Large: more than host memory.
const SMALL: usize = 20_000;
const MIDDLING: usize = 260 * KIB + 77;
const LARGE: usize = 900 * KIB + 5;
const BESIDE: usize = 30_000;

/// Where the object is when the call begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Spare,
    Reserved,
    Dirty,
    Clean,
    PartlyDirty,
    OnDisk,
    /// In host memory, and a reader has its bytes.
    Held,
    /// On disk, and host memory is full of others that were never written back.
    Crowded,
    /// In host memory and in device memory.
    Promoted,
    /// On disk and in device memory.
    PromotedFromDisk,
    /// At home in device memory, never written.
    AtHome,
}

const STATES: [State; 11] = [
    State::Spare,
    State::Reserved,
    State::Dirty,
    State::Clean,
    State::PartlyDirty,
    State::OnDisk,
    State::Held,
    State::Crowded,
    State::Promoted,
    State::PromotedFromDisk,
    State::AtHome,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Allocate,
    Put,
    Free,
    Read,
    ReadAt,
    ReadBackground,
    ReadToStay,
    ReadInto,
    ReadMany,
    Write,
    WriteAt,
    WriteWith,
    Promote,
    Demote,
    Prefetch,
    Pin,
    Flush,
    PutAtHome,
    PromoteToVram,
    DemoteFromVram,
    PrefetchToVram,
    PinPromoted,
    Hold,
    Change,
    ChangeAll,
}

const CALLS: [Call; 25] = [
    Call::Allocate,
    Call::Put,
    Call::Free,
    Call::Read,
    Call::ReadAt,
    Call::ReadBackground,
    Call::ReadToStay,
    Call::ReadInto,
    Call::ReadMany,
    Call::Write,
    Call::WriteAt,
    Call::WriteWith,
    Call::Promote,
    Call::Demote,
    Call::Prefetch,
    Call::Pin,
    Call::Flush,
    Call::PutAtHome,
    Call::PromoteToVram,
    Call::DemoteFromVram,
    Call::PrefetchToVram,
    Call::PinPromoted,
    Call::Hold,
    Call::Change,
    Call::ChangeAll,
];

async fn exhaust_all(len: usize, states: &[State]) {
    let mut points = 0;
    for &state in states {
        for call in CALLS {
            points += Bench::new(len).exhaust(state, call).await;
        }
    }
    println!("{points} points at which a future of {len} bytes was dropped");
    assert!(points > states.len() * CALLS.len(), "calls waited for something: {points}");
}

#[tokio::test(start_paused = true)]
async fn scenario_04_every_call_dropped_at_every_poll_small() {
    exhaust_all(SMALL, &STATES).await;
}

#[tokio::test(start_paused = true)]
async fn scenario_04_every_call_dropped_at_every_poll_middling() {
    exhaust_all(MIDDLING, &STATES).await;
}

#[tokio::test(start_paused = true)]
async fn scenario_04_every_call_dropped_at_every_poll_larger_than_host() {
    // Such an object is never in host memory.
    exhaust_all(LARGE, &[State::Reserved, State::OnDisk]).await;
}
