//! Notices of the ends of foreign work, on streams of our own.
//!
//! Invariant: a notice is a hint that may come late, twice or never. A line of the watch has one at
//! a time, on the stream that has the fewest, so that little stands behind a slow kernel. Called by
//! the watch.

use std::sync::Arc;

use cudarc::driver::{CudaStream, DriverError};

use crate::card::Card;
use crate::event::{Bell, Event, Ring, ask_for_notice};

/// Streams that there are from the start, and at most.
const STREAMS_MIN: usize = 4;
const STREAMS_MAX: usize = 32;

/// Has a bell rung when events on streams of others have passed.
pub(crate) struct Notices {
    card: Arc<Card>,
    bell: Arc<Bell>,
    /// With how many notices stand on each.
    streams: Vec<(Arc<CudaStream>, usize)>,
    /// Rings without a waiter.
    spare: Vec<&'static Ring>,
}

/// One that was asked for.
pub(crate) struct Notice {
    ring: &'static Ring,
    stream: usize,
}

impl Notice {
    /// Whether it has come since this was last asked.
    pub(crate) fn has_come(&self) -> bool {
        self.ring.has_rung()
    }
}

impl Notices {
    pub(crate) fn new(card: Arc<Card>, bell: Arc<Bell>) -> Self {
        Notices { card, bell, streams: Vec::new(), spare: Vec::new() }
    }

    /// Makes the first streams, on the thread that uses them, bound to the context.
    ///
    /// # Errors
    ///
    /// What the driver says. It is tried again where a stream is needed.
    pub(crate) fn prepare(&mut self) -> Result<(), DriverError> {
        while self.streams.len() < STREAMS_MIN {
            self.streams.push((self.card.context().cuda().new_stream()?, 0));
        }
        Ok(())
    }

    /// Asks for one behind this event. If the driver refuses, none comes.
    pub(crate) fn ask(&mut self, event: &Event) -> Option<Notice> {
        let stream = self.least_used()?;
        let ring = self.spare.pop().unwrap_or_else(|| Ring::new(self.bell.clone()));
        // It may have been rung late, for another.
        ring.has_rung();
        self.streams[stream].1 += 1;
        ask_for_notice(&self.streams[stream].0, event, ring);
        Some(Notice { ring, stream })
    }

    /// Ends the wait for it.
    pub(crate) fn end(&mut self, notice: Notice) {
        self.streams[notice.stream].1 -= 1;
        self.spare.push(notice.ring);
    }

    /// None if there is none.
    fn least_used(&mut self) -> Option<usize> {
        let least = (0..self.streams.len()).min_by_key(|&nth| self.streams[nth].1);
        let busy = least.is_none_or(|nth| self.streams[nth].1 > 0);
        if busy
            && self.streams.len() < STREAMS_MAX
            && let Ok(stream) = self.card.context().cuda().new_stream()
        {
            self.streams.push((stream, 0));
            return Some(self.streams.len() - 1);
        }
        least
    }
}
