//! The least mean rate at which a client has to send or take a body.
//!
//! Invariant: what a client keeps the service waiting adds up, each byte takes off what it may take
//! at that rate, and more than a grace of it ends the exchange: so the whole of it takes at most
//! the grace and the time of its length. Bytes that came quickly are no credit for later ones. The
//! time of the store is not the client's. Called by `put` and `server`.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::config::Limits;

/// How far a client is behind the rate.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    /// Bytes in a second; 0 if any rate will do.
    min_rate: u64,
    grace: Duration,
    behind: Duration,
}

impl Pace {
    pub(crate) fn new(limits: &Limits) -> Self {
        Pace { min_rate: limits.min_rate, grace: limits.rate_grace, behind: Duration::ZERO }
    }

    /// Counts a wait for the client, and the bytes that ended it.
    pub(crate) fn waited(&mut self, time: Duration, bytes: u64) {
        if self.min_rate > 0 {
            let may_take = Duration::from_secs_f64(bytes as f64 / self.min_rate as f64);
            self.behind = (self.behind + time).saturating_sub(may_take);
        }
    }

    /// How long the client may keep the service waiting now; none for as long as it likes.
    pub(crate) fn left(&self) -> Option<Duration> {
        (self.min_rate > 0).then(|| self.grace.saturating_sub(self.behind))
    }
}

/// A connection whose peer has to take what is written at a least rate.
#[derive(Debug)]
pub(crate) struct Paced<S> {
    inner: S,
    pace: Pace,
    /// Since when a write waits, and when it has waited too long.
    waiting: Option<(Instant, Option<Pin<Box<Sleep>>>)>,
}

impl<S> Paced<S> {
    pub(crate) fn new(inner: S, limits: &Limits) -> Self {
        Paced { inner, pace: Pace::new(limits), waiting: None }
    }
}

impl<S: AsyncWrite + Unpin> Paced<S> {
    /// Writes, and counts how long that takes.
    fn poll_paced(
        &mut self,
        context: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(written) = write(Pin::new(&mut self.inner), context) {
            let time = self.waiting.take().map_or(Duration::ZERO, |(since, _)| since.elapsed());
            self.pace.waited(time, written.as_ref().map_or(0, |bytes| *bytes as u64));
            return Poll::Ready(written);
        }
        let left = self.pace.left();
        let (_, too_long) = self.waiting.get_or_insert_with(|| {
            let now = Instant::now();
            (now, left.map(|left| Box::pin(sleep_until(now + left))))
        });
        let Some(too_long) = too_long else { return Poll::Pending };
        ready!(too_long.as_mut().poll(context));
        let why = "the peer takes a response too slowly";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_paced(context, |inner, context| inner.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_paced(context, |inner, context| inner.poll_write_vectored(context, parts))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace() -> Pace {
        let limits =
            Limits { min_rate: 1000, rate_grace: Duration::from_secs(60), ..Limits::default() };
        Pace::new(&limits)
    }

    #[test]
    fn client_below_the_rate_has_the_grace_and_no_more() {
        let mut pace = pace();
        // Half of the rate: each second leaves it half a second more behind.
        for second in 1..120_u64 {
            pace.waited(Duration::from_secs(1), 500);
            assert_eq!(pace.left(), Some(Duration::from_millis(60_000 - 500 * second)));
        }
        pace.waited(Duration::from_secs(2), 500);
        assert_eq!(pace.left(), Some(Duration::ZERO));
    }

    #[test]
    fn client_above_the_rate_is_never_behind_and_has_no_credit() {
        let mut pace = pace();
        for _ in 0..10_000 {
            pace.waited(Duration::from_secs(1), 1001);
            assert_eq!(pace.left(), Some(Duration::from_secs(60)));
        }
        // A gigabyte at once, and then nothing.
        pace.waited(Duration::ZERO, 1 << 30);
        pace.waited(Duration::from_secs(45), 0);
        assert_eq!(pace.left(), Some(Duration::from_secs(15)));
    }

    #[test]
    fn no_rate_is_no_limit() {
        let mut pace = Pace { min_rate: 0, ..pace() };
        pace.waited(Duration::from_secs(1 << 30), 1);
        assert_eq!(pace.left(), None);
    }
}
