//! The memory of the policies: an array that grows by chunks, and a table of entries over it.
//!
//! Invariant: the position of an entry stays the same for as long as it lives, and a vacant
//! position is used again before the table grows. Growing never moves an entry: ten million
//! entries are not copied in one insert, and no half of the memory stands empty after it. Pure;
//! called by the policies.

use std::ops::{Index, IndexMut};

/// Items of one chunk.
const CHUNK: usize = 1024;

/// An array in chunks of equal size.
#[derive(Debug)]
struct Chunked<T> {
    /// All full but the last one.
    chunks: Vec<Vec<T>>,
    len: usize,
}

impl<T> Default for Chunked<T> {
    fn default() -> Self {
        Chunked { chunks: Vec::new(), len: 0 }
    }
}

impl<T> Chunked<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn push(&mut self, item: T) {
        let chunk = self.len / CHUNK;
        if chunk == self.chunks.len() {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        self.chunks[chunk].push(item);
        self.len += 1;
    }

    fn clear(&mut self) {
        self.chunks.truncate(1);
        self.chunks.iter_mut().for_each(Vec::clear);
        self.len = 0;
    }

    /// Memory that is allocated, in bytes.
    fn memory_bytes(&self) -> usize {
        self.chunks.len() * CHUNK * size_of::<T>() + self.chunks.capacity() * size_of::<Vec<T>>()
    }
}

impl<T> Index<usize> for Chunked<T> {
    type Output = T;

    fn index(&self, at: usize) -> &T {
        &self.chunks[at / CHUNK][at % CHUNK]
    }
}

impl<T> IndexMut<usize> for Chunked<T> {
    fn index_mut(&mut self, at: usize) -> &mut T {
        &mut self.chunks[at / CHUNK][at % CHUNK]
    }
}

/// No entry.
pub(super) const NIL: u32 = u32::MAX;

/// A position of the table.
#[derive(Debug)]
pub(super) enum Slot<T> {
    Used(T),
    /// And the next vacant one.
    Vacant(u32),
}

/// Entries by position.
#[derive(Debug)]
pub(super) struct Table<T> {
    slots: Chunked<Slot<T>>,
    vacant: u32,
    len: usize,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table { slots: Chunked::default(), vacant: NIL, len: 0 }
    }
}

impl<T> Table<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn add(&mut self, item: T) -> u32 {
        self.len += 1;
        if self.vacant == NIL {
            // 2^32 entries of the smallest footprint, with what else is kept of each object, are
            // more than a tebibyte: a store runs out of memory before a table runs out of numbers.
            assert!(self.slots.len() < NIL as usize, "more entries than positions");
            self.slots.push(Slot::Used(item));
            return (self.slots.len() - 1) as u32;
        }
        let at = self.vacant;
        let Slot::Vacant(next) = self.slots[at as usize] else {
            unreachable!("what is on the list of vacant positions is vacant")
        };
        self.vacant = next;
        self.slots[at as usize] = Slot::Used(item);
        at
    }

    /// Takes an entry out. The last one gives the memory back.
    ///
    /// # Panics
    ///
    /// If there is no such entry, as all accesses do.
    pub(super) fn take(&mut self, at: u32) -> T {
        let before = std::mem::replace(&mut self.slots[at as usize], Slot::Vacant(self.vacant));
        let Slot::Used(item) = before else { no_entry(at) };
        self.vacant = at;
        self.len -= 1;
        if self.len == 0 {
            self.slots.clear();
            self.vacant = NIL;
        }
        item
    }

    /// Memory that is allocated, in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        self.slots.memory_bytes()
    }
}

impl<T> Index<u32> for Table<T> {
    type Output = T;

    fn index(&self, at: u32) -> &T {
        match &self.slots[at as usize] {
            Slot::Used(item) => item,
            Slot::Vacant(_) => no_entry(at),
        }
    }
}

impl<T> IndexMut<u32> for Table<T> {
    fn index_mut(&mut self, at: u32) -> &mut T {
        match &mut self.slots[at as usize] {
            Slot::Used(item) => item,
            Slot::Vacant(_) => no_entry(at),
        }
    }
}

/// Panics: the caller used a token that it gave back, so its ledger is wrong.
#[cold]
fn no_entry(at: u32) -> ! {
    panic!("token {at} names no entry: it was removed before")
}
