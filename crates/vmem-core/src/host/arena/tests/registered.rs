//! Slabs that a device has registered.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::atomic::AtomicUsize;

use parking_lot::Mutex;

use super::*;
use crate::host::{InUse, ObjectSpace, Registrar};

#[derive(Debug, Default)]
struct Device {
    known: Mutex<BTreeMap<usize, usize>>,
    registrations: AtomicUsize,
    refuses: AtomicBool,
}

impl Registrar for Device {
    fn register(&self, address: usize, len: usize) -> io::Result<()> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        for page in (address..address + len).step_by(PAGE_BYTES) {
            let byte = std::ptr::with_exposed_provenance_mut::<u8>(page);
            // SAFETY: the page is mapped, and this test has one thread.
            let read = unsafe { byte.read_volatile() };
            // SAFETY: as above.
            unsafe { byte.write_volatile(read) };
        }
        assert_eq!(self.known.lock().insert(address, len), None, "registered twice");
        self.registrations.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn unregister(&self, address: usize, len: usize) -> io::Result<()> {
        assert_eq!(self.known.lock().remove(&address), Some(len), "what was registered");
        Ok(())
    }
}

impl Device {
    /// Each page of what is registered has the memory that it had: a page that was given back, and
    /// not touched since, has none.
    fn assert_has_memory(&self) {
        let mut map = std::fs::File::open("/proc/self/pagemap").unwrap();
        for (&address, &len) in &*self.known.lock() {
            map.seek(SeekFrom::Start((address / PAGE_BYTES * 8) as u64)).unwrap();
            let mut entries = vec![0; len / PAGE_BYTES * 8];
            map.read_exact(&mut entries).unwrap();
            let there = entries.chunks(8).all(|entry| entry[7] >> 6 != 0);
            assert!(there, "a registered page was given back");
        }
    }

    fn covers(&self, address: usize, len: usize) -> bool {
        let known = self.known.lock();
        let slab = known.range(..=address).next_back();
        slab.is_some_and(|(&start, &slab)| address + len <= start + slab)
    }
}

fn served(capacity: u64) -> (Arc<HostArena>, ObjectSpace, Arc<Device>) {
    let arena = HostArena::new(capacity).unwrap();
    let space = ObjectSpace::new(arena.clone());
    let device = Arc::new(Device::default());
    space.serve(device.clone());
    (arena, space, device)
}

/// Space, once what is being unregistered for it was: a thread of the arena's does that, in its own
/// time.
fn alloc_soon(arena: &Arc<HostArena>, len: usize) -> Option<HostSlot> {
    let begun = std::time::Instant::now();
    loop {
        match arena.try_alloc(len, 3) {
            Ok(slot) => return Some(slot),
            Err(_) if begun.elapsed().as_secs() > 20 => return None,
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    }
}

/// What a copy of a slot does: each part that it uses is registered as one.
fn copy(space: &ObjectSpace, device: &Device, slot: &HostSlot) -> Vec<InUse> {
    let bytes = slot.as_slice();
    let mut at = 0;
    let mut uses = Vec::new();
    for part in space.enter(bytes.as_ptr().addr(), bytes.len()) {
        assert_eq!(part.range.start, at, "the parts are all of it, in order");
        at = part.range.end;
        let address = bytes[part.range.clone()].as_ptr().addr();
        let covered = !part.range.is_empty() && device.covers(address, part.range.len());
        assert_eq!(covered, part.direct, "registered as one");
        uses.extend(part.in_use.filter(|_| part.direct));
    }
    assert_eq!(at, bytes.len());
    uses
}

#[test]
fn nothing_registered_is_given_back() {
    seeded(6, |_, rng| {
        let (arena, space, device) = served(4 * MIB);
        let mut live: Vec<(u64, HostSlot, Vec<InUse>)> = Vec::new();
        // Slabs go on a thread of the arena's, in its own time, so that they come again in theirs.
        let come_and_go = || device.registrations.load(Ordering::SeqCst) > 10;
        for owner in (0..600_000).take_while(|&owner| owner < 6000 || !come_and_go()) {
            match rng.random_range(0..12) {
                0..5 => {
                    let len = match rng.random_range(0..4) {
                        0 => rng.random_range(SMALL_MAX..1 << 20),
                        _ => random_len(rng),
                    };
                    if let Ok(mut slot) = arena.try_alloc(len, owner) {
                        fill(&mut slot, owner);
                        live.push((owner, slot, Vec::new()));
                    }
                }
                5..8 if !live.is_empty() => {
                    let at = rng.random_range(0..live.len());
                    let (_, slot, uses) = &mut live[at];
                    *uses = copy(&space, &device, slot);
                }
                8 => live.iter_mut().for_each(|(_, _, uses)| uses.clear()),
                _ if !live.is_empty() => {
                    let at = rng.random_range(0..live.len());
                    let (owner, slot, uses) = live.swap_remove(at);
                    verify(&slot, owner);
                    drop(uses);
                }
                _ => {}
            }
            if owner % 16 == 0 {
                device.assert_has_memory();
                assert!(arena.pages().physical() <= 4 * MIB / PAGE_BYTES as u64);
            }
        }
        assert!(come_and_go(), "slabs come and go");
        live.iter().for_each(|(owner, slot, _)| verify(slot, *owner));
        live.clear();
        let all = alloc_soon(&arena, 4 * MIB as usize);
        assert!(all.is_some(), "all of it, in one piece, wherever slabs were registered");
        space.retire(&|address, len| device.unregister(address, len).is_ok());
        assert_eq!(device.known.lock().len(), 0);
        assert_eq!(space.registered_bytes(), 0);
    });
}

#[test]
fn slab_in_use_stays_and_its_waiter_is_woken() {
    let (arena, space, device) = served(MIB);
    let told = Arc::new(AtomicUsize::new(0));
    let rung = told.clone();
    arena.set_freed_hook(Box::new(move || {
        rung.fetch_add(1, Ordering::SeqCst);
    }));
    let part = |kib: usize| arena.try_alloc(kib * 1024, 1).unwrap();
    let first = part(448);
    let middle = part(128);
    let last = part(448);
    let uses = [&first, &last].map(|slot| copy(&space, &device, slot));
    assert!(uses.iter().all(|uses| !uses.is_empty()), "whole slabs register at once");
    drop((first, last));
    let before = told.load(Ordering::SeqCst);
    let refused = arena.try_alloc(512 * 1024, 2);
    assert!(refused.is_err(), "what would have to go is in use");
    device.assert_has_memory();
    drop(uses);
    assert!(told.load(Ordering::SeqCst) > before, "the waiter is woken");
    assert!(alloc_soon(&arena, 512 * 1024).is_some(), "slabs are unregistered for it");
    device.assert_has_memory();
    drop(middle);
}

#[test]
fn a_device_that_refuses() {
    let (arena, space, device) = served(4 * MIB);
    device.refuses.store(true, Ordering::SeqCst);
    let slot = arena.try_alloc(2 * MIB as usize, 1).unwrap();
    for _ in 0..3 {
        assert!(copy(&space, &device, &slot).is_empty(), "by the detour");
    }
    device.refuses.store(false, Ordering::SeqCst);
    assert!(!copy(&space, &device, &slot).is_empty(), "it is tried again");
    let outside = [0_u8; 100];
    let parts = space.enter(outside.as_ptr().addr(), outside.len());
    assert!(parts.len() == 1 && parts[0].range == (0..100) && parts[0].in_use.is_none());
}
