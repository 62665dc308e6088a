//! The size classes of small objects.
//!
//! Invariant: classes grow; each is a multiple of 64 bytes, so that slots are cache-line aligned;
//! none wastes more than a fifth of a slot on an object above 512 bytes. Pure; called by `arena`
//! and `spans`.

use super::mapping::PAGE_BYTES;

/// How many classes there are.
pub(super) const CLASSES: usize = 8 + 24 + 12;
/// The largest object that is small, in bytes. Larger ones get pages of their own.
pub(super) const SMALL_MAX: usize = 32 * 1024;

/// The class of an object of `len` bytes, `1 <= len <= SMALL_MAX`.
pub(super) const fn class_of(len: usize) -> usize {
    debug_assert!(matches!(len, 1..=SMALL_MAX));
    match len {
        ..=512 => len.div_ceil(64) - 1,
        513..=4096 => 8 + stepped(len, 9, 8),
        _ => 32 + stepped(len, 12, 4),
    }
}

/// Position of `len` among `steps` equal steps to each doubling, from `2^from` on.
const fn stepped(len: usize, from: u32, steps: usize) -> usize {
    let doubling = (len - 1).ilog2();
    let base = 1 << doubling;
    (doubling - from) as usize * steps + (len - base).div_ceil(base / steps) - 1
}

/// The slot size of a class, in bytes.
pub(super) const fn slot_bytes(class: usize) -> usize {
    match class {
        ..8 => (class + 1) * 64,
        8..32 => step_bytes(class - 8, 9, 8),
        _ => step_bytes(class - 32, 12, 4),
    }
}

const fn step_bytes(position: usize, from: u32, steps: usize) -> usize {
    let base = 1 << (from as usize + position / steps);
    base + (position % steps + 1) * (base / steps)
}

/// Every class is a multiple of this many bytes.
const STEP: usize = 64;

/// The slot size of the class of a length, by the length in steps: each hit needs it.
static SLOT_BYTES: [u16; SMALL_MAX / STEP] = {
    let mut table = [0; SMALL_MAX / STEP];
    let mut steps = 0;
    while steps < table.len() {
        table[steps] = slot_bytes(class_of((steps + 1) * STEP)) as u16;
        steps += 1;
    }
    table
};

/// The slot size of the class of an object of `len` bytes, `1 <= len <= SMALL_MAX`.
pub(super) fn slot_bytes_of(len: usize) -> usize {
    SLOT_BYTES[(len - 1) / STEP].into()
}

/// The pages of one span of a class: small, so that a budget of some MiB has space for many
/// classes, and large enough that little of a span is left over.
pub(super) fn span_pages(class: usize) -> u64 {
    match slot_bytes(class) {
        ..=1024 => 4,
        1025..=4096 => 16,
        4097..=16384 => 16,
        _ => 28,
    }
}

/// How many slots a span of a class has.
pub(super) fn slots(class: usize) -> u32 {
    (span_pages(class) as usize * PAGE_BYTES / slot_bytes(class)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_gets_the_smallest_class_that_holds_it() {
        for len in 1..=SMALL_MAX {
            let class = class_of(len);
            assert!(slot_bytes(class) >= len, "{len}");
            assert_eq!(slot_bytes(class), slot_bytes_of(len), "{len}");
            assert!(class == 0 || slot_bytes(class - 1) < len, "{len}");
        }
        assert_eq!(class_of(SMALL_MAX), CLASSES - 1);
        assert_eq!(slot_bytes(class_of(4096)), 4096);
    }

    #[test]
    fn slots_are_aligned_and_waste_little() {
        for class in 0..CLASSES {
            let slot = slot_bytes(class);
            assert_eq!(slot % 64, 0);
            if class > 8 {
                assert!(slot * 4 <= (slot_bytes(class - 1) + 1) * 5, "class {class} of {slot}");
            }
            let span = span_pages(class) as usize * PAGE_BYTES;
            let left_over = span - slots(class) as usize * slot;
            assert!(left_over * 100 <= span * 22, "{slot}: {left_over} of {span}");
        }
    }
}
