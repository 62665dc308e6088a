//! Copies into memory of the caller, a piece a poll.
//!
//! Invariant: a copy is of one version, and its future holds nothing of it between two polls that
//! cannot be taken back: not the reader count of a host copy, no staging, no extents. Once
//! something was taken back the copy goes on where it was if the version is still the same, which
//! its disk map tells; else from the front. Called by `read.rs`.

use std::ops::Range;
use std::sync::Arc;

use super::miss::Asked;
use super::{Result, VirtualMemory};
use crate::deadline::Deadline;
use crate::latency::{self, ReadStage};
use crate::migrate::{self, Copied, Piece};
use crate::object::{MapIdentity, Object};
use crate::parcel::Parcel;

/// What is copied from host memory within one poll, in bytes.
pub(super) const PIECE: usize = 256 * 1024;

/// How far a copy has come, in which version.
#[derive(Debug)]
struct Progress {
    done: usize,
    /// The most that was ever done.
    furthest: usize,
    /// What tells the version; none if only host memory has all of it.
    map: Option<MapIdentity>,
    /// What is copied from host memory within one poll, in bytes.
    step: usize,
    /// A piece from below was taken back: the next ones lie in memory of their own.
    recalled: bool,
}

impl Progress {
    fn new() -> Self {
        Progress { done: 0, furthest: 0, map: None, step: PIECE, recalled: false }
    }

    /// Gives a request that got further than ever before the deadline anew.
    fn renew(&mut self, deadline: &mut Deadline) {
        if self.done > self.furthest {
            self.furthest = self.done;
            *deadline = deadline.renewed();
        }
    }

    /// Goes on in this version: from the front, unless the pieces so far are of the same. True if
    /// they are.
    fn go_on(&mut self, map: Option<MapIdentity>) -> bool {
        let same = self.map.as_ref().zip(map.as_ref()).is_some_and(|(one, two)| one.is_same(two));
        if !same {
            (self.done, self.map) = (0, map);
        }
        same
    }
}

/// How a look at one place ended.
enum Ended {
    Done,
    /// What it worked on was taken back.
    Recalled,
    /// The object is not there, or no longer.
    Elsewhere,
}

impl VirtualMemory {
    /// Copies a part of one version into memory of the caller. It may take as long as it takes:
    /// the deadline is that of each piece, so a request that starts again and again still ends.
    pub(super) async fn copy_in_pieces(
        &self,
        object: &Arc<Object>,
        range: Range<usize>,
        buf: &mut [u8],
        mut how: Asked,
    ) -> Result<()> {
        let mut progress = Progress::new();
        let mut missed = false;
        loop {
            let mut ended = self.copy_from_host(object, &range, buf, &mut progress).await;
            if matches!(ended, Ended::Elsewhere) {
                if !std::mem::replace(&mut missed, true)
                    && self.promoted(object, &range, &how).await?.is_some()
                {
                    continue;
                }
                ended = self.copy_from_below(object, &range, buf, &mut how, &mut progress).await?;
            }
            if matches!(ended, Ended::Done) {
                return Ok(());
            }
            self.check_open()?;
            progress.renew(&mut how.deadline);
            if how.deadline.is_past() {
                return Err(how.deadline.error("reading a part"));
            }
        }
    }

    /// The reader count is lent: a waiter for space takes it back if this future is not polled. A
    /// version that is not wholly on disk has no identity to compare, so then the copy starts
    /// again, each time with larger pieces: it ends however rarely it is polled, and copies at most
    /// twice as much as in one go.
    async fn copy_from_host(
        &self,
        object: &Arc<Object>,
        range: &Range<usize>,
        buf: &mut [u8],
        progress: &mut Progress,
    ) -> Ended {
        let Some((guard, map)) = object.host_version() else { return Ended::Elsewhere };
        progress.go_on(map);
        let lent = Parcel::lend(guard);
        loop {
            let start = progress.done;
            let end = range.len().min(start + progress.step);
            let stage = latency::enter(ReadStage::Copy);
            let copied = lent.with(&self.shared.unclaimed, |guard| {
                let from = &guard.as_ref()[range.start + start..range.start + end];
                buf[start..end].copy_from_slice(from);
            });
            drop(stage);
            if copied.is_none() {
                if progress.map.is_none() {
                    progress.step = progress.step.saturating_mul(2);
                }
                return Ended::Recalled;
            }
            progress.done = end;
            if end == range.len() {
                return Ended::Done;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Each piece is read by a task of its own, which hands the version on with it; between two of
    /// them this future has both, and no await.
    async fn copy_from_below(
        &self,
        object: &Arc<Object>,
        range: &Range<usize>,
        buf: &mut [u8],
        how: &mut Asked,
        progress: &mut Progress,
    ) -> Result<Ended> {
        let mut version = None;
        while progress.done < range.len() {
            let rest = range.start + progress.done..range.end;
            let owned = progress.recalled;
            let class = how.class;
            let deadline = how.deadline;
            let piece =
                migrate::read_piece(object.clone(), version.take(), rest, owned, class, deadline);
            let parcel = self.shared.spawn_for_caller("vmem-read", piece);
            let answer = self.shared.answer(&parcel, &deadline, "reading a part").await?;
            let Some(piece) = answer else {
                progress.recalled = true;
                return Ok(Ended::Recalled);
            };
            match piece {
                Piece::Copied(Copied { bytes, at, map, version: same }) => {
                    version = same.take_back();
                    let before = progress.done;
                    // A piece from the front is of any version.
                    if progress.go_on(Some(map)) || before == 0 {
                        let end = before + at.len();
                        let stage = latency::enter(ReadStage::Copy);
                        buf[before..end].copy_from_slice(&bytes[at]);
                        drop(stage);
                        progress.done = end;
                    }
                    progress.renew(&mut how.deadline);
                }
                Piece::Resident => return Ok(Ended::Elsewhere),
                Piece::Zeros => {
                    buf.fill(0);
                    progress.done = range.len();
                }
            }
        }
        Ok(Ended::Done)
    }
}
