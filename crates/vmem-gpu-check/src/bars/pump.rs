//! Copies by hand between pinned and device memory, a fixed number in flight: what the link gives
//! to a program that does nothing else.
//!
//! Invariant: no more than that number of pieces of each direction are in flight; all have ended
//! when a call returns. Called by the bars.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::Result;
use cudarc::driver::CudaEvent;

use super::raw::{Link, Piece};

/// Marks among the pieces in flight: one for each piece would cost as much as a small piece.
const MARKS: usize = 4;

/// How pieces are handed to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// A call for each.
    Piece,
    /// A call for many.
    Batch,
}

/// Copies `up` on the first lane and `down` on the second, and says how long that took.
///
/// # Errors
///
/// What the driver says.
pub(super) fn pump(
    link: &Link,
    [up, down]: [&[Piece]; 2],
    in_flight: usize,
    by: By,
) -> Result<Duration> {
    let directions = usize::from(!up.is_empty()) + usize::from(!down.is_empty());
    let each = (in_flight / directions.max(1)).max(1);
    let group = each.div_ceil(MARKS);
    let mut rest = [up.chunks(group), down.chunks(group)];
    let mut marks: [VecDeque<CudaEvent>; 2] = Default::default();
    link.stream(0).context().bind_to_thread()?;
    let begun = Instant::now();
    loop {
        let mut any = false;
        for lane in [0, 1] {
            let Some(pieces) = rest[lane].next() else { continue };
            any = true;
            let full = marks[lane].len() * group >= each;
            let oldest = if full { marks[lane].pop_front() } else { None };
            let mark = match oldest {
                Some(mark) => {
                    mark.synchronize()?;
                    mark
                }
                None => link.stream(lane).context().new_event(None)?,
            };
            match (by, lane) {
                (By::Batch, _) => link.batch(lane, lane == 0, pieces)?,
                (By::Piece, 0) => pieces.iter().try_for_each(|&piece| link.up(lane, piece))?,
                (By::Piece, _) => pieces.iter().try_for_each(|&piece| link.down(lane, piece))?,
            }
            mark.record(link.stream(lane))?;
            marks[lane].push_back(mark);
        }
        if !any {
            break;
        }
    }
    link.wait()?;
    Ok(begun.elapsed())
}
