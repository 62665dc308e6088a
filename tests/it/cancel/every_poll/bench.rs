//! The store in one state, a call on it, and what must hold once the call was dropped.
//!
//! Invariant: a bench is used for one state and one call, so that figures are exact. Called by the
//! tests of the module above.

use std::sync::Arc;

use bytes::Bytes;
use vmem::backend::{DeviceAccess, VramChange, VramHold};
use vmem::{PinGuard, ReadClass, ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_testkit::SimDevice;

use super::*;
use crate::support::{
    self, DISK, DropAt, HOST, KIB, MIB, MemDriver, assert_empty, bytes, dropped_at, is_pressure,
    settle,
};

/// What a call brought.
pub(super) enum Brought {
    Nothing,
    Read(std::ops::Range<usize>, Bytes),
    Copied(std::ops::Range<usize>, Vec<u8>),
    Object(VMemHandle),
    Guard(PinGuard),
    Promoted(PinGuard),
    Held(VramHold),
    Alone(VramChange),
}

/// The bytes of one length, made once.
pub(super) struct Versions {
    zeros: Vec<u8>,
    one: Vec<u8>,
    two: Vec<u8>,
    three: Vec<u8>,
    /// Version one with a part of two over it, and zeros with that part.
    patched: Vec<u8>,
    zeros_patched: Vec<u8>,
    beside: Vec<u8>,
}

impl Versions {
    pub(super) fn of(len: usize) -> Self {
        let zeros = vec![0; len];
        let two = bytes(1, 2, len);
        let patch = |mut base: Vec<u8>| {
            base[part(len)].copy_from_slice(&two[part(len)]);
            base
        };
        Versions {
            one: bytes(1, 1, len),
            three: bytes(1, 3, len),
            patched: patch(bytes(1, 1, len)),
            zeros_patched: patch(zeros.clone()),
            beside: bytes(2, 1, BESIDE),
            zeros,
            two,
        }
    }
}

/// A part that begins and ends inside of chunks.
pub(super) fn part(len: usize) -> std::ops::Range<usize> {
    len / 3..len - len / 4
}

pub(super) struct Bench {
    vmem: VirtualMemory,
    driver: std::sync::Arc<MemDriver>,
    len: usize,
    versions: Versions,
}

/// One object in its state, and what is around it.
pub(super) struct Scene {
    object: VMemHandle,
    beside: VMemHandle,
    crowd: Vec<VMemHandle>,
    reader: Option<Bytes>,
    written: bool,
}

impl Bench {
    pub(super) fn new(len: usize) -> Self {
        let device = Arc::new(SimDevice::new(VRAM_BYTES as u64));
        let (vmem, driver) = support::open_below([device as Arc<_>], SPACE, 16 * MIB, |builder| {
            builder.max_pinned(1.0)
        });
        Bench { vmem, driver, len, versions: Versions::of(len) }
    }

    pub(super) async fn scene(&self, state: State) -> Scene {
        let vmem = &self.vmem;
        let home = match state {
            State::Reserved | State::Clean | State::PartlyDirty | State::OnDisk => DISK,
            State::PromotedFromDisk => DISK,
            State::AtHome => VRAM,
            _ => HOST,
        };
        let object = vmem.allocate(self.len, home).await.unwrap();
        let beside = vmem.put(&self.versions.beside, DISK).await.unwrap();
        let written = !matches!(state, State::Spare | State::Reserved | State::AtHome);
        if written {
            vmem.write(&object, &self.versions.one).await.unwrap();
        }
        let mut reader = None;
        match state {
            State::Clean => vmem.promote(&object, HOST).await.unwrap(),
            State::PartlyDirty => {
                vmem.promote(&object, HOST).await.unwrap();
                vmem.write_at(&object, 7, &self.versions.one[7..8]).await.unwrap();
            }
            State::Held => reader = Some(vmem.read(&object).await.unwrap()),
            State::Crowded => vmem.demote(&object, DISK).await.unwrap(),
            State::Promoted | State::PromotedFromDisk => vmem.promote(&object, VRAM).await.unwrap(),
            State::Spare | State::Reserved | State::Dirty | State::OnDisk | State::AtHome => {}
        }
        let mut crowd = Vec::new();
        if state == State::Crowded {
            for _ in 0..SPACE / (128 * KIB) {
                crowd.push(vmem.put(&[9; 128 * KIB], HOST).await.unwrap());
            }
        }
        settle(vmem, &self.driver).await;
        Scene { object, beside, crowd, reader, written }
    }

    pub(super) async fn call(
        &self,
        call: Call,
        scene: &Scene,
    ) -> Result<Brought, VirtualMemoryError> {
        let vmem = &self.vmem;
        let object = &scene.object;
        let part = part(self.len);
        let whole = 0..self.len;
        let device = DeviceAccess::all(vmem).next().expect("the store has a device");
        Ok(match call {
            Call::Allocate => Brought::Object(vmem.allocate(self.len, HOST).await?),
            Call::Put => Brought::Object(vmem.put(&self.versions.one, HOST).await?),
            Call::Free => vmem.free(object.clone()).await.map(|()| Brought::Nothing)?,
            Call::Read => Brought::Read(whole, vmem.read(object).await?),
            Call::ReadAt => Brought::Read(part.clone(), vmem.read_at(object, part).await?),
            Call::ReadBackground => {
                let options = ReadOptions::new().class(ReadClass::Background).promote(false);
                Brought::Read(whole, vmem.read_with(object, options).await?)
            }
            Call::ReadToStay => {
                let options = ReadOptions::new().promote(true);
                Brought::Read(whole, vmem.read_with(object, options).await?)
            }
            Call::ReadInto => {
                let mut buf = vec![0xEE; part.len()];
                vmem.read_into(object, part.clone(), &mut buf).await?;
                Brought::Copied(part, buf)
            }
            Call::ReadMany => {
                let set = [scene.beside.clone(), object.clone()];
                let mut both = vmem.read_many(&set).await?;
                assert!(both[0] == self.versions.beside);
                Brought::Read(whole, both.remove(1))
            }
            Call::Write => vmem.write(object, &self.versions.two).await.map(nothing)?,
            Call::WriteAt => {
                let data = &self.versions.two[part.clone()];
                vmem.write_at(object, part.start, data).await.map(nothing)?
            }
            Call::WriteWith => {
                let fill = |buf: &mut [u8]| buf.copy_from_slice(&self.versions.two);
                vmem.write_with(object, fill).await.map(nothing)?
            }
            Call::Promote => vmem.promote(object, HOST).await.map(nothing)?,
            Call::Demote => vmem.demote(object, DISK).await.map(nothing)?,
            Call::Prefetch => vmem.prefetch(object, HOST).await.map(nothing)?,
            Call::Pin => Brought::Guard(vmem.pin(object, HOST).await?),
            Call::Flush => vmem.flush(object).await.map(nothing)?,
            Call::PutAtHome => Brought::Object(vmem.put(&self.versions.one, VRAM).await?),
            Call::PromoteToVram => vmem.promote(object, VRAM).await.map(nothing)?,
            Call::DemoteFromVram => vmem.demote(object, HOST).await.map(nothing)?,
            Call::PrefetchToVram => vmem.prefetch(object, VRAM).await.map(nothing)?,
            Call::PinPromoted => Brought::Promoted(vmem.pin(object, VRAM).await?),
            Call::Hold => Brought::Held(device.hold(object).await?),
            Call::Change => Brought::Alone(device.change(object, false).await?),
            Call::ChangeAll => Brought::Alone(device.change(object, true).await?),
        })
    }

    /// Drops the call at every point. Returns how many there were.
    pub(super) async fn exhaust(&self, state: State, call: Call) -> usize {
        for polls in 0.. {
            let mut ended = true;
            for at in [DropAt::Polled(polls), DropAt::Woken(polls)] {
                let when = format!("{call:?} of {} bytes, {state:?}, {at:?}", self.len);
                let scene = self.scene(state).await;
                let outcome = dropped_at(at, self.call(call, &scene)).await;
                ended &= outcome.is_some();
                self.check(call, scene, outcome, &when).await;
            }
            if ended {
                return polls;
            }
            assert!(polls < 500, "{call:?} in {state:?} never ends");
        }
        unreachable!("the loop has no end")
    }

    pub(super) async fn check(
        &self,
        call: Call,
        scene: Scene,
        outcome: Option<Result<Brought, VirtualMemoryError>>,
        when: &str,
    ) {
        let before = if scene.written { &self.versions.one } else { &self.versions.zeros };
        let after = match call {
            Call::Write | Call::WriteWith => &self.versions.two,
            Call::WriteAt if scene.written => &self.versions.patched,
            Call::WriteAt => &self.versions.zeros_patched,
            _ => before,
        };
        let possible: Vec<&Vec<u8>> = match &outcome {
            None => vec![before, after],
            Some(Ok(_)) => vec![after],
            Some(Err(error)) => {
                let large = self.len > SPACE;
                let refused = matches!(error, VirtualMemoryError::ExceedsCapacity { .. });
                assert!((large && refused) || is_pressure(error), "{when}: {error:?}");
                vec![before]
            }
        };
        let freed = call == Call::Free && matches!(outcome, Some(Ok(_)));
        self.check_brought(outcome, before, when).await;
        self.check_figures(&scene, freed, when).await;
        if freed {
            let gone = self.vmem.read(&scene.object).await.unwrap_err();
            assert!(matches!(gone, VirtualMemoryError::HandleNotFound { .. }), "{when}: {gone}");
        } else {
            let now = self.content(&scene.object).await;
            assert!(possible.iter().any(|possible| **possible == now), "{when}: wrong bytes");
            self.check_usable(&scene.object, when).await;
        }
        if let Some(reader) = &scene.reader {
            assert!(*reader == self.versions.one, "{when}: a snapshot changed");
        }
        drop(scene);
        assert_empty(&settle(&self.vmem, &self.driver).await, when);
        self.driver.assert_untouched();
    }

    pub(super) async fn check_brought(
        &self,
        outcome: Option<Result<Brought, VirtualMemoryError>>,
        before: &[u8],
        when: &str,
    ) {
        match outcome {
            Some(Ok(Brought::Read(range, read))) => assert!(read == before[range], "{when}"),
            Some(Ok(Brought::Copied(range, read))) => assert!(read == before[range], "{when}"),
            Some(Ok(Brought::Object(new))) => {
                let content = self.content(&new).await;
                let zeros = &self.versions.zeros;
                let one = &self.versions.one;
                assert!(content == *zeros || content == *one, "{when}");
            }
            Some(Ok(Brought::Guard(guard))) => {
                assert!(self.vmem.stats().pinned_bytes > 0, "{when}");
                drop(guard);
            }
            Some(Ok(Brought::Promoted(guard))) => {
                assert!(self.vmem.stats().vram.used_bytes > 0, "{when}");
                drop(guard);
            }
            Some(Ok(Brought::Held(hold))) => {
                assert_eq!(hold.range().unwrap().len(), self.len, "{when}");
            }
            Some(Ok(Brought::Alone(change))) => {
                assert_eq!(change.range().unwrap().len(), self.len, "{when}");
            }
            Some(Ok(Brought::Nothing) | Err(_)) | None => {}
        }
    }

    /// Host memory is taken for live objects only, and no more is held or pinned than by the scene.
    pub(super) async fn check_figures(&self, scene: &Scene, freed: bool, when: &str) {
        let stats = settle(&self.vmem, &self.driver).await;
        let mut there = vec![&scene.beside];
        there.extend(&scene.crowd);
        if !freed {
            there.push(&scene.object);
        }
        assert_eq!(stats.objects, there.len() as u64, "{when}: {stats:#?}");
        let mut host = 0;
        let mut disk_most = 0;
        let mut vram = 0;
        let mut current_is_held = false;
        for handle in there {
            let residency = self.vmem.residency(handle).unwrap();
            assert_eq!(residency.pins, 0, "{when}");
            // All lengths here are rounded up to pages, in host memory, and to 512 bytes on disk.
            host += if residency.host { handle.len().next_multiple_of(4096) as u64 } else { 0 };
            // At home in device memory it has space there, whatever is in it; unless it was taken
            // down.
            let most = handle.home_tier() == VRAM || residency.vram;
            vram += if most { handle.len().next_multiple_of(512) as u64 } else { 0 };
            disk_most += handle.len().next_multiple_of(512) as u64;
            current_is_held |= residency.held;
        }
        let held = match &scene.reader {
            Some(_) => self.len.next_multiple_of(4096) as u64,
            None => 0,
        };
        // An old version that a reader keeps is in no object any more.
        let old = if current_is_held { 0 } else { held };
        assert_eq!(stats.host.used_bytes, host + old, "{when}: {stats:#?}");
        assert_eq!((stats.held_bytes, stats.pinned_bytes), (held, 0), "{when}: {stats:#?}");
        assert!(stats.disk.used_bytes <= disk_most, "{when}: {stats:#?}");
        assert!(stats.vram.used_bytes <= vram, "{when}: {stats:#?}");
    }

    pub(super) async fn content(&self, handle: &VMemHandle) -> Vec<u8> {
        let mut buf = vec![0xEE; handle.len()];
        self.vmem.read_into(handle, 0..handle.len(), &mut buf).await.unwrap();
        buf
    }

    pub(super) async fn check_usable(&self, handle: &VMemHandle, when: &str) {
        self.vmem.write(handle, &self.versions.three).await.unwrap();
        assert!(self.content(handle).await == self.versions.three, "{when}: a later write");
        self.vmem.demote(handle, DISK).await.unwrap();
        assert!(self.content(handle).await == self.versions.three, "{when}: a later demotion");
        if self.len <= SPACE / 2 {
            let read = self.vmem.read(handle).await.unwrap();
            assert!(read == self.versions.three, "{when}: a later read");
        }
    }
}

fn nothing((): ()) -> Brought {
    Brought::Nothing
}
