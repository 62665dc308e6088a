//! The bytes of a version: when it was written, then its number over and over.
//!
//! Invariant: bytes that pass the check are those of one version, whole. Made by the writer,
//! checked by the readers.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

/// Bytes of one word.
const WORD: usize = 8;

/// The bytes of version `number`, written now.
pub(crate) fn bytes(number: u64, len: usize) -> Vec<u8> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
    let words = std::iter::once(now).chain(std::iter::repeat(number));
    words.flat_map(u64::to_le_bytes).take(len).collect()
}

/// The number of the version that these bytes are, and how long ago it was written.
///
/// # Errors
///
/// If they are not those of one version.
pub(crate) fn check(bytes: &[u8]) -> Result<(u64, Duration)> {
    let word = |at: usize| {
        let word = bytes.get(at * WORD..(at + 1) * WORD).and_then(|word| word.try_into().ok());
        word.map(u64::from_le_bytes).context("a version has two words at least")
    };
    let number = word(1)?;
    let expected = number.to_le_bytes();
    let is_whole = bytes[WORD..].chunks(WORD).all(|chunk| *chunk == expected[..chunk.len()]);
    ensure!(is_whole, "a version that is none: the first word says {number}, others do not");
    let written = SystemTime::UNIX_EPOCH + Duration::from_micros(word(0)?);
    Ok((number, written.elapsed().unwrap_or_default()))
}
