//! Bytes that need no storage.
//!
//! Invariant: the byte at an offset depends on the key and that offset alone, so a range can be
//! made, or compared, without what is before it. Called by the model, and by tests that want bytes
//! which tell where they belong.

use bytes::Bytes;

use crate::seed::mix;

/// The contents of one version of one object.
///
/// ```
/// use vmem_testkit::Pattern;
///
/// let pattern = Pattern::new(1, 2);
/// let bytes = pattern.bytes(5, 100);
/// assert_eq!(pattern.mismatch(5, &bytes), None);
/// assert_eq!(pattern.mismatch(6, &bytes), Some(0));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    key: u64,
}

const WORD: usize = 8;

impl Pattern {
    /// The pattern of a version, under a seed.
    pub fn new(seed: u64, version: u64) -> Self {
        Pattern { key: mix(mix(seed) ^ version) }
    }

    /// Writes the bytes from `offset` on.
    pub fn fill(&self, offset: u64, buf: &mut [u8]) {
        let (head, word) = head(offset, buf.len());
        let (first, rest) = buf.split_at_mut(head.len());
        first.copy_from_slice(&self.word(offset / WORD as u64)[head]);
        let mut chunks = rest.chunks_exact_mut(WORD);
        let mut word = word;
        for chunk in &mut chunks {
            chunk.copy_from_slice(&self.word(word));
            word += 1;
        }
        let tail = chunks.into_remainder();
        let len = tail.len();
        tail.copy_from_slice(&self.word(word)[..len]);
    }

    /// Index of the first byte of `buf` that is not the one of the pattern from `offset` on.
    pub fn mismatch(&self, offset: u64, buf: &[u8]) -> Option<usize> {
        let (head, mut word) = head(offset, buf.len());
        let (first, rest) = buf.split_at(head.len());
        let mut at = head.len();
        if let Some(index) = differs(first, &self.word(offset / WORD as u64)[head]) {
            return Some(index);
        }
        let chunks = rest.chunks_exact(WORD);
        let tail = chunks.remainder();
        for chunk in chunks {
            let expected = self.word(word);
            if chunk != expected {
                return differs(chunk, &expected).map(|index| at + index);
            }
            word += 1;
            at += WORD;
        }
        differs(tail, &self.word(word)[..tail.len()]).map(|index| at + index)
    }

    /// `len` bytes from `offset` on.
    pub fn bytes(&self, offset: u64, len: usize) -> Bytes {
        let mut bytes = vec![0; len];
        self.fill(offset, &mut bytes);
        bytes.into()
    }

    fn word(&self, index: u64) -> [u8; WORD] {
        mix(self.key.wrapping_add(index.wrapping_mul(0xd6e8_feb8_6659_fd93))).to_le_bytes()
    }
}

/// The part of the first word that `len` bytes from `offset` begin with, where they do not begin
/// at a word, and the index of the word after it.
fn head(offset: u64, len: usize) -> (std::ops::Range<usize>, u64) {
    let within = (offset % WORD as u64) as usize;
    match within {
        0 => (0..0, offset / WORD as u64),
        _ => (within..WORD.min(within + len), offset / WORD as u64 + 1),
    }
}

fn differs(left: &[u8], right: &[u8]) -> Option<usize> {
    left.iter().zip(right).position(|(left, right)| left != right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_is_the_same_as_within_the_whole() {
        let pattern = Pattern::new(3, 4);
        let whole = pattern.bytes(0, 100);
        for start in 0..40 {
            for end in start..=100 {
                assert_eq!(pattern.bytes(start as u64, end - start), whole[start..end]);
                assert_eq!(pattern.mismatch(start as u64, &whole[start..end]), None);
            }
        }
    }

    #[test]
    fn every_changed_byte_is_found() {
        let pattern = Pattern::new(3, 4);
        for offset in 0..9 {
            let bytes = pattern.bytes(offset, 50).to_vec();
            for at in 0..50 {
                let mut changed = bytes.clone();
                changed[at] ^= 0x10;
                assert_eq!(pattern.mismatch(offset, &changed), Some(at));
            }
        }
    }

    #[test]
    fn keys_are_apart() {
        let bytes = Pattern::new(1, 1).bytes(0, 64);
        assert!(Pattern::new(1, 2).mismatch(0, &bytes).is_some());
        assert!(Pattern::new(2, 1).mismatch(0, &bytes).is_some());
        assert!(Pattern::new(1, 1).mismatch(64, &bytes).is_some());
    }
}
