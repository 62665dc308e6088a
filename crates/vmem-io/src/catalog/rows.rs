//! The rows of the catalog, byte by byte. `docs/format.md` is their specification.
//!
//! Invariant: each row ends with the CRC-32C of its key and of what is before it, so that a row
//! which is not what was written, or is not where it was written, is never taken for one. Called by
//! the catalog.

use std::time::{Duration, SystemTime};

use bytes::{Buf, BufMut, Bytes};
use vmem_core::MemoryTier;
use vmem_core::backend::{
    CHUNK_BYTES, CatalogRecord, METADATA_LEN_MAX, Run, Runs, SEGMENT_CHUNKS, StoredChunk, crc32c,
};

/// The version of the format that is written, and the only one that is read.
pub(super) const FORMAT: u32 = 1;

/// A row that is not what was written, in words.
pub(super) type Flaw = &'static str;

/// The one row about the store itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) format: u32,
    /// What extents are rounded to, in bytes.
    pub(super) block_bytes: u32,
    /// How many names there are.
    pub(super) names: u64,
    /// The first number that neither an object nor a version has had.
    pub(super) next_id: u64,
    /// Commits so far: no two states of a catalog have the same.
    pub(super) commits: u64,
}

impl Head {
    pub(super) fn encode(&self, key: &[u8]) -> Vec<u8> {
        let mut row = Vec::with_capacity(36);
        row.put_u32_le(self.format);
        row.put_u32_le(self.block_bytes);
        row.put_u64_le(self.names);
        row.put_u64_le(self.next_id);
        row.put_u64_le(self.commits);
        sealed(key, row)
    }

    /// The format comes first and is read even if all behind it is of another version.
    pub(super) fn decode(key: &[u8], row: &[u8]) -> Result<Self, Flaw> {
        let mut body = unsealed(key, row)?;
        let format = body.try_get_u32_le().map_err(|_| SHORT)?;
        if format != FORMAT {
            return Ok(Head { format, ..Head::default() });
        }
        let head = Head {
            format,
            block_bytes: body.try_get_u32_le().map_err(|_| SHORT)?,
            names: body.try_get_u64_le().map_err(|_| SHORT)?,
            next_id: body.try_get_u64_le().map_err(|_| SHORT)?,
            commits: body.try_get_u64_le().map_err(|_| SHORT)?,
        };
        if !head.block_bytes.is_power_of_two() || head.block_bytes as usize > CHUNK_BYTES {
            return Err("a block size that is none");
        }
        all_of(body, head)
    }
}

/// What a name stands for.
pub(super) fn encode_record(name: &[u8], record: &CatalogRecord) -> Vec<u8> {
    let mut row = Vec::with_capacity(39 + record.metadata.len());
    row.put_u8(match record.home {
        MemoryTier::Vram => 0,
        MemoryTier::Host => 1,
        MemoryTier::Remote => 3,
        _ => 2,
    });
    row.put_u64_le(record.id);
    row.put_u64_le(record.version);
    row.put_u64_le(nanoseconds(record.modified));
    row.put_u64_le(record.len);
    row.put_u16_le(record.metadata.len() as u16);
    row.put_slice(&record.metadata);
    sealed(name, row)
}

pub(super) fn decode_record(name: &[u8], row: &[u8]) -> Result<CatalogRecord, Flaw> {
    let mut body = unsealed(name, row)?;
    let home = match body.try_get_u8().map_err(|_| SHORT)? {
        0 => MemoryTier::Vram,
        1 => MemoryTier::Host,
        2 => MemoryTier::Disk,
        3 => MemoryTier::Remote,
        _ => return Err("a tier that is none"),
    };
    let id = body.try_get_u64_le().map_err(|_| SHORT)?;
    let version = body.try_get_u64_le().map_err(|_| SHORT)?;
    let modified = body.try_get_u64_le().map_err(|_| SHORT)?;
    let len = body.try_get_u64_le().map_err(|_| SHORT)?;
    let metadata_len = usize::from(body.try_get_u16_le().map_err(|_| SHORT)?);
    if metadata_len > METADATA_LEN_MAX || body.remaining() != metadata_len {
        return Err("metadata of another length");
    }
    let metadata = Bytes::copy_from_slice(body);
    let modified = SystemTime::UNIX_EPOCH + Duration::from_nanos(modified);
    Ok(CatalogRecord { id, version, modified, len, home, metadata })
}

/// Since 1970; a time before, or after 2554, is stored as the nearest that can be.
fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Where the chunks of a segment are.
pub(super) fn encode_segment(key: (u64, u32), chunks: &[Option<StoredChunk>]) -> Vec<u8> {
    let mut row = Vec::with_capacity(8 + 17 * chunks.len());
    row.put_u32_le(chunks.len() as u32);
    for chunk in chunks {
        let Some(StoredChunk { runs, sum }) = chunk else {
            row.put_u8(0);
            continue;
        };
        row.put_u8(runs.len() as u8);
        row.put_u32_le(*sum);
        for Run { offset, footprint } in runs {
            row.put_u64_le(*offset);
            row.put_u32_le(*footprint);
        }
    }
    sealed(&segment_key(key), row)
}

pub(super) fn decode_segment(
    key: (u64, u32),
    row: &[u8],
) -> Result<Vec<Option<StoredChunk>>, Flaw> {
    let mut body = unsealed(&segment_key(key), row)?;
    let count = body.try_get_u32_le().map_err(|_| SHORT)? as usize;
    if count > SEGMENT_CHUNKS {
        return Err("a segment of another length");
    }
    let mut chunks = Vec::with_capacity(count);
    for _ in 0..count {
        let pieces = body.try_get_u8().map_err(|_| SHORT)?;
        if pieces == 0 {
            chunks.push(None);
            continue;
        }
        let sum = body.try_get_u32_le().map_err(|_| SHORT)?;
        let mut runs = Runs::new();
        for _ in 0..pieces {
            let offset = body.try_get_u64_le().map_err(|_| SHORT)?;
            let footprint = body.try_get_u32_le().map_err(|_| SHORT)?;
            if footprint == 0 || offset.checked_add(footprint.into()).is_none() {
                return Err("an extent that is none");
            }
            runs.push(Run { offset, footprint });
        }
        chunks.push(Some(StoredChunk { runs, sum }));
    }
    all_of(body, chunks)
}

const SHORT: Flaw = "a row that is too short";

fn segment_key((id, segment): (u64, u32)) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&id.to_le_bytes());
    key[8..].copy_from_slice(&segment.to_le_bytes());
    key
}

fn sum_of(key: &[u8], body: &[u8]) -> u32 {
    crc32c(&[&(key.len() as u32).to_le_bytes(), key, body].concat())
}

fn sealed(key: &[u8], mut row: Vec<u8>) -> Vec<u8> {
    row.put_u32_le(sum_of(key, &row));
    row
}

fn unsealed<'a>(key: &[u8], row: &'a [u8]) -> Result<&'a [u8], Flaw> {
    let (body, sum) = row.split_last_chunk::<4>().ok_or(SHORT)?;
    match u32::from_le_bytes(*sum) == sum_of(key, body) {
        true => Ok(body),
        false => Err("a row whose checksum does not fit"),
    }
}

fn all_of<T>(rest: &[u8], value: T) -> Result<T, Flaw> {
    if rest.is_empty() { Ok(value) } else { Err("a row that is too long") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_out_of_range_are_stored_as_the_nearest() {
        let second = Duration::from_secs(1);
        assert_eq!(nanoseconds(SystemTime::UNIX_EPOCH - second), 0);
        assert_eq!(nanoseconds(SystemTime::UNIX_EPOCH + second), 1_000_000_000);
        assert_eq!(nanoseconds(SystemTime::UNIX_EPOCH + second * (1 << 31) * 10), u64::MAX);
    }

    #[test]
    fn rows_come_back_and_every_flipped_bit_is_seen() {
        let head = Head { format: FORMAT, block_bytes: 512, names: 3, next_id: 9, commits: 4 };
        let record = CatalogRecord {
            id: 7,
            version: 9,
            modified: SystemTime::UNIX_EPOCH + Duration::new(1_764_000_000, 123_456_789),
            len: 1 << 40,
            home: MemoryTier::Disk,
            metadata: Bytes::from_static(b"beside it"),
        };
        let run = |offset, footprint| Run { offset, footprint };
        let whole = StoredChunk { runs: [run(4096, 65536)].into(), sum: 0xdead_beef };
        let pieces = vec![run(512, 1024), run(1 << 40, 64512)];
        let in_pieces = StoredChunk { runs: pieces.into(), sum: 7 };
        let chunks = vec![Some(whole), None, Some(in_pieces)];
        let rows = [
            head.encode(b"head"),
            encode_record(b"name", &record),
            encode_segment((7, 1), &chunks),
        ];
        let read = |at: usize, row: &[u8]| match at {
            0 => Head::decode(b"head", row).is_ok_and(|read| read == head),
            1 => decode_record(b"name", row).is_ok_and(|read| read == record),
            _ => decode_segment((7, 1), row).is_ok_and(|read| read == chunks),
        };
        for (at, row) in rows.iter().enumerate() {
            assert!(read(at, row));
            for bit in 0..row.len() * 8 {
                let mut flipped = row.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(!read(at, &flipped), "bit {bit} of row {at}");
            }
            assert!(!read(at, &row[1..]) && !read(at, &[]));
        }
        assert!(decode_record(b"eman", &rows[1]).is_err(), "the row of another name");
        assert!(decode_segment((7, 2), &rows[2]).is_err(), "another segment");
    }
}
