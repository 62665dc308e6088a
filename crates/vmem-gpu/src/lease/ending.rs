//! The ends of leases, by one event for all that are on one stream.
//!
//! Invariant: what a lease keeps goes only after all that its stream had at its end; where that
//! cannot be known it stays for ever. Called by the leases, and by sets.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use futures::FutureExt;
use futures::future::BoxFuture;
use vmem_core::backend::{DeviceAccess, UseEnd, VramChange, VramShare};

use super::leased::{Leased, Passed};
use super::{DeviceLease, DeviceLeaseMut, Result};
use crate::card::Card;
use crate::ext::tier;
use crate::lend::Lent;
use crate::watch::{Answer, Keep};

/// What is kept for a lease, made when it is known where that ends, if it is.
pub(super) type KeepUntil = Box<dyn FnOnce(Option<UseEnd>) -> Keep + Send>;

/// Keeps memory until work has ended that may use it.
pub(super) fn kept(share: Option<VramShare>) -> KeepUntil {
    Box::new(|end| Box::new(share.map(|share| share.until(end))))
}

/// Leases of one stream that end together.
pub(super) struct Ending {
    card: Option<Arc<Card>>,
    stream: Arc<CudaStream>,
    access: DeviceAccess,
    lent: Vec<Lent>,
    strays: bool,
    keeps: Vec<KeepUntil>,
}

impl Ending {
    /// What a lease has, and what is kept for it.
    pub(super) fn of(leased: &mut Leased, keep: KeepUntil) -> Self {
        assert!(leased.card.is_some(), "a lease ends once");
        Ending {
            card: leased.card.take(),
            stream: leased.stream.clone(),
            access: leased.access.clone(),
            lent: leased.lent.take().into_iter().collect(),
            strays: *leased.strays.get_mut(),
            keeps: vec![keep],
        }
    }

    /// One more.
    fn join(&mut self, leased: &mut Leased, keep: KeepUntil) {
        assert!(leased.is_on(&self.stream), "leases that end together are on one stream");
        let card = leased.card.take();
        assert!(card.is_some(), "a lease ends once");
        self.lent.extend(leased.lent.take());
        self.keeps.push(keep);
    }

    /// `None` if the memory has a user whose end cannot be known: then it is kept for ever.
    pub(super) fn end(self) -> Option<(Answer, Option<UseEnd>)> {
        let Ending { card, stream, access, lent, strays, keeps } = self;
        let (Some(card), Ok(tier), false) = (card, tier(&access), strays) else {
            tracing::error!(target: "vmem::gpu", "memory of a lease is never reused");
            std::mem::forget((keeps, lent));
            return None;
        };
        let last = card.clone();
        let keep = move |end: Option<UseEnd>| -> Keep {
            let keeps: Vec<Keep> = keeps.into_iter().map(|keep| keep(end.clone())).collect();
            let keeps = Some(keeps).filter(|_| !vmem_core::planted!("lease-ownership"));
            Box::new((keeps, last))
        };
        Some(tier.keep_until_passed(&card, &stream, lent, keep))
    }
}

/// Ends leases, those on this stream with one event. The answers are of those that kernels changed;
/// if the leases were dropped, those that nobody has used are given up.
pub(crate) fn end_together(
    stream: &CudaStream,
    read: Vec<DeviceLease>,
    write: Vec<DeviceLeaseMut>,
    dropped: bool,
) -> Vec<BoxFuture<'static, Result<()>>> {
    let mut ending: Option<Ending> = None;
    let mut join = |leased: &mut Leased, keep: KeepUntil| match &mut ending {
        Some(ending) => ending.join(leased, keep),
        None => ending = Some(Ending::of(leased, keep)),
    };
    for mut lease in read {
        // Those of other streams, which the caller put there, end by themselves.
        if lease.leased.is_on(stream)
            && let Some(hold) = lease.hold.take()
        {
            join(&mut lease.leased, kept(hold.end()));
        }
    }
    let mut answers = Vec::new();
    let mut changes = Vec::new();
    let mut given_up = Vec::new();
    for mut lease in write {
        let unused = dropped && lease.is_unused();
        match lease.change.take_if(|_| lease.leased.is_on(stream)) {
            Some(change) => {
                join(&mut lease.leased, kept(change.share()));
                if unused { given_up.push(change) } else { changes.push(change) }
            }
            None if unused => drop(lease),
            None => answers.push(lease.end_now()),
        }
    }
    let Passed { answer, end } = Passed::of(ending.and_then(Ending::end));
    drop(given_up);
    let answer = answer.shared();
    let finish = |change: VramChange| change.finish(answer.clone().boxed(), end.clone()).boxed();
    answers.extend(changes.into_iter().map(finish));
    answers
}
