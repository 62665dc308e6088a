//! Host copies with their real memory: for Miri, and with threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::host::HostArena;
use crate::wake::Wake;

const ROUNDS: u64 = if cfg!(miri) { 30 } else { 100_000 };

struct World {
    arena: Arc<HostArena>,
    copies: Copies,
    cell: CopyCell,
}

impl World {
    fn new() -> Arc<Self> {
        let arena = HostArena::new(256 * 1024).unwrap();
        let copies = Copies::new(Arc::new(Wake::default()));
        Arc::new(World { arena, copies, cell: CopyCell::empty() })
    }

    fn copy_of(&self, version: u8) -> OwnedCopy {
        let slot = self.arena.try_alloc(200, 1).expect("space");
        let mut copy = OwnedCopy::new(&self.copies, slot);
        copy.as_mut_slice().fill(version);
        copy
    }

    fn version(&self, version: u64) -> OwnedCopy {
        let mut copy = self.copy_of(0);
        stamp(copy.as_mut_slice(), version);
        copy
    }

    fn read(&self) -> Option<Bytes> {
        match self.cell.acquire(&self.copies) {
            Found::Copy(guard) => Some(guard.into_bytes()),
            Found::Locked | Found::Nothing => None,
        }
    }
}

/// Writes a version all over the bytes.
fn stamp(bytes: &mut [u8], version: u64) {
    bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&version.to_le_bytes()));
}

/// The one version that the bytes hold.
fn version_of(bytes: &[u8]) -> u64 {
    let word = |word: &[u8]| u64::from_le_bytes(word.try_into().unwrap());
    let version = word(&bytes[..8]);
    assert!(bytes.chunks_exact(8).all(|other| word(other) == version), "torn");
    version
}

#[test]
fn readers_keep_their_version_and_share_its_memory() {
    let world = World::new();
    world.cell.publish(world.copy_of(1), &world.copies);
    let one = world.read().unwrap();
    let two = world.read().unwrap();
    assert_eq!(one.as_ptr(), two.as_ptr());
    assert_eq!(world.copies.held_bytes(), 256);
    assert!(!world.cell.write_in_place(|_| panic!("it has a reader")));
    assert!(world.cell.take_idle(&world.copies).is_none());

    world.cell.publish(world.copy_of(2), &world.copies);
    assert_eq!(world.read().unwrap()[..], [2; 200]);
    assert_eq!((&one[..], world.arena.used_bytes()), (&[1; 200][..], 512));
    drop((one, two));
    assert_eq!((world.copies.held_bytes(), world.arena.used_bytes()), (0, 256));

    assert!(world.cell.write_in_place(|bytes| bytes.fill(3)));
    assert_eq!(world.read().unwrap()[..], [3; 200]);
    drop(world.cell.take_idle(&world.copies).unwrap());
    assert!(world.read().is_none());
    assert_eq!(world.arena.used_bytes(), 0);
}

#[test]
fn bytes_outlive_the_store() {
    let world = World::new();
    world.cell.publish(world.copy_of(7), &world.copies);
    let read = world.read().unwrap();
    let transient = world.copy_of(8).into_bytes(&world.copies);
    world.cell.detach(&world.copies);
    let arena = world.arena.clone();
    drop(world);
    assert_eq!((&read[..], &transient[..]), (&[7; 200][..], &[8; 200][..]));
    assert_eq!(arena.used_bytes(), 512);
    drop((read, transient));
    assert_eq!(arena.used_bytes(), 0);
}

#[test]
fn the_last_reader_wakes_whoever_waits() {
    let wake = Arc::new(Wake::default());
    let copies = Copies::new(wake.clone());
    let arena = HostArena::new(256 * 1024).unwrap();
    let cell = CopyCell::empty();
    cell.publish(OwnedCopy::new(&copies, arena.try_alloc(10, 1).unwrap()), &copies);
    let Found::Copy(guard) = cell.acquire(&copies) else { panic!("there is a copy") };
    wake.add_waiting();
    let mut asleep = std::pin::pin!(wake.asleep());
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(asleep.as_mut().poll(&mut context).is_pending());
    drop(guard);
    assert!(asleep.as_mut().poll(&mut context).is_ready());
    wake.remove_waiting();
}

/// Readers against an owner that publishes, writes in place, takes the copy away and brings it
/// back, while another cell reuses the same descriptors.
#[test]
fn readers_see_whole_versions_in_order() {
    let world = World::new();
    let done = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let world = world.clone();
            let done = done.clone();
            std::thread::spawn(move || {
                let mut last = 0;
                while !done.load(Ordering::Relaxed) {
                    let Some(bytes) = world.read() else { continue };
                    let version = version_of(&bytes);
                    assert!(version >= last, "read {last}, then {version}");
                    last = version;
                }
            })
        })
        .collect();
    let other = CopyCell::empty();
    for round in 1..=ROUNDS {
        match round % 4 {
            0 if world.cell.write_in_place(|bytes| stamp(bytes, round)) => {}
            1 => {
                drop(world.cell.take_idle(&world.copies));
                // Reuses the descriptor that was just given back.
                let mut foreign = world.copy_of(0xEE);
                foreign.as_mut_slice()[0] = 0;
                other.publish(foreign, &world.copies);
                other.detach(&world.copies);
                world.cell.publish(world.version(round), &world.copies);
            }
            _ => world.cell.publish(world.version(round), &world.copies),
        }
    }
    done.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.join().unwrap();
    }
    world.cell.detach(&world.copies);
    assert_eq!((world.arena.used_bytes(), world.copies.held_bytes()), (0, 0));
}
