//! The operations of a call: what is aligned goes as it is, the rest through bounce buffers.
//!
//! Invariant: the operations of a call cover each of its bytes once, and none is longer than one
//! transfer, or than its bounce buffer. Called by `Job` when it is made.

use std::io::{self, IoSlice};
use std::ops::Range;

use bytes::Bytes;
use vmem_core::backend::IoBuf;

use super::op::{Memory, Op};
use super::{Alignment, BOUNCE_MAX, Kind, ReadPiece, Region, WriteRun};

/// The longest single operation, in bytes. Longer transfers are several, which run at once.
pub(super) const TRANSFER_MAX: usize = 1024 * 1024;
/// Aligned memory shorter than this is gathered with its neighbours rather than sent alone; and a
/// read up to this long goes through one bounce buffer rather than in two parts.
const WORTH_ALONE: usize = 64 * 1024;
/// As many parts as one system call takes; the common `IOV_MAX`.
const PARTS_MAX: usize = 1024;

pub(super) fn plan_read(
    ops: &mut Vec<Op>,
    buf: &mut IoBuf,
    piece: &ReadPiece,
    align: Alignment,
) -> io::Result<()> {
    let target = buf.get_mut(piece.range.clone()).ok_or_else(outside)?;
    check_end(piece.offset, target.len() as u64)?;
    let len = target.len();
    let region = Region::of_mut(target);
    let block = align.offset as usize;
    let begins =
        piece.offset.is_multiple_of(block as u64) && region.is_aligned(align.memory as usize);
    let whole = len - len % block;
    let direct = match begins {
        true if whole == len || len > WORTH_ALONE => whole,
        _ => 0,
    };
    for part in parts_of(direct) {
        ops.push(Op::direct(Kind::Read, piece.offset + part.start as u64, region.part(part)));
    }
    let mut at = direct;
    while at < len {
        let offset = piece.offset + at as u64;
        let from = (offset % block as u64) as usize;
        let take = (BOUNCE_MAX - from).min(len - at);
        let start = piece.range.start + at;
        let memory = Memory::Scatter { from, to: start..start + take, bounce: None };
        let read = (from + take).next_multiple_of(block) as u64;
        let need = (from + take) as u64;
        ops.push(Op { memory, need, ..Op::new(Kind::Read, offset - from as u64, read) });
        at += take;
    }
    Ok(())
}

pub(super) fn plan_write(
    ops: &mut Vec<Op>,
    number: usize,
    run: &WriteRun,
    align: Alignment,
) -> io::Result<()> {
    let total = run.len();
    let block = u64::from(align.offset);
    check_end(run.offset, total)?;
    if !run.offset.is_multiple_of(block) || !total.is_multiple_of(block) {
        let why = "direct I/O writes whole blocks";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let mut gather = Gathered { ops, offset: run.offset, parts: Vec::new(), len: 0 };
    let mut parts = &run.parts[..];
    while let Some((stretch, count)) = stretch(parts) {
        let first = run.parts.len() - parts.len();
        let here = &parts[..count];
        parts = &parts[count..];
        let at = gather.offset + gather.len as u64;
        let begins = at.is_multiple_of(block) && stretch.is_aligned(align.memory as usize);
        let whole = stretch.len() - stretch.len() % block as usize;
        let alone = gather.len == 0 && parts.iter().all(Bytes::is_empty) && whole == stretch.len();
        let mut skip = 0;
        if begins && whole > 0 && (stretch.len() >= WORTH_ALONE || alone) {
            gather.flush();
            for part in parts_of(whole) {
                let offset = at + part.start as u64;
                let op = Op::direct(Kind::Write, offset, stretch.part(part));
                gather.ops.push(Op { run: number, part: first, ..op });
            }
            gather.offset = at + whole as u64;
            skip = whole;
        }
        for part in here {
            let skipped = skip.min(part.len());
            skip -= skipped;
            gather.add(part.slice(skipped..));
        }
    }
    gather.flush();
    Ok(())
}

/// The front of a region as slices of the parts that it was made of.
pub(super) fn slices_of<'a>(
    region: Region,
    parts: impl Iterator<Item = &'a Bytes>,
) -> Vec<IoSlice<'a>> {
    let mut slices = Vec::new();
    let mut left = region;
    for part in parts {
        let whole = Region::of(part);
        if left.len() == 0 || slices.len() == PARTS_MAX {
            break;
        }
        if whole.len() > 0 && whole.contains(left.part(0..1)) {
            let start = left.address() - whole.address();
            let end = (start + left.len()).min(part.len());
            slices.push(IoSlice::new(&part[start..end]));
            left = left.part(end - start..left.len());
        }
    }
    slices
}

/// The longest front of `parts` that is contiguous in memory, and how many parts that is.
fn stretch(parts: &[Bytes]) -> Option<(Region, usize)> {
    let mut region = Region::of(parts.first()?);
    let mut count = 1;
    for part in &parts[1..] {
        match region.joined(Region::of(part)) {
            Some(joined) => region = joined,
            None if part.is_empty() => {}
            None => break,
        }
        count += 1;
    }
    Some((region, count))
}

/// Small or unaligned parts that go through bounce buffers.
struct Gathered<'a> {
    ops: &'a mut Vec<Op>,
    offset: u64,
    parts: Vec<Bytes>,
    len: usize,
}

impl Gathered<'_> {
    fn add(&mut self, mut bytes: Bytes) {
        while !bytes.is_empty() {
            let front = bytes.split_to(bytes.len().min(BOUNCE_MAX - self.len));
            self.len += front.len();
            self.parts.push(front);
            if self.len == BOUNCE_MAX {
                self.flush();
            }
        }
    }

    fn flush(&mut self) {
        if self.len == 0 {
            return;
        }
        let memory = Memory::Gather { parts: std::mem::take(&mut self.parts), bounce: None };
        self.ops.push(Op { memory, ..Op::new(Kind::Write, self.offset, self.len as u64) });
        self.offset += self.len as u64;
        self.len = 0;
    }
}

/// `0..len` in parts of [`TRANSFER_MAX`].
fn parts_of(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(TRANSFER_MAX).map(move |start| start..(start + TRANSFER_MAX).min(len))
}

/// Offsets are signed in the kernel, and the largest of them has a meaning of its own.
fn check_end(offset: u64, len: u64) -> io::Result<()> {
    let end = offset.checked_add(len).ok_or_else(outside)?;
    match i64::try_from(end) {
        Ok(end) if end < i64::MAX - BOUNCE_MAX as i64 => Ok(()),
        _ => Err(outside()),
    }
}

fn outside() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "a transfer outside of its buffer or file")
}
