//! The bodies of rounds and leases, byte by byte.
//!
//! Invariant: a body ends with the CRC-32C of whose it is and of all that is before it, so that one
//! which is damaged, or lies elsewhere, is never taken for one. Called by instances that answer a
//! round, and by the collector that asks.
//!
//! All numbers are little-endian. Magic of 8 bytes and format (u16). Of a round then: how many
//! candidates (u32), and of each the instance (16 bytes) and the number of the segment (u64). Of a
//! lease: how many rounds it answers (u32), and of each its number (16 bytes), how many candidates
//! (u32), and a bit for each, the lowest first. Last the checksum (u32).

use std::collections::BTreeMap;

use bytes::{Buf, BufMut, Bytes};
use uuid::Uuid;
use vmem_core::backend::crc32c;

/// The version of the formats that is written, and the only one that is read.
const FORMAT: u16 = 1;
const ROUND: [u8; 8] = *b"vmemrund";
const LEASE: [u8; 8] = *b"vmemleas";

/// The most candidates of a round.
pub(crate) const CANDIDATES_MAX: usize = 1 << 16;
/// The longest body of a round, in bytes.
pub(crate) const ROUND_LEN_MAX: u64 = 64 + 24 * CANDIDATES_MAX as u64;
/// The longest body of a lease, in bytes.
pub(crate) const LEASE_LEN_MAX: u64 = 4 << 20;

/// The instance that put a segment, and its number there.
pub(crate) type SegmentId = (Uuid, u64);

/// What an instance says of each round: of each candidate whether it uses it.
pub(crate) type Answers = BTreeMap<Uuid, Vec<bool>>;

/// What is wrong with a body, in words.
pub(crate) type Flaw = &'static str;

const SHORT: Flaw = "it is too short";

pub(crate) fn encode_round(id: Uuid, candidates: &[SegmentId]) -> Bytes {
    let mut body = begin(ROUND);
    body.put_u32_le(candidates.len() as u32);
    for (instance, segment) in candidates {
        body.put_slice(instance.as_bytes());
        body.put_u64_le(*segment);
    }
    seal(id, body)
}

pub(crate) fn decode_round(id: Uuid, body: &[u8]) -> Result<Vec<SegmentId>, Flaw> {
    let mut body = unseal(ROUND, id, body)?;
    let count = body.try_get_u32_le().map_err(|_| SHORT)?;
    let mut candidates = Vec::with_capacity(body.len() / 24);
    for _ in 0..count {
        let instance = uuid(&mut body)?;
        candidates.push((instance, body.try_get_u64_le().map_err(|_| SHORT)?));
    }
    end(body).map(|()| candidates)
}

pub(crate) fn encode_lease(id: Uuid, answers: &Answers) -> Bytes {
    let mut body = begin(LEASE);
    body.put_u32_le(answers.len() as u32);
    for (round, used) in answers {
        body.put_slice(round.as_bytes());
        body.put_u32_le(used.len() as u32);
        let bits = |used: &[bool]| {
            used.iter().rev().fold(0, |bits, is_used| bits << 1 | u8::from(*is_used))
        };
        body.extend(used.chunks(8).map(bits));
    }
    seal(id, body)
}

pub(crate) fn decode_lease(id: Uuid, body: &[u8]) -> Result<Answers, Flaw> {
    let mut body = unseal(LEASE, id, body)?;
    let count = body.try_get_u32_le().map_err(|_| SHORT)?;
    let mut answers = Answers::new();
    for _ in 0..count {
        let round = uuid(&mut body)?;
        let candidates = body.try_get_u32_le().map_err(|_| SHORT)? as usize;
        let bits = body.split_off(..candidates.div_ceil(8)).ok_or(SHORT)?;
        let is_used = |nth: usize| bits[nth / 8] >> (nth % 8) & 1 == 1;
        answers.insert(round, (0..candidates).map(is_used).collect());
    }
    end(body).map(|()| answers)
}

fn begin(magic: [u8; 8]) -> Vec<u8> {
    let mut body = Vec::new();
    body.put_slice(&magic);
    body.put_u16_le(FORMAT);
    body
}

fn seal(id: Uuid, mut body: Vec<u8>) -> Bytes {
    body.put_u32_le(sum_of(id, &body));
    body.into()
}

fn unseal(magic: [u8; 8], id: Uuid, body: &[u8]) -> Result<&[u8], Flaw> {
    let (mut body, mut sum) =
        body.split_last_chunk::<4>().map(|(a, b)| (a, &b[..])).ok_or(SHORT)?;
    if sum.get_u32_le() != sum_of(id, body) {
        return Err("it has a wrong checksum");
    }
    if body.split_off(..8) != Some(&magic) {
        return Err("it is something else");
    }
    match body.try_get_u16_le() {
        Ok(FORMAT) => Ok(body),
        Ok(_) => Err("it has an unknown format"),
        Err(_) => Err(SHORT),
    }
}

fn sum_of(id: Uuid, body: &[u8]) -> u32 {
    crc32c(&[id.as_bytes(), body].concat())
}

fn uuid(body: &mut &[u8]) -> Result<Uuid, Flaw> {
    let bytes = body.split_off(..16).ok_or(SHORT)?;
    Uuid::from_slice(bytes).map_err(|_| SHORT)
}

fn end(body: &[u8]) -> Result<(), Flaw> {
    if body.is_empty() { Ok(()) } else { Err("it is too long") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    #[test]
    fn bodies_are_read_as_they_were_written() {
        for count in [0, 1, 7, 8, 9, 100] {
            let candidates: Vec<_> = (0..count).map(|n| (id(n.into()), n << 40)).collect();
            let body = encode_round(id(1), &candidates);
            assert_eq!(decode_round(id(1), &body), Ok(candidates));
            let used = |of: u64| (0..count).map(|n| n % of == 0).collect::<Vec<bool>>();
            let answers = Answers::from([(id(1), used(3)), (id(2), used(2)), (id(3), vec![])]);
            assert_eq!(decode_lease(id(9), &encode_lease(id(9), &answers)), Ok(answers));
        }
    }

    #[test]
    fn damaged_bodies_are_refused() {
        let round = encode_round(id(1), &[(id(5), 6), (id(7), 8)]);
        let lease = encode_lease(id(1), &Answers::from([(id(2), vec![true, false])]));
        assert!(decode_round(id(2), &round).is_err(), "of another round");
        assert!(decode_lease(id(1), &round).is_err() && decode_round(id(1), &lease).is_err());
        for body in [&round, &lease] {
            for bit in 0..body.len() * 8 {
                let mut flipped = body.to_vec();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(decode_round(id(1), &flipped).is_err());
                assert!(decode_lease(id(1), &flipped).is_err());
            }
            for len in 0..body.len() {
                assert!(decode_round(id(1), &body[..len]).is_err());
                assert!(decode_lease(id(1), &body[..len]).is_err());
            }
        }
        let largest = encode_round(id(1), &vec![(id(5), 6); CANDIDATES_MAX]);
        assert!(largest.len() as u64 <= ROUND_LEN_MAX);
    }
}
