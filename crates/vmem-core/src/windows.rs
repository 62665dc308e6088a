//! Memory for streams: what lies between the store and the peer of a reader or a writer.
//!
//! Invariant: a stream never waits for memory, so that a peer that does not read delays no other
//! stream. While there is plenty it gets what it asks for, then less and less, and always the least
//! with which it can go on. What all streams have is counted, and beyond the least of each never
//! above the reserve. Called by `ObjectReader` and `ObjectWriter`, and by the tasks that serve
//! them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::locks::{self, Lock};
use aligned_vec::{AVec, ConstAlign};

/// One window gets at most this share of what is free, so that later streams get some.
const SHARE: u64 = 4;
/// Memory of this alignment goes to and from disk as it is.
const ALIGNMENT: usize = 4096;

type Memory = AVec<u8, ConstAlign<ALIGNMENT>>;

/// The reserve.
#[derive(Debug)]
pub(crate) struct Windows {
    capacity_bytes: u64,
    /// Changed under the lock of `spare`: both together keep to the reserve.
    used_bytes: AtomicU64,
    spare: Lock<Spare, { locks::WINDOWS }>,
}

/// Memory that windows have left for the next ones: fresh pages cost more than a copy does.
#[derive(Debug, Default)]
struct Spare {
    memory: Vec<Memory>,
    bytes: u64,
}

impl Windows {
    pub(crate) fn new(capacity_bytes: u64) -> Arc<Self> {
        let used_bytes = AtomicU64::new(0);
        Arc::new(Windows { capacity_bytes, used_bytes, spare: Lock::default() })
    }

    /// Memory for `wanted` bytes, or fewer, but `least` in any case.
    pub(crate) fn grant(self: &Arc<Self>, wanted: usize, least: usize) -> Window {
        self.grant_within(u64::MAX, wanted, least).expect("invariant: no limit, no refusal")
    }

    /// As `grant`, for a stream that has another window: none where the reserve has no space for
    /// the least.
    pub(crate) fn grant_more(self: &Arc<Self>, wanted: usize, least: usize) -> Option<Window> {
        self.grant_within(self.capacity_bytes, wanted, least)
    }

    fn grant_within(self: &Arc<Self>, limit: u64, wanted: usize, least: usize) -> Option<Window> {
        let mut spare = self.spare.lock();
        let before = self.used_bytes.load(Ordering::Relaxed);
        let share = self.capacity_bytes.saturating_sub(before) / SHARE;
        // Few sizes: memory is used again for windows of the same one.
        let share = (share + 1).next_power_of_two() / 2;
        let capacity = (wanted as u64).min(share).max(least as u64);
        let used = before + capacity;
        if used > limit {
            return None;
        }
        self.used_bytes.store(used, Ordering::Relaxed);
        let (memory, dropped) = self.take_spare(&mut spare, capacity as usize, used);
        drop(spare);
        drop(dropped);
        Some(Window { memory, len: 0, capacity: capacity as usize, windows: self.clone() })
    }

    /// What all windows may hold now.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Memory of another window, if there is some of this size, or else empty memory; and what
    /// there is no space for any more. With what is used there is never more than the reserve.
    fn take_spare(&self, spare: &mut Spare, capacity: usize, used: u64) -> (Memory, Vec<Memory>) {
        let mut dropped = Vec::new();
        // What a window takes is what it is charged, but for a rounding.
        let fits = |memory: &Memory| (capacity..=capacity + ALIGNMENT).contains(&memory.capacity());
        let found = spare.memory.iter().rposition(fits);
        let memory = found.map(|at| spare.take(at));
        while spare.bytes > 0 && used + spare.bytes > self.capacity_bytes {
            dropped.push(spare.take(0));
        }
        let all = used + spare.bytes;
        assert!(spare.bytes == 0 || all <= self.capacity_bytes, "{all} bytes beyond the reserve");
        (memory.unwrap_or_else(|| Memory::new(0)), dropped)
    }

    /// Keeps the memory of a window for the next one, as long as there are others.
    fn give_back(&self, memory: Memory, charged: u64) {
        let mut spare = self.spare.lock();
        let before = self.used_bytes.load(Ordering::Relaxed);
        assert!(before >= charged, "a window is given back once");
        let used = before - charged;
        let bytes = memory.capacity() as u64;
        self.used_bytes.store(used, Ordering::Relaxed);
        if used == 0 {
            let all = std::mem::take(&mut *spare);
            drop(spare);
            return drop(all);
        }
        if bytes > 0 && used + spare.bytes + bytes <= self.capacity_bytes {
            spare.bytes += bytes;
            spare.memory.push(memory);
        }
    }
}

impl Spare {
    fn take(&mut self, at: usize) -> Memory {
        let memory = self.memory.swap_remove(at);
        assert!(self.bytes >= memory.capacity() as u64, "spare memory is counted");
        self.bytes -= memory.capacity() as u64;
        memory
    }
}

/// Memory of one stream, charged until it is dropped. It is empty at first.
#[derive(Debug)]
pub(crate) struct Window {
    /// Made when it is needed; longer than `len` where it was used before.
    memory: Memory,
    len: usize,
    capacity: usize,
    windows: Arc<Windows>,
}

impl Window {
    /// How many bytes fit in, all in all.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Appends the front of `data`, as much as fits in. Returns how much that was.
    pub(crate) fn fill(&mut self, data: &[u8]) -> usize {
        let fits = data.len().min(self.capacity - self.len);
        let start = self.len;
        let end = self.len + fits;
        if self.memory.len() < end {
            self.memory.reserve(self.capacity - self.memory.len());
            self.memory.truncate(start);
            self.memory.extend_from_slice(&data[..fits]);
        } else {
            self.memory[start..end].copy_from_slice(&data[..fits]);
        }
        self.len = end;
        fits
    }

    /// Makes it `len` bytes long, whatever is in it.
    pub(crate) fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity, "a window holds what was granted");
        if self.memory.len() < len {
            self.memory.reserve(self.capacity - self.memory.len());
            self.memory.resize(len, 0);
        }
        self.len = len;
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.memory[..self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

impl AsRef<[u8]> for Window {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let memory = std::mem::replace(&mut self.memory, Memory::new(0));
        self.windows.give_back(memory, self.capacity as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_get_smaller_and_never_take_more_than_the_reserve() {
        let windows = Windows::new(1 << 20);
        let mut held: Vec<_> = (0..4).map(|_| windows.grant(64 << 10, 4 << 10)).collect();
        assert!(held.iter().all(|window| window.capacity() == 64 << 10));
        assert_eq!(windows.grant(usize::MAX, 1).capacity(), 128 << 10, "a power of two");
        while windows.used_bytes() < (1 << 20) - (16 << 10) {
            let before = held.last().map_or(0, Window::capacity);
            held.push(windows.grant(64 << 10, 4 << 10));
            assert!(held.last().is_some_and(|window| window.capacity() <= before));
            assert!(windows.used_bytes() <= 1 << 20);
        }
        // From here on the least of each comes on top.
        let full = windows.used_bytes();
        let least: Vec<_> = (0..100).map(|_| windows.grant(64 << 10, 4 << 10)).collect();
        assert!(least.iter().all(|window| window.capacity() == 4 << 10));
        assert_eq!(windows.used_bytes(), full + 100 * (4 << 10));
        drop((held, least));
        assert_eq!(windows.used_bytes(), 0);
    }

    #[test]
    fn a_window_takes_what_fits() {
        let mut window = Windows::new(1 << 20).grant(10, 1);
        assert_eq!((window.fill(b"seven, "), window.fill(b"and more")), (7, 3));
        assert_eq!(window.fill(b"more"), 0);
        assert_eq!(window.as_slice(), b"seven, and");
        window.set_len(5);
        window.as_mut_slice()[0] = b'S';
        assert_eq!(window.as_ref(), b"Seven");
    }

    #[test]
    fn memory_is_used_again_within_the_reserve_and_goes_with_the_last_window() {
        let windows = Windows::new(1 << 20);
        let other = windows.grant(4 << 10, 1);
        for round in 0..100_u8 {
            let mut window = windows.grant(64 << 10, 1);
            window.fill(&[round; 60 << 10]);
            assert_eq!(window.fill(&[!round; 60 << 10]), 4 << 10);
            assert!(window.as_slice()[..60 << 10].iter().all(|&byte| byte == round));
            assert!(window.as_slice()[60 << 10..].iter().all(|&byte| byte == !round));
        }
        assert_eq!(windows.spare.lock().memory.len(), 1, "one window after the other");
        let many: Vec<_> = (0..20).map(|_| windows.grant(1 << 20, 1 << 10)).collect();
        let spare = windows.spare.lock().bytes;
        assert!(windows.used_bytes() + spare <= 1 << 20);
        drop(many);
        drop(other);
        assert_eq!((windows.used_bytes(), windows.spare.lock().bytes), (0, 0));
    }
}
