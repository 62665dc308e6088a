//! The objects of the bucket that are generations of names, byte by byte.
//!
//! Invariant: a body ends with the CRC-32C of the name, the generation and all that is before it,
//! so that one which is not what was written, or lies elsewhere, is never taken for one. Magic,
//! format and checksum are where they are in every later format too. Called by the catalog.
//!
//! All numbers are little-endian. Magic of 8 bytes, format (u16), kind (u8: 0 tombstone, 1 object),
//! token (16 bytes), name (u16 length, bytes). Of an object then: home (u8), id, version, modified
//! in nanoseconds since 1970, length (u64 each), metadata (u16 length, bytes), chunks (u32 count),
//! and of each chunk: 0, or 1 with instance (16 bytes), segment, begin (u64 each), length and
//! checksum (u32 each). Last the checksum (u32) of name (u32 length, bytes), generation (u64) and
//! body.

use std::time::{Duration, SystemTime};

use bytes::{Buf, BufMut, Bytes};
use object_store::path::Path;
use uuid::Uuid;
use vmem_core::backend::{CHUNK_BYTES, CatalogRecord, METADATA_LEN_MAX, crc32c};
use vmem_core::{MemoryTier, VirtualMemoryError};

use super::paths::shown;
use super::places::Place;

/// The version of the format that is written, and the only one that is read.
const FORMAT: u16 = 1;
const MAGIC: [u8; 8] = *b"vmemname";
const TOMBSTONE: u8 = 0;
const OBJECT: u8 = 1;
/// What a chunk with a place takes.
const CHUNK_LEN: usize = 41;
/// The most chunks of an object.
pub(super) const CHUNKS_MAX: u64 = 3 << 19;
/// The longest body, in bytes.
pub(super) const BODY_LEN_MAX: u64 = 64 << 20;

/// Which attempt made a generation.
pub(super) type Token = [u8; 16];

/// What is wrong with a body, in words.
type Flaw = &'static str;

/// What a generation says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Body {
    pub(super) token: Token,
    /// None for a tombstone.
    pub(super) object: Option<Object>,
}

/// An object with the places of its chunks; none is a chunk of zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) record: CatalogRecord,
    pub(super) places: Vec<Option<Place>>,
}

/// The body of an attempt at this generation of the name.
pub(super) fn encode(name: &str, generation: u64, token: Token, object: Option<&Object>) -> Bytes {
    let chunks = object.map_or(0, |object| object.places.len());
    let mut body = Vec::with_capacity(256 + name.len() + CHUNK_LEN * chunks);
    body.put_slice(&MAGIC);
    body.put_u16_le(FORMAT);
    body.put_u8(if object.is_some() { OBJECT } else { TOMBSTONE });
    body.put_slice(&token);
    body.put_u16_le(name.len() as u16);
    body.put_slice(name.as_bytes());
    if let Some(Object { record, places }) = object {
        put_record(&mut body, record);
        body.put_u32_le(places.len() as u32);
        places.iter().for_each(|place| put_place(&mut body, place.as_ref()));
    }
    body.put_u32_le(sum_of(name, generation, &body));
    body.into()
}

fn put_record(body: &mut Vec<u8>, record: &CatalogRecord) {
    body.put_u8(match record.home {
        MemoryTier::Vram => 0,
        MemoryTier::Host => 1,
        MemoryTier::Remote => 3,
        _ => 2,
    });
    body.put_u64_le(record.id);
    body.put_u64_le(record.version);
    body.put_u64_le(nanoseconds(record.modified));
    body.put_u64_le(record.len);
    body.put_u16_le(record.metadata.len() as u16);
    body.put_slice(&record.metadata);
}

fn put_place(body: &mut Vec<u8>, place: Option<&Place>) {
    let Some(place) = place else { return body.put_u8(0) };
    body.put_u8(1);
    body.put_slice(place.instance.as_bytes());
    body.put_u64_le(place.segment);
    body.put_u64_le(place.at);
    body.put_u32_le(place.len);
    body.put_u32_le(place.sum);
}

/// Reads the body at this path, which is that of the name and generation.
///
/// # Errors
///
/// `UnknownFormat` for one of another format, `Damaged` for all else that was not written.
pub(super) fn decode(
    name: &str,
    generation: u64,
    path: &Path,
    body: &[u8],
) -> Result<Body, VirtualMemoryError> {
    let damaged = |flaw: Flaw| VirtualMemoryError::Damaged {
        path: shown(path),
        reason: format!("{name:?}: {flaw}").into(),
    };
    let mut body = unsealed(name, generation, body).map_err(damaged)?;
    let format = format_of(&mut body).map_err(damaged)?;
    if format != FORMAT {
        return Err(VirtualMemoryError::UnknownFormat {
            path: shown(path),
            found: format.into(),
            known: FORMAT.into(),
        });
    }
    decode_known(name, body).map_err(damaged)
}

const SHORT: Flaw = "a body that is too short";

fn format_of(body: &mut &[u8]) -> Result<u16, Flaw> {
    if take::<8>(body)? != MAGIC {
        return Err("a body that is of no name");
    }
    body.try_get_u16_le().map_err(|_| SHORT)
}

fn decode_known(name: &str, mut body: &[u8]) -> Result<Body, Flaw> {
    let kind = body.try_get_u8().map_err(|_| SHORT)?;
    let token = take::<16>(&mut body)?;
    if take_short(&mut body)? != name.as_bytes() {
        return Err("a body of another name");
    }
    let object = match kind {
        TOMBSTONE => None,
        OBJECT => Some(take_object(&mut body)?),
        _ => return Err("a kind that is none"),
    };
    if !body.is_empty() {
        return Err("a body that is too long");
    }
    Ok(Body { token, object })
}

fn take_object(body: &mut &[u8]) -> Result<Object, Flaw> {
    let record = take_record(body)?;
    let count = u64::from(body.try_get_u32_le().map_err(|_| SHORT)?);
    if count != record.len.div_ceil(CHUNK_BYTES as u64) || count > CHUNKS_MAX {
        return Err("another number of chunks than the object has");
    }
    let places = (0..count).map(|_| take_place(body)).collect::<Result<_, _>>()?;
    Ok(Object { record, places })
}

fn take_record(body: &mut &[u8]) -> Result<CatalogRecord, Flaw> {
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
    let metadata = Bytes::copy_from_slice(take_short(body)?);
    if metadata.len() > METADATA_LEN_MAX {
        return Err("metadata of another length");
    }
    let modified = SystemTime::UNIX_EPOCH + Duration::from_nanos(modified);
    Ok(CatalogRecord { id, version, modified, len, home, metadata })
}

fn take_place(body: &mut &[u8]) -> Result<Option<Place>, Flaw> {
    match body.try_get_u8().map_err(|_| SHORT)? {
        0 => return Ok(None),
        1 => {}
        _ => return Err("a chunk that is none"),
    }
    let instance = Uuid::from_bytes(take::<16>(body)?);
    let segment = body.try_get_u64_le().map_err(|_| SHORT)?;
    let at = body.try_get_u64_le().map_err(|_| SHORT)?;
    let len = body.try_get_u32_le().map_err(|_| SHORT)?;
    let sum = body.try_get_u32_le().map_err(|_| SHORT)?;
    Ok(Some(Place { instance, segment, at, len, sum }))
}

fn take<const N: usize>(body: &mut &[u8]) -> Result<[u8; N], Flaw> {
    let (taken, rest) = body.split_first_chunk::<N>().ok_or(SHORT)?;
    *body = rest;
    Ok(*taken)
}

/// Bytes behind their length.
fn take_short<'a>(body: &mut &'a [u8]) -> Result<&'a [u8], Flaw> {
    let len = usize::from(body.try_get_u16_le().map_err(|_| SHORT)?);
    let (taken, rest) = body.split_at_checked(len).ok_or(SHORT)?;
    *body = rest;
    Ok(taken)
}

/// Since 1970; a time before, or after 2554, is stored as the nearest that can be.
fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn sum_of(name: &str, generation: u64, body: &[u8]) -> u32 {
    let len = (name.len() as u32).to_le_bytes();
    crc32c(&[&len, name.as_bytes(), &generation.to_le_bytes(), body].concat())
}

fn unsealed<'a>(name: &str, generation: u64, body: &'a [u8]) -> Result<&'a [u8], Flaw> {
    let (body, sum) = body.split_last_chunk::<4>().ok_or(SHORT)?;
    match u32::from_le_bytes(*sum) == sum_of(name, generation, body) {
        true => Ok(body),
        false => Err("a body whose checksum does not fit"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object() -> Object {
        let record = CatalogRecord {
            id: 7,
            version: 9,
            modified: SystemTime::UNIX_EPOCH + Duration::new(1_764_000_000, 123_456_789),
            len: 3 * CHUNK_BYTES as u64 - 5,
            home: MemoryTier::Remote,
            metadata: Bytes::from_static(b"beside it"),
        };
        let instance = Uuid::from_u128(1 << 100 | 5);
        let place = Place { instance, segment: 3, at: 1 << 33, len: 65_536, sum: 0xdead_beef };
        Object { record, places: vec![Some(place), None, Some(Place { len: 65_531, ..place })] }
    }

    #[test]
    fn bodies_come_back_and_every_flipped_bit_is_seen() {
        let path = Path::from("a/names/6e/0000000000000005");
        for object in [Some(object()), None] {
            let written = encode("n", 5, [4; 16], object.as_ref());
            let expected = Body { token: [4; 16], object };
            let read = |name: &str, generation, body: &[u8]| decode(name, generation, &path, body);
            assert_eq!(read("n", 5, &written).unwrap(), expected);
            for bit in 0..written.len() * 8 {
                let mut flipped = written.to_vec();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let refused = read("n", 5, &flipped);
                assert!(matches!(refused, Err(VirtualMemoryError::Damaged { .. })), "bit {bit}");
            }
            for len in 0..written.len() {
                assert!(read("n", 5, &written[..len]).is_err(), "{len} bytes");
            }
            assert!(read("m", 5, &written).is_err(), "the body of another name");
            assert!(read("n", 6, &written).is_err(), "the body of another generation");
        }
    }

    #[test]
    fn sealed_bodies_with_flaws_are_refused() {
        let path = Path::from("n");
        let reseal = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut body = encode("n", 1, [0; 16], Some(&object())).to_vec();
            body.truncate(body.len() - 4);
            change(&mut body);
            body.put_u32_le(sum_of("n", 1, &body));
            decode("n", 1, &path, &body)
        };
        assert!(reseal(&|_| {}).is_ok());
        let other = reseal(&|body| body[8] = 2);
        let is_of_format_2 =
            matches!(other, Err(VirtualMemoryError::UnknownFormat { found: 2, known: 1, .. }));
        assert!(is_of_format_2, "{other:?}");
        type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
        let changes: [Change<'_>; 5] = [
            &|body| body[0] = b'V',
            &|body| body[10] = 2,
            &|body| body[29] = b'm',
            &|body| body.push(0),
            &|body| body.truncate(body.len() - 1),
        ];
        for (at, change) in changes.into_iter().enumerate() {
            let refused = reseal(change);
            let is_damaged = matches!(refused, Err(VirtualMemoryError::Damaged { .. }));
            assert!(is_damaged, "change {at}: {refused:?}");
        }
    }

    #[test]
    fn longest_body_fits_in_its_bound() {
        let longest = CHUNK_LEN as u64 * CHUNKS_MAX + 2 * METADATA_LEN_MAX as u64;
        assert!(longest < BODY_LEN_MAX, "{longest}");
    }
}
