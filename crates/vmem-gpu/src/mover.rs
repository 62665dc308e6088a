//! The thread that moves pages of device memory, gives them back to the device, and takes more.
//!
//! Invariant: a plan that it was given is settled, once the driver has done what the plan asks for
//! or has refused it; then the bell of the tier rings, and again when pages may be moved again. A
//! driver may wait for kernels before it moves a page, so nobody waits for this thread but those
//! that lack the memory, or change how much there is. Started by the tier, where memory is pages.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Instant;

use cudarc::driver::{DriverError, sys};
use futures::FutureExt;
use futures::channel::oneshot;
use parking_lot::Mutex;
use vmem_core::backend::{DeviceAnswer, DeviceError};

use crate::card::{Card, failed, told};
use crate::lane::{Ended, Lost};
use crate::mapped::Mapped;
use crate::memory::Memory;
use crate::paged::{Left, PageLeaving, PageMove, PagePlan};

/// How many bytes were given back, or are there anew.
type Resized = Result<u64, DeviceError>;

enum Job {
    Move(PagePlan),
    GiveBack(Vec<PageLeaving>, oneshot::Sender<Resized>),
    TakeMore(u64, oneshot::Sender<Resized>),
}

/// The sending end.
#[derive(Debug)]
pub(crate) struct Mover {
    /// None once it was closed.
    jobs: Mutex<Option<Sender<Job>>>,
    ended: Ended,
}

impl Mover {
    /// Starts the thread. It holds a share of the card until it has ended.
    ///
    /// # Errors
    ///
    /// What the operating system says, in words.
    pub(crate) fn start(card: Arc<Card>, memory: Arc<Memory>, lost: Lost) -> Result<Self, String> {
        let (jobs, taken) = channel::<Job>();
        let (end, ended) = oneshot::channel::<()>();
        let run = move || {
            let pages = Pages { card: &card, memory: &memory };
            let mut rests_until: Option<Instant> = None;
            loop {
                let job = match rests_until {
                    None => taken.recv().map_err(|_| RecvTimeoutError::Disconnected),
                    Some(until) => taken.recv_timeout(until - until.min(Instant::now())),
                };
                match job {
                    Ok(Job::Move(plan)) => rests_until = pages.carry_out(plan),
                    Ok(Job::GiveBack(leaving, reply)) => drop(reply.send(pages.give_back(leaving))),
                    Ok(Job::TakeMore(bytes, reply)) => drop(reply.send(pages.take_more(bytes))),
                    Err(RecvTimeoutError::Timeout) => {
                        memory.rested();
                        rests_until = None;
                    }
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                lost.ring();
            }
            drop((card, end));
        };
        let spawned = thread::Builder::new().name("vmem-gpu-pages".to_owned()).spawn(run);
        spawned.map_err(|error| format!("starting a thread: {error}"))?;
        Ok(Mover { jobs: Mutex::new(Some(jobs)), ended: ended.map(drop).boxed().shared() })
    }

    /// Hands a plan in.
    ///
    /// # Errors
    ///
    /// The plan, if the thread has ended.
    pub(crate) fn submit(&self, plan: PagePlan) -> Result<(), PagePlan> {
        match self.hand_in(Job::Move(plan)) {
            Err(Job::Move(plan)) => Err(plan),
            _ => Ok(()),
        }
    }

    /// Gives pages back to the device; how many bytes it took.
    pub(crate) fn give_back(&self, leaving: Vec<PageLeaving>) -> DeviceAnswer<Resized> {
        let (reply, answer) = oneshot::channel();
        self.resize(Job::GiveBack(leaving, reply), answer)
    }

    /// Takes the pages that the budget lacks, but no more than these bytes; how many there were.
    pub(crate) fn take_more(&self, bytes: u64) -> DeviceAnswer<Resized> {
        let (reply, answer) = oneshot::channel();
        self.resize(Job::TakeMore(bytes, reply), answer)
    }

    fn resize(&self, job: Job, answer: oneshot::Receiver<Resized>) -> DeviceAnswer<Resized> {
        // What the thread does not do any more is freed with the card.
        drop(self.hand_in(job));
        answer.map(|answer| answer.unwrap_or(Err(DeviceError::Closed))).boxed()
    }

    fn hand_in(&self, job: Job) -> Result<(), Job> {
        match &*self.jobs.lock() {
            Some(jobs) => jobs.send(job).map_err(|refused| refused.0),
            None => Err(job),
        }
    }

    /// The thread ends once it has done what it was given.
    pub(crate) fn close(&self) {
        self.jobs.lock().take();
    }

    /// When the thread has let go of the card.
    pub(crate) fn ended(&self) -> Ended {
        self.ended.clone()
    }
}

/// What the thread works on.
struct Pages<'a> {
    card: &'a Card,
    memory: &'a Memory,
}

impl Pages<'_> {
    /// Until when pages rest, if the driver refused.
    fn carry_out(&self, plan: PagePlan) -> Option<Instant> {
        let done = self.move_pages(&plan.moves);
        let rest = self.memory.settle(plan, done);
        rest.map(|rest| Instant::now() + rest)
    }

    /// Gives pages back, up to the first that the driver refuses; that one and the rest stay.
    fn give_back(&self, leaving: Vec<PageLeaving>) -> Resized {
        let mut given = 0;
        let mut refused = None;
        for page in leaving {
            let mut left = Left::Stays;
            // The budget may have changed since.
            if refused.is_none() && self.memory.may_leave() {
                let outcome = self.visit(|pages| {
                    let (what, outcome) = pages.give_up(&page);
                    left = what;
                    outcome
                });
                refused = outcome.err();
            }
            given += u64::from(left == Left::Gone) * self.page_bytes();
            self.memory.settle_leaving(page, left);
        }
        match refused.filter(|_| given == 0) {
            Some(error) => Err(failed("giving device memory back", error)),
            None => Ok(given),
        }
    }

    /// Takes the pages that the budget lacks, as many as there are.
    fn take_more(&self, bytes: u64) -> Resized {
        let wanted = self.memory.lacking_pages().min(bytes / self.page_bytes());
        let created = self.visit(|pages| pages.create(wanted, 0));
        let created = created.map_err(|error| failed("taking device memory", error))?;
        let taken = created.len() as u64 * self.page_bytes();
        if let Some((plan, surplus)) = self.memory.plan_new(created) {
            let done = self.move_pages(&plan.moves);
            self.memory.settle_new(plan, done);
            // The budget has changed meanwhile.
            self.give_back(surplus).ok();
            self.give_back(self.memory.let_leave(u64::MAX, None)).ok();
        }
        Ok(taken)
    }

    /// True if the pages are where they are to be.
    fn move_pages(&self, moves: &[PageMove]) -> bool {
        let moved = self.visit(|pages| pages.carry_out(moves));
        if let Err(error) = moved {
            let error = told("moving device memory", error);
            tracing::warn!(target: "vmem::gpu", %error, "pages stay where they are");
        }
        moved.is_ok()
    }

    fn page_bytes(&self) -> u64 {
        self.memory.page_bytes().unwrap_or(u64::MAX)
    }

    /// Works in the context. An error is noticed if it sticks.
    fn visit<T>(
        &self,
        work: impl FnOnce(&Mapped) -> Result<T, DriverError>,
    ) -> Result<T, DriverError> {
        let pages = self.card.pages().ok_or(DriverError(sys::CUresult::CUDA_ERROR_UNKNOWN))?;
        let done = self.card.context().visit(|| work(pages)).and_then(|done| done);
        if done.is_err() {
            self.card.context().is_dead();
        }
        done
    }
}
