//! Jobs on the runtime of one thread: their operations, lent to tokio-uring by address.
//!
//! Ownership: a job is here until each of its operations has completed, so what an address leads to
//! lives as long. Called by the thread's loop.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::rc::Rc;

use futures::stream::{FuturesUnordered, StreamExt};
use rustix::fs::FallocateFlags;
use tokio::sync::Notify;
use tokio_uring::buf::{IoBuf, IoBufMut};

use crate::driver::RETRY_AFTER;
use crate::driver::job::{Job, Kind, Step, Submission};
use crate::driver::memory::Region;

/// Jobs of this thread that are not over.
#[derive(Default)]
pub(super) struct Running {
    pub(super) count: std::cell::Cell<usize>,
    pub(super) bell: Notify,
}

pub(super) struct Counted(Rc<Running>);

impl Counted {
    pub(super) fn new(running: &Rc<Running>) -> Self {
        running.count.set(running.count.get() + 1);
        Counted(Rc::clone(running))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.count.set(self.0.count.get() - 1);
        self.0.bell.notify_one();
    }
}

/// Runs the wave of one job and delivers it.
pub(super) async fn run_job(file: &tokio_uring::fs::File, job: Box<Job>) {
    let job = RefCell::new(job);
    let first = job.borrow_mut().start_op();
    if let Some(first) = first {
        let more = job.borrow().can_start();
        if more {
            let mut running = FuturesUnordered::new();
            running.push(run_op(file, &job, first));
            loop {
                while let Some(op) = { job.borrow_mut().start_op() } {
                    running.push(run_op(file, &job, op));
                }
                if running.next().await.is_none() {
                    break;
                }
            }
        } else {
            // The usual job is one operation.
            run_op(file, &job, first).await;
        }
    }
    job.into_inner().deliver();
}

/// Runs one operation of a job, which counts as running, to its end.
async fn run_op(file: &tokio_uring::fs::File, job: &RefCell<Box<Job>>, op: usize) {
    loop {
        let submission = job.borrow().submission(op);
        let result = submit(file, submission).await;
        let step = job.borrow_mut().complete(op, result);
        match step {
            Step::Ended => return,
            Step::Again => {}
            Step::Later => tokio::time::sleep(RETRY_AFTER).await,
        }
    }
}

/// One attempt: a count, or an errno below zero, as the kernel says it.
async fn submit(file: &tokio_uring::fs::File, submission: Submission) -> i32 {
    let Submission { kind, offset, len, memory } = submission;
    let memory = memory.map(Lent);
    let result = match (kind, memory) {
        (Kind::Read, Some(memory)) => file.read_at(memory, offset).await.0,
        (Kind::Write, Some(memory)) => file.write_at(memory, offset).submit().await.0,
        (Kind::Punch, _) => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            file.fallocate(offset, len, flags.bits() as i32).await.map(|()| 0)
        }
        (Kind::Sync, _) => file.sync_data().await.map(|()| 0),
        (Kind::Read | Kind::Write, None) => Ok(0),
    };
    match result {
        Ok(count) => i32::try_from(count).unwrap_or(i32::MAX),
        // tokio-uring itself refuses only when its queue cannot be submitted.
        Err(error) => -error.raw_os_error().unwrap_or(rustix::io::Errno::AGAIN.raw_os_error()),
    }
}

/// Memory of a job, lent to one operation.
struct Lent(Region);

// SAFETY: the address is stable, and the memory is valid and initialised for `len` bytes until the
// operation has completed: the job owns it, is on this thread until then, and leaks it if it is
// dropped before.
unsafe impl IoBuf for Lent {
    fn stable_ptr(&self) -> *const u8 {
        std::ptr::with_exposed_provenance(self.0.address())
    }

    fn bytes_init(&self) -> usize {
        self.0.len()
    }

    fn bytes_total(&self) -> usize {
        self.0.len()
    }
}

// SAFETY: as above; and only regions of buffers that the job has exclusively are read into.
unsafe impl IoBufMut for Lent {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.0.address())
    }

    unsafe fn set_init(&mut self, _pos: usize) {}
}
