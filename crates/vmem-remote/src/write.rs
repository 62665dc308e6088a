//! A segment on its way into the bucket.
//!
//! Invariant: a chunk has a place only once its segment is in the bucket, and a call is answered
//! after that. A segment of which that is unknown is deleted. Spawned by `gather`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use vmem_core::backend::checksums;

use crate::error::RequestError;
use crate::gather::{Call, Slot};
use crate::inner::Inner;
use crate::ledger::Placed;

/// Puts the chunks of these calls as one segment, and answers them.
pub(crate) async fn put_segment(inner: Arc<Inner>, calls: Vec<Call>, slot: Slot) {
    // What nobody awaits any more gives its space back here.
    let mut calls: Vec<_> = calls.into_iter().filter(|call| !call.reply.is_closed()).collect();
    let pieces: Vec<Bytes> = calls.iter().flat_map(|call| call.payloads.iter().cloned()).collect();
    let sums = checksums(pieces.iter().cloned()).await;
    let mut unsealed = sums.iter();
    for call in &mut calls {
        for (extent, sum) in call.extents.iter_mut().zip(&mut unsealed) {
            extent.seal(*sum);
        }
    }
    let put = put_pieces(&inner, &calls, &pieces, &slot).await;
    // The next put may start.
    drop(pieces);
    drop(slot);
    for call in calls {
        // The extents of a failed call go first, so that their space counts as free; if the caller
        // has gone, so do those of one that succeeded.
        let answer = match &put {
            Ok(()) => Ok(call.extents),
            Err(error) => {
                drop(call.extents);
                Err(error.clone().of_tier("write"))
            }
        };
        drop(call.payloads);
        drop(call.buffered);
        let _ = call.reply.send(answer);
        drop(call.token);
    }
}

async fn put_pieces(
    inner: &Inner,
    calls: &[Call],
    pieces: &[Bytes],
    slot: &Slot,
) -> Result<(), RequestError> {
    if pieces.iter().all(Bytes::is_empty) {
        return Ok(());
    }
    let segment = inner.ledger.lock().begin_segment();
    let is_untried = AtomicBool::new(true);
    let stalled = |_: &RequestError| {
        is_untried.store(false, Ordering::Relaxed);
        slot.stalled();
    };
    let put = inner.client.put(&inner.path(segment), pieces, stalled).await;
    let has_chore = {
        let mut ledger = inner.ledger.lock();
        match &put {
            Ok(()) => ledger.publish(segment, &places(segment, calls)),
            Err(_) => ledger.abandon_segment(segment, !is_untried.into_inner()),
        }
        ledger.has_chore()
    };
    if has_chore {
        inner.tidy();
    }
    put
}

/// Where each chunk that is not empty is in its segment.
fn places(segment: u64, calls: &[Call]) -> Vec<(u64, Placed)> {
    let mut at = 0;
    let extents = calls.iter().flat_map(|call| &call.extents);
    let mut places = Vec::new();
    for extent in extents.filter(|extent| !extent.is_empty()) {
        let len = extent.len();
        let sum = extent.sum().expect("it was sealed before it was put");
        places.push((extent.offset(), Placed { segment, at, len, sum }));
        at += u64::from(len);
    }
    places
}
