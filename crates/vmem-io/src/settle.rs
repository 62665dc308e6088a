//! The verification of what was read.
//!
//! Invariant: a chunk passes only if its CRC-32C is the one that was sealed into its extent, and
//! what was never written is zeros. Called by the disk tier.

use vmem_core::backend::{IoBuf, ReadChunk, Slices, TierError, crc32c};

/// Verifies what was read, chunk by chunk, and makes the zeros of what was never written. After
/// an unexpected end of the file (`cut`) the first chunk that does not verify is the one that is
/// missing.
pub(crate) async fn settle(
    chunks: Vec<ReadChunk>,
    mut buf: IoBuf,
    cut: bool,
) -> (IoBuf, Result<(), TierError>) {
    let mut slices = Slices::default();
    for (chunk, ReadChunk { extent, at }) in chunks.iter().enumerate() {
        let bytes = &mut buf[*at..at + extent.len() as usize];
        slices.took(bytes.len()).await;
        match extent.sum() {
            None => bytes.fill(0),
            Some(expected) => {
                let actual = crc32c(bytes);
                if actual != expected {
                    let actual = if cut { 0 } else { actual };
                    let corrupt = TierError::Corrupt { chunk, expected, actual };
                    return (buf, Err(corrupt));
                }
            }
        }
    }
    (buf, Ok(()))
}
