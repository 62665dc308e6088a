//! The least that a read from disk can cost: a bare io_uring on the calling thread, direct I/O, no
//! runtime.
//!
//! Invariant: a buffer belongs to the kernel from its submission to its completion, and no call
//! returns while one does. Called by `cold`.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use io_uring::{IoUring, opcode, types};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::cold::{Data, Round, is_right};
use crate::report::process_cpu_ns;

const BLOCK: usize = 4096;

/// A file of objects, one after the other.
pub(crate) struct Raw {
    file: File,
    ring: IoUring,
    data: Data,
    /// One for each operation in flight.
    buffers: Vec<Buffer>,
}

struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Buffer { bytes, start }
    }
}

impl Raw {
    pub(crate) fn with(data: Data, directory: &Path) -> anyhow::Result<Self> {
        let file = tempfile::tempfile_in(directory)?;
        let direct = fcntl_getfl(&file)? | OFlags::DIRECT;
        fcntl_setfl(&file, direct).context("direct I/O")?;
        let mut buffer = Buffer::new(data.len);
        for n in 0..data.count {
            let target = &mut buffer.bytes[buffer.start..buffer.start + data.len];
            target.copy_from_slice(&data.bytes(n));
            std::os::unix::fs::FileExt::write_all_at(&file, target, (n * data.len) as u64)?;
        }
        let buffers = (0..64).map(|_| Buffer::new(data.len)).collect();
        Ok(Raw { file, ring: IoUring::new(256)?, data, buffers })
    }

    /// Keeps `depth` reads in flight for so long.
    pub(crate) fn round(
        &mut self,
        depth: usize,
        long: Duration,
        seed: u64,
    ) -> anyhow::Result<Round> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let began = Instant::now();
        let cpu = process_cpu_ns();
        let mut flying = vec![(0_usize, began); depth];
        let mut latencies = Vec::new();
        let mut in_flight = 0;
        for slot in 0..depth {
            self.submit(slot, &mut flying, &mut rng)?;
            in_flight += 1;
        }
        while in_flight > 0 {
            self.ring.submit_and_wait(1)?;
            loop {
                let Some(entry) = self.ring.completion().next() else { break };
                let slot = entry.user_data() as usize;
                let (n, since) = flying[slot];
                latencies.push(since.elapsed().as_nanos() as f64);
                let buffer = &self.buffers[slot];
                let bytes = &buffer.bytes[buffer.start..buffer.start + self.data.len];
                anyhow::ensure!(entry.result() == self.data.len as i32, "a short read");
                anyhow::ensure!(is_right(bytes, n), "object {n}");
                in_flight -= 1;
                if began.elapsed() < long {
                    self.submit(slot, &mut flying, &mut rng)?;
                    in_flight += 1;
                }
            }
        }
        Ok(Round::of(latencies, began.elapsed(), process_cpu_ns() - cpu))
    }

    fn submit(
        &mut self,
        slot: usize,
        flying: &mut [(usize, Instant)],
        rng: &mut SmallRng,
    ) -> anyhow::Result<()> {
        let n = rng.random_range(0..self.data.count);
        flying[slot] = (n, Instant::now());
        let buffer = &mut self.buffers[slot];
        let target = buffer.bytes[buffer.start..].as_mut_ptr();
        let entry =
            opcode::Read::new(types::Fd(self.file.as_raw_fd()), target, self.data.len as u32)
                .offset((n * self.data.len) as u64)
                .build()
                .user_data(slot as u64);
        // SAFETY: the buffer is as long as the read and is not touched before its completion; an
        // error in between ends the process.
        unsafe { self.ring.submission().push(&entry) }.context("the ring is full")
    }
}
