//! The state word of a host copy, model-checked: every interleaving of a reader, an evictor, a
//! writer in place and a writer of new versions, with the atomics of loom in place of the real
//! ones.
//!
//! The file under test is included as it is. What stands around it here is the shape of
//! `copy/mod.rs`: a cell that names one of several type-stable descriptors, and memory (a
//! loom cell) that loom itself watches for a reader beside a writer.

#![allow(missing_docs, clippy::unwrap_used, dead_code, unreachable_pub, unsafe_code)]

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

mod sync {
    pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
}

#[path = "../src/copy/word.rs"]
mod word;

use word::{Acquire, CopyWord, Detach, Release};

/// No descriptor.
const NONE: usize = usize::MAX;
/// What freed memory is overwritten with.
const POISON: u64 = u64::MAX;

struct Descriptor {
    word: CopyWord,
    memory: UnsafeCell<u64>,
}

struct Store {
    cell: AtomicUsize,
    descriptors: [Descriptor; 2],
}

// SAFETY: the protocol under test is what makes this true; loom reports it where it is not.
unsafe impl Sync for Store {}
// SAFETY: as above.
unsafe impl Send for Store {}

impl Store {
    fn new() -> Arc<Self> {
        let unused = || Descriptor { word: CopyWord::new(), memory: UnsafeCell::new(POISON) };
        Arc::new(Store { cell: AtomicUsize::new(NONE), descriptors: [unused(), unused()] })
    }

    fn fill(&self, at: usize, version: u64) {
        self.descriptors[at].memory.with_mut(|memory| {
            // SAFETY: the caller owns the descriptor; loom checks it.
            unsafe { *memory = version }
        });
    }

    /// As `CopyCell::publish`. Returns the descriptor that it replaced, if the caller owns that
    /// now.
    fn publish(&self, at: usize, version: u64) -> Option<usize> {
        self.fill(at, version);
        self.descriptors[at].word.publish();
        let before = self.cell.swap(at, Ordering::AcqRel);
        self.detach(before)
    }

    fn detach(&self, at: usize) -> Option<usize> {
        if at == NONE {
            return None;
        }
        match self.descriptors[at].word.detach() {
            Detach::Owned => {
                self.fill(at, POISON);
                Some(at)
            }
            Detach::Held => None,
        }
    }

    /// As `CopyCell::acquire` and the drop of the guard.
    fn read(&self) -> Option<u64> {
        loop {
            let at = self.cell.load(Ordering::Acquire);
            if at == NONE {
                return None;
            }
            let descriptor = &self.descriptors[at];
            match descriptor.word.try_acquire() {
                Acquire::Held { .. } => {
                    let current = self.cell.load(Ordering::Acquire) == at;
                    let version = current.then(|| {
                        descriptor.memory.with(|memory| {
                            // SAFETY: a reader's count is held; loom checks it.
                            unsafe { *memory }
                        })
                    });
                    if descriptor.word.release() == Release::LastOfDetached {
                        self.fill(at, POISON);
                    }
                    if current {
                        return version;
                    }
                }
                Acquire::Locked | Acquire::Gone => {
                    if self.cell.load(Ordering::Acquire) == at {
                        return None;
                    }
                }
            }
            thread::yield_now();
        }
    }

    /// As `CopyCell::take_idle`: the memory is given back.
    fn evict(&self, at: usize) -> bool {
        let descriptor = &self.descriptors[at];
        if !descriptor.word.try_lock() {
            return false;
        }
        self.cell.store(NONE, Ordering::Release);
        self.fill(at, POISON);
        descriptor.word.retire();
        true
    }

    /// As `CopyCell::write_in_place`.
    fn write_in_place(&self, at: usize, version: u64) -> bool {
        let descriptor = &self.descriptors[at];
        if !descriptor.word.try_lock() {
            return false;
        }
        self.fill(at, version);
        descriptor.word.unlock();
        true
    }
}

fn model(check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(check);
}

fn expect_one_of(read: Option<u64>, versions: &[u64]) {
    if let Some(version) = read {
        assert!(versions.contains(&version), "read {version:#x}, wrote {versions:?}");
    }
}

/// A reader sees the version that was published or finds none; never freed memory.
#[test]
fn evict_against_two_readers() {
    model(|| {
        let store = Store::new();
        assert_eq!(store.publish(0, 7), None);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let store = store.clone();
                thread::spawn(move || expect_one_of(store.read(), &[7]))
            })
            .collect();
        store.evict(0);
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

/// A writer in place never shows a reader half of a version.
#[test]
fn write_in_place_against_a_reader() {
    model(|| {
        let store = Store::new();
        assert_eq!(store.publish(0, 1), None);
        let reader = {
            let store = store.clone();
            thread::spawn(move || {
                expect_one_of(store.read(), &[1, 2]);
                expect_one_of(store.read(), &[1, 2]);
            })
        };
        store.write_in_place(0, 2);
        reader.join().unwrap();
    });
}

/// A new version beside a held old one: the old memory is freed by exactly one side, after the last
/// reader; a sequential reader never goes back to an older version.
#[test]
fn new_version_against_a_reader() {
    model(|| {
        let store = Store::new();
        assert_eq!(store.publish(0, 1), None);
        let reader = {
            let store = store.clone();
            thread::spawn(move || {
                let first = store.read().unwrap();
                let second = store.read().unwrap();
                assert!(first <= second, "read {first}, then {second}");
            })
        };
        store.publish(1, 2);
        reader.join().unwrap();
    });
}

/// A descriptor is taken from one object and serves another while a slow reader still holds its
/// address: the reader's count does no harm, and it never reads the other object's bytes.
#[test]
fn a_descriptor_serves_another_object() {
    model(|| {
        let store = Store::new();
        let other = Arc::new(AtomicUsize::new(NONE));
        assert_eq!(store.publish(0, 1), None);
        let reader = {
            let store = store.clone();
            thread::spawn(move || expect_one_of(store.read(), &[1]))
        };
        if store.evict(0) {
            // The same descriptor, published by another object's cell.
            store.fill(0, 99);
            store.descriptors[0].word.publish();
            other.store(0, Ordering::Release);
            match store.descriptors[0].word.detach() {
                Detach::Owned => store.fill(0, POISON),
                // The slow reader's count: it gives the memory back when it finds out.
                Detach::Held => {}
            }
        }
        reader.join().unwrap();
    });
}

/// The check can fail: a reader that does not look at the cell again reads the other object.
#[test]
#[should_panic(expected = "read 0x63")]
fn without_the_second_look_it_fails() {
    model(|| {
        let store = Store::new();
        assert_eq!(store.publish(0, 1), None);
        let reader = {
            let store = store.clone();
            thread::spawn(move || {
                let at = store.cell.load(Ordering::Acquire);
                if at == NONE {
                    return;
                }
                let descriptor = &store.descriptors[at];
                if let Acquire::Held { .. } = descriptor.word.try_acquire() {
                    // SAFETY: a reader's count is held.
                    let read = descriptor.memory.with(|memory| unsafe { *memory });
                    let _left = descriptor.word.release();
                    expect_one_of(Some(read), &[1]);
                }
            })
        };
        if store.evict(0) {
            store.fill(0, 99);
            store.descriptors[0].word.publish();
        }
        reader.join().unwrap();
    });
}
