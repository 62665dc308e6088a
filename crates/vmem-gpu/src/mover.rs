//! The thread that moves pages of device memory.
//!
//! Invariant: a plan that it was given is settled, once the driver has done what the plan asks for
//! or has refused it; then the bell of the tier rings, and again when pages may be moved again. A
//! driver may wait for kernels before it moves a page, so nobody waits for this thread but those
//! that lack the memory. Started by the tier, where memory is pages.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;

use futures::FutureExt;
use futures::channel::oneshot;
use parking_lot::Mutex;

use crate::card::{Card, told};
use crate::lane::{Ended, Lost};
use crate::memory::Memory;
use crate::paged::PagePlan;

/// The sending end.
#[derive(Debug)]
pub(crate) struct Mover {
    /// None once it was closed.
    plans: Mutex<Option<Sender<PagePlan>>>,
    ended: Ended,
}

impl Mover {
    /// Starts the thread. It holds a share of the card until it has ended.
    ///
    /// # Errors
    ///
    /// What the operating system says, in words.
    pub(crate) fn start(card: Arc<Card>, memory: Arc<Memory>, lost: Lost) -> Result<Self, String> {
        let (plans, taken) = channel::<PagePlan>();
        let (end, ended) = oneshot::channel::<()>();
        let run = move || {
            while let Ok(plan) = taken.recv() {
                let done = carry_out(&card, &plan);
                let rest = memory.settle(plan, done);
                lost.ring();
                let Some(rest) = rest else { continue };
                // Nothing is handed in meanwhile.
                if let Err(RecvTimeoutError::Disconnected) = taken.recv_timeout(rest) {
                    break;
                }
                memory.rested();
                lost.ring();
            }
            drop((card, end));
        };
        let spawned = thread::Builder::new().name("vmem-gpu-pages".to_owned()).spawn(run);
        spawned.map_err(|error| format!("starting a thread: {error}"))?;
        Ok(Mover { plans: Mutex::new(Some(plans)), ended: ended.map(drop).boxed().shared() })
    }

    /// Hands a plan in.
    ///
    /// # Errors
    ///
    /// The plan, if the thread has ended.
    pub(crate) fn submit(&self, plan: PagePlan) -> Result<(), PagePlan> {
        match &*self.plans.lock() {
            Some(plans) => plans.send(plan).map_err(|refused| refused.0),
            None => Err(plan),
        }
    }

    /// The thread ends once it has settled what it was given.
    pub(crate) fn close(&self) {
        self.plans.lock().take();
    }

    /// When the thread has let go of the card.
    pub(crate) fn ended(&self) -> Ended {
        self.ended.clone()
    }
}

/// True if the pages are where they are to be.
fn carry_out(card: &Card, plan: &PagePlan) -> bool {
    let Some(pages) = card.pages() else { return false };
    let moved = card.context().visit(|| pages.carry_out(&plan.moves));
    match moved.and_then(|moved| moved) {
        Ok(()) => true,
        Err(error) => {
            // Noticed if it sticks.
            card.context().is_dead();
            let error = told("moving device memory", error);
            tracing::warn!(target: "vmem::gpu", %error, "pages stay where they are");
            false
        }
    }
}
