//! How many calls of ours the streams of users hold.
//!
//! The launch queue of a stream takes about a thousand calls; with more the driver waits, and with
//! it the thread that calls, until a kernel in front of them ends, which may take as long as it
//! likes.
//!
//! Invariant: of one stream at most `CALLS_MAX` are queued at a time, half of what it takes. They
//! are counted until the stream has passed them. Called by gathers.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::CudaStream;
use parking_lot::Mutex;

/// Calls of copies that a stream of a user holds at most; those around them come on top.
const CALLS_MAX: usize = 512;
/// An event behind the copies, and two where the buffer keeps its own order.
const AROUND: usize = 3;

/// Calls by stream.
#[derive(Debug, Default)]
pub(crate) struct Streams(Mutex<HashMap<usize, usize>>);

/// Calls that are counted until this is dropped.
#[derive(Debug)]
pub(crate) struct Queued {
    streams: Arc<Streams>,
    stream: usize,
    calls: usize,
}

impl Streams {
    /// Counts this many calls for the copies of a group; none if the stream holds too many.
    pub(crate) fn try_queue(self: &Arc<Self>, stream: &CudaStream, calls: usize) -> Option<Queued> {
        let stream = stream.cu_stream().addr();
        let calls = calls + AROUND;
        let mut streams = self.0.lock();
        let held = streams.get(&stream).copied().unwrap_or(0);
        if held + calls > CALLS_MAX && !vmem_core::planted!("gather-queue") {
            return None;
        }
        streams.insert(stream, held + calls);
        Some(Queued { streams: self.clone(), stream, calls })
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        let mut streams = self.streams.0.lock();
        if let Some(held) = streams.get_mut(&self.stream) {
            *held -= self.calls;
            if *held == 0 {
                streams.remove(&self.stream);
            }
        }
    }
}
