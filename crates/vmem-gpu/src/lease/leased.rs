//! Device memory that is lent to a stream, for reading or for changing.
//!
//! Invariant: what keeps the memory goes only after the event of the stream. Called by the leases.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaStream, CudaView, CudaViewMut};
use futures::FutureExt;
use futures::future::ready;
use vmem_core::backend::{DeviceAccess, DeviceAnswer, DeviceError, DeviceRange, UseEnd};

use super::Result;
use super::ending::{Ending, KeepUntil};
use crate::card::Card;
use crate::ext::tier;
use crate::lend::Lent;
use crate::watch::Answer;

/// What both kinds of leases have.
#[derive(Debug)]
pub(super) struct Leased {
    pub(super) address: u64,
    pub(super) len: usize,
    /// Made when a view is first asked for.
    pub(super) lent: OnceLock<Lent>,
    pub(super) stream: Arc<CudaStream>,
    /// For the thread that waits; the store may be closed first.
    pub(super) access: DeviceAccess,
    /// The memory outlives the store too. None once the lease has ended.
    pub(super) card: Option<Arc<Card>>,
    /// Something uses it that the driver has not put into the order of the stream.
    pub(super) strays: AtomicBool,
}

impl Leased {
    pub(super) fn new(
        access: &DeviceAccess,
        stream: &Arc<CudaStream>,
        range: Option<&DeviceRange>,
    ) -> Result<Self> {
        let card = Some(tier(access)?.card()?);
        let (address, len) = range.map_or((0, 0), |range| (range.address(), range.len()));
        assert!(address.is_multiple_of(256), "device memory is handed out in whole units");
        let strays = AtomicBool::new(false);
        Ok(Leased {
            address,
            len,
            lent: OnceLock::new(),
            stream: stream.clone(),
            access: access.clone(),
            card,
            strays,
        })
    }

    /// The device that it is on, as the driver counts them.
    #[cfg(feature = "dlpack")]
    pub(super) fn ordinal(&self) -> usize {
        self.card.as_ref().map_or(0, |card| card.ordinal())
    }

    /// Whether it can end with others on this stream.
    pub(super) fn is_on(&self, stream: &CudaStream) -> bool {
        // The handle of the default stream is the same in each context.
        self.stream.cu_stream() == stream.cu_stream()
            && self.stream.context().cu_ctx() == stream.context().cu_ctx()
            && !self.strays.load(Ordering::Relaxed)
    }

    pub(super) fn view(&self) -> CudaView<'_, u8> {
        self.lent().slice().slice(..)
    }

    pub(super) fn view_mut(&mut self) -> CudaViewMut<'_, u8> {
        self.lent();
        let lent = self.lent.get_mut().expect("invariant: it was made just now");
        lent.slice_mut().slice_mut(..)
    }

    pub(super) fn lent(&self) -> &Lent {
        self.lent.get_or_init(|| {
            let card = self.card.as_ref().expect("invariant: a lease that has ended is not used");
            Lent::new(card, &self.stream, self.address, self.len)
        })
    }

    /// Keeps `keep` until the stream has come to where it is now, and the card as long, which so
    /// does not go on a thread of the user's. Once.
    pub(super) fn release(&mut self, keep: KeepUntil) -> Passed {
        Passed::of(Ending::of(self, keep).end())
    }
}

/// The end of a lease.
pub(super) struct Passed {
    /// How it went.
    pub(super) answer: DeviceAnswer<std::result::Result<(), DeviceError>>,
    /// Where it is, if that is known.
    pub(super) end: Option<UseEnd>,
}

impl Passed {
    pub(super) fn of(ended: Option<(Answer, Option<UseEnd>)>) -> Self {
        match ended {
            Some((answer, end)) => Passed { answer: answered(answer).boxed(), end },
            None => Passed { answer: ready(Err(strayed())).boxed(), end: None },
        }
    }
}

async fn answered(answer: Answer) -> std::result::Result<(), DeviceError> {
    answer.await.unwrap_or(Err(DeviceError::Closed))
}

fn strayed() -> DeviceError {
    let message = "the memory of the lease is never reused";
    DeviceError::Failed { operation: "ordering streams", code: 0, message: message.into() }
}

/// The calling thread's own stream in the order of that of a lease. However it ends: what was
/// queued runs.
pub(super) struct Scope<'a> {
    pub(super) card: &'a Card,
    pub(super) stream: &'a CudaStream,
    pub(super) strays: &'a AtomicBool,
    pub(super) own: Arc<CudaStream>,
}

impl<'a> Scope<'a> {
    pub(super) fn enter(
        card: &'a Option<Arc<Card>>,
        stream: &'a Arc<CudaStream>,
        strays: &'a AtomicBool,
    ) -> Option<Self> {
        let card = card.as_ref()?;
        let own = stream.context().per_thread_stream();
        card.order_or_wait(stream, &own);
        Some(Scope { card, stream, strays, own })
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        if !self.card.order_or_wait(&self.own, self.stream) && !self.card.context().is_dead() {
            self.strays.store(true, Ordering::Relaxed);
        }
    }
}
