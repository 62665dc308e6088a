//! One io_uring and the jobs that are in it.
//!
//! Ownership: a job moves in before its first operation is pushed and moves out when none of its
//! operations is known to the kernel any more. So whatever the kernel reads or writes is owned
//! here. A ring that is dropped with jobs in it leaks what they own (see [`Job`]). Every
//! completion names its slot and the slot's generation: one that is late, doubled or unknown is
//! ignored. The kernel has at most as many operations as its completion queue has entries, so that
//! none overflows. Called by the lanes of the reactor driver, under the lock of the lane.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use slab::Slab;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use vmem_core::backend::{StagingMemory, quietly};

use crate::driver::job::{Job, Kind, Step, Submission};
use crate::driver::memory::Region;

/// Entries of the submission queue; the completion queue has twice as many.
const ENTRIES: u32 = 256;
/// Memory from this length on is worth a registered buffer, in bytes.
const FIXED_MIN: usize = 16 * 1024;
/// The longest registered buffer, in bytes: the kernel refuses longer ones.
const FIXED_MAX: usize = 1 << 30;

/// See the module's documentation.
pub(super) struct Ring {
    uring: IoUring,
    file: Arc<File>,
    jobs: Slab<Box<Job>>,
    slots: Slab<Slot>,
    generation: u32,
    /// Jobs with operations that found no slot.
    starved: VecDeque<usize>,
    /// Slots that were pushed and not taken by the kernel yet, in order.
    pushed: VecDeque<u32>,
    /// Slots to be submitted again, after a short while.
    parked: Vec<u32>,
    slots_max: usize,
    /// Registered buffers, by index.
    fixed: Vec<Region>,
    /// What they are in; given back only after they are unregistered.
    fixed_memory: Option<StagingMemory>,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    job: usize,
    op: usize,
    generation: u32,
}

/// Why the kernel takes no more operations.
pub(super) type Refusal = io::Error;

impl Ring {
    pub(super) fn new(file: Arc<File>) -> io::Result<Self> {
        let uring = IoUring::builder().dontfork().build(ENTRIES)?;
        let slots_max = uring.params().cq_entries() as usize;
        Ok(Ring {
            uring,
            file,
            jobs: Slab::new(),
            slots: Slab::new(),
            generation: 0,
            starved: VecDeque::new(),
            pushed: VecDeque::new(),
            parked: Vec::new(),
            slots_max,
            fixed: Vec::new(),
            fixed_memory: None,
        })
    }

    /// A descriptor that this runtime's reactor finds readable while completions wait.
    ///
    /// # Errors
    ///
    /// If this is no runtime with a reactor, or descriptors are short.
    pub(super) fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: the ring owns the descriptor, and outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) };
        // One of its own, so that the reactor forgets it before the number is reused.
        let fd = fd.try_clone_to_owned()?;
        let register = || {
            // SAFETY: an `OwnedFd` owns its descriptor, which stays the same until it is dropped.
            unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }
        };
        // The runtime may have no reactor, of which tokio tells by a panic alone.
        match quietly(register) {
            Some(registered) => Ok(registered?),
            None => {
                let why = "this tokio runtime has no I/O driver: build it with `enable_io` or \
                           `enable_all`";
                Err(io::Error::new(io::ErrorKind::Unsupported, why))
            }
        }
    }

    /// Takes a job in and pushes what may start of it.
    pub(super) fn insert(&mut self, job: Box<Job>) {
        let key = self.jobs.insert(job);
        self.start_ops(key);
    }

    /// Jobs that are not over.
    pub(super) fn jobs(&self) -> usize {
        self.jobs.len()
    }

    /// Whether something must be tried again after a while.
    pub(super) fn wants_retry(&self) -> bool {
        !self.parked.is_empty() || !self.pushed.is_empty()
    }

    /// Whether the kernel left something that was submitted.
    pub(super) fn has_unsent(&self) -> bool {
        !self.pushed.is_empty()
    }

    /// Pushes what was parked.
    pub(super) fn unpark(&mut self) {
        for slot in std::mem::take(&mut self.parked) {
            self.push(slot);
        }
    }

    fn start_ops(&mut self, key: usize) {
        while let Some(job) = self.jobs.get_mut(key) {
            if self.slots.len() == self.slots_max && job.can_start() {
                self.starved.push_back(key);
                return;
            }
            let Some(op) = job.start_op() else { return };
            self.generation = self.generation.wrapping_add(1);
            let slot = Slot { job: key, op, generation: self.generation };
            let slot = self.slots.insert(slot) as u32;
            self.push(slot);
        }
    }

    fn push(&mut self, slot: u32) {
        let Some(&Slot { job, op, generation }) = self.slots.get(slot as usize) else { return };
        let submission = self.jobs[job].submission(op);
        let key = u64::from(generation) << 32 | u64::from(slot);
        let entry = self.entry(&submission).user_data(key);
        if self.uring.submission().is_full() {
            // The kernel takes the entries; if it does not, the caller will hear of it.
            let _ = self.submit();
        }
        // SAFETY: the memory of the entry is owned by the job, which stays in `jobs` until the
        // completion of this slot was seen, and leaks its memory if it is dropped before. The file
        // is open as long as this ring, and the kernel has its own reference from then on.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        match pushed {
            Ok(()) => self.pushed.push_back(slot),
            Err(_) => self.parked.push(slot),
        }
    }

    fn entry(&self, submission: &Submission) -> squeue::Entry {
        let fd = Fd(self.file.as_raw_fd());
        let Submission { kind, offset, len, memory } = *submission;
        let (address, count) = memory.map_or((0, 0), |m| (m.address(), m.len() as u32));
        let fixed = memory.and_then(|memory| self.fixed_index(memory));
        match (kind, fixed) {
            (Kind::Read, None) => {
                let target = std::ptr::with_exposed_provenance_mut(address);
                opcode::Read::new(fd, target, count).offset(offset).build()
            }
            (Kind::Read, Some(index)) => {
                let target = std::ptr::with_exposed_provenance_mut(address);
                opcode::ReadFixed::new(fd, target, count, index).offset(offset).build()
            }
            (Kind::Write, None) => {
                let source = std::ptr::with_exposed_provenance(address);
                opcode::Write::new(fd, source, count).offset(offset).build()
            }
            (Kind::Write, Some(index)) => {
                let source = std::ptr::with_exposed_provenance(address);
                opcode::WriteFixed::new(fd, source, count, index).offset(offset).build()
            }
            (Kind::Punch, _) => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let mode = flags.bits() as i32;
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
            (Kind::Sync, _) => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        }
    }

    fn fixed_index(&self, memory: Region) -> Option<u16> {
        if memory.len() < FIXED_MIN {
            return None;
        }
        let index = self.fixed.iter().position(|registered| registered.contains(memory))?;
        u16::try_from(index).ok()
    }

    /// Hands the kernel what was pushed. What it does not take now stays, and
    /// [`wants_retry`](Self::wants_retry) says so.
    ///
    /// # Errors
    ///
    /// If it refuses for good: the next call is then [`give_up`](Self::give_up).
    pub(super) fn submit(&mut self) -> Result<(), Refusal> {
        self.enter(0)
    }

    /// The same, and waits for a completion.
    ///
    /// # Errors
    ///
    /// As `submit`.
    pub(super) fn submit_and_wait(&mut self) -> Result<(), Refusal> {
        self.enter(1)
    }

    fn enter(&mut self, want: usize) -> Result<(), Refusal> {
        if self.pushed.is_empty() && want == 0 {
            return Ok(());
        }
        match self.uring.submit_and_wait(want) {
            Ok(taken) => {
                self.pushed.drain(..taken.min(self.pushed.len()));
                Ok(())
            }
            Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::INTR | Errno::AGAIN | Errno::BUSY | Errno::NOMEM) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The kernel takes nothing any more: what it never took fails, and so does what is to come.
    pub(super) fn give_up(&mut self, refusal: &io::Error, over: &mut Vec<Box<Job>>) {
        let unsent = self.pushed.drain(..).chain(self.parked.drain(..)).collect::<Vec<_>>();
        for slot in unsent {
            let Slot { job, .. } = self.slots.remove(slot as usize);
            self.jobs[job].fail(same(refusal));
            self.take_over(job, over);
        }
        for job in std::mem::take(&mut self.starved) {
            if self.jobs.contains(job) && !self.jobs[job].is_running() {
                let job = self.jobs.remove(job);
                over.push(job.refused(same(refusal)));
            }
        }
    }

    /// Takes the completions that are there; jobs that are over with them go to `over`. Returns
    /// whether anything was pushed, which is then to be submitted.
    pub(super) fn reap(&mut self, over: &mut Vec<Box<Job>>) -> bool {
        let mut pushed = false;
        loop {
            let Some(entry) = self.uring.completion().next() else { return pushed };
            let slot = entry.user_data() as u32;
            let generation = (entry.user_data() >> 32) as u32;
            let known =
                self.slots.get(slot as usize).filter(|known| known.generation == generation);
            let Some(&Slot { job, op, .. }) = known else {
                tracing::warn!(
                    target: "vmem::disk", slot, generation, "a completion without a waiter"
                );
                continue;
            };
            match self.jobs[job].complete(op, entry.result()) {
                Step::Again => {
                    self.push(slot);
                    pushed = true;
                }
                Step::Later => self.parked.push(slot),
                Step::Ended => {
                    self.slots.remove(slot as usize);
                    self.start_ops(job);
                    while self.slots.len() < self.slots_max
                        && let Some(starved) = self.starved.pop_front()
                    {
                        self.start_ops(starved);
                    }
                    self.take_over(job, over);
                    pushed |= !self.pushed.is_empty();
                }
            }
        }
    }

    fn take_over(&mut self, job: usize, over: &mut Vec<Box<Job>>) {
        if self.jobs.get(job).is_some_and(|job| job.wave_is_over()) {
            over.push(self.jobs.remove(job));
        }
    }

    /// Registers memory with the kernel, which then need not pin it for each operation.
    pub(super) fn register(&mut self, memory: StagingMemory) -> io::Result<()> {
        if self.fixed_memory.is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let whole = Region::at(memory.address(), memory.len());
        let starts = (0..whole.len()).step_by(FIXED_MAX);
        let fixed: Vec<_> =
            starts.map(|at| whole.part(at..(at + FIXED_MAX).min(whole.len()))).collect();
        let vectors: Vec<_> = fixed
            .iter()
            .map(|region| libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(region.address()),
                iov_len: region.len(),
            })
            .collect();
        // SAFETY: the memory is mapped, and neither unmapped nor given back to the system while
        // `fixed_memory` holds it, which is until it is unregistered.
        unsafe { self.uring.submitter().register_buffers(&vectors) }?;
        self.fixed = fixed;
        self.fixed_memory = Some(memory);
        Ok(())
    }
}

/// Runs one job to its end on a ring of its own, blocking; for probes.
pub(super) fn run_alone(file: Arc<File>, job: Box<Job>) -> io::Result<Box<Job>> {
    let mut ring = Ring::new(file)?;
    ring.insert(job);
    let mut over = Vec::new();
    loop {
        let waited = ring.submit_and_wait();
        ring.reap(&mut over);
        if let Some(job) = over.pop() {
            return Ok(job);
        }
        if let Err(refusal) = waited {
            ring.give_up(&refusal, &mut over);
            // What the kernel has already is leaked with the ring.
            return over.pop().map(|job| job.refused(same(&refusal))).ok_or(refusal);
        }
        ring.unpark();
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.fixed_memory.is_some()
            && let Err(error) = self.uring.submitter().unregister_buffers()
        {
            // The ring goes anyway, and its registration with it, only later.
            tracing::warn!(target: "vmem::disk", %error, "registered memory was not unregistered");
            std::mem::forget(self.fixed_memory.take());
        }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("jobs", &self.jobs.len())
            .field("operations", &self.slots.len())
            .field("fixed", &self.fixed.len())
            .finish_non_exhaustive()
    }
}

/// An error like this one, for another job.
pub(super) fn same(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => error.kind().into(),
    }
}
