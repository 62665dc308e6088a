//! Memory for streams: what lies between the store and the peer of a reader or a writer.
//!
//! Invariant: a stream never waits for memory, so that a peer who does not read delays nobody. While
//! there is plenty it gets what it asks for, then less and less, and always the least with which it
//! gets on. What all streams have is counted, and beyond the least of each never above the reserve.
//! Called by `ObjectReader` and `ObjectWriter`, and by the tasks that serve them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One window gets at most this share of what is free, so that those who come later get some.
const SHARE: u64 = 8;

/// The reserve.
#[derive(Debug)]
pub(crate) struct Windows {
    capacity_bytes: u64,
    used_bytes: AtomicU64,
}

impl Windows {
    pub(crate) fn new(capacity_bytes: u64) -> Arc<Self> {
        Arc::new(Windows { capacity_bytes, used_bytes: AtomicU64::new(0) })
    }

    /// Memory for `wanted` bytes, or fewer, but `least` in any case.
    pub(crate) fn grant(self: &Arc<Self>, wanted: usize, least: usize) -> Window {
        let size = |used: u64| {
            let share = self.capacity_bytes.saturating_sub(used) / SHARE;
            (wanted as u64).min(share).max(least as u64)
        };
        let more = |used: u64| Some(used + size(used));
        let before = self.used_bytes.try_update(Ordering::Relaxed, Ordering::Relaxed, more);
        let capacity = size(before.unwrap_or_else(|used| used));
        let windows = self.clone();
        Window { bytes: Vec::new(), capacity: capacity as usize, windows }
    }

    /// What all windows may hold now.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }
}

/// Memory of one stream, charged until it is dropped. It is empty at first, and takes no more than
/// was put in.
#[derive(Debug)]
pub(crate) struct Window {
    bytes: Vec<u8>,
    capacity: usize,
    windows: Arc<Windows>,
}

impl Window {
    /// How many bytes fit in, all in all.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many bytes still fit in.
    pub(crate) fn free(&self) -> usize {
        self.capacity - self.bytes.len()
    }

    /// Appends the front of `data`, as much as fits in. Returns how much that was.
    pub(crate) fn fill(&mut self, data: &[u8]) -> usize {
        let fits = data.len().min(self.free());
        self.bytes.extend_from_slice(&data[..fits]);
        fits
    }

    /// Makes it `len` bytes long.
    pub(crate) fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity, "a window holds what was granted");
        self.bytes.resize(len, 0);
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl AsRef<[u8]> for Window {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let before = self.windows.used_bytes.fetch_sub(self.capacity as u64, Ordering::Relaxed);
        assert!(before >= self.capacity as u64, "a window is given back once");
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
        while windows.used_bytes() < (1 << 20) - (32 << 10) {
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
        assert_eq!((window.fill(b"seven b"), window.fill(b"eight by")), (7, 3));
        assert_eq!((window.as_slice(), window.free()), (&b"seven beig"[..], 0));
        window.set_len(4);
        window.as_mut_slice()[0] = b'S';
        assert_eq!(window.as_ref(), b"Seve");
    }
}
