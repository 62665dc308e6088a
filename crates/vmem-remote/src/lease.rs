//! The lease of an instance: what it uses of the bucket stays there.
//!
//! Invariant: an instance makes chunks known to its store, and names lead to chunks, only until
//! half the grace after the beginning of its last renewal; and a renewal answers each round of a
//! collector with all that the instance uses, which is what its ledger has and what its commits in
//! flight lead to. Kept by a task of the tier; asked by the catalog.
//!
//! # Objects
//!
//! `<prefix>/rounds/<round>` lists segments that a collector would delete. It is made by
//! `catalog::segments`, whose page says why nothing in use is deleted.
//! `<prefix>/instances/<instance>` is the lease: it is put anew each quarter of the grace, and says
//! of each round which of its candidates the instance uses. The last act of an instance deletes it,
//! unless a put of a commit may still arrive.
//! `<prefix>/ended/<instance>` ends a lease that was not renewed for four times the grace: a
//! collector creates it, it stays for good, and an instance that finds its own changes no name and
//! puts nothing any more.

mod held;
mod record;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use object_store::path::Path;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmem_core::planted;

use crate::error::RequestError;
use crate::inner::Inner;
use held::All;

pub(crate) use held::Held;
pub(crate) use record::{
    Answers, CANDIDATES_MAX, LEASE_LEN_MAX, ROUND_LEN_MAX, SegmentId, decode_lease, encode_round,
};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Lease {
    paths: LeasePaths,
    state: Mutex<State>,
    /// Held by the renewal that runs.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    /// When the last renewal began that succeeded.
    renewed: Option<Instant>,
    /// A collector has ended it.
    is_ended: bool,
    held: All,
    /// The rounds that were listed last.
    rounds: BTreeMap<Uuid, Arc<[SegmentId]>>,
}

/// Where leases and rounds are.
#[derive(Clone, Debug)]
pub(crate) struct LeasePaths {
    pub(crate) instances: Path,
    pub(crate) rounds: Path,
    pub(crate) ended: Path,
}

impl LeasePaths {
    pub(crate) fn new(prefix: &Path) -> Self {
        let below = |folder| prefix.clone().join(folder);
        LeasePaths { instances: below("instances"), rounds: below("rounds"), ended: below("ended") }
    }
}

/// An object of one of these folders.
pub(crate) fn entry(folder: &Path, id: Uuid) -> Path {
    folder.clone().join(id.as_hyphenated().to_string())
}

/// Whose object of one of these folders it is.
pub(crate) fn id_of(folder: &Path, path: &Path) -> Option<Uuid> {
    let mut parts = path.prefix_match(folder)?;
    let id = Uuid::try_parse(parts.next()?.as_ref()).ok()?;
    (*path == entry(folder, id)).then_some(id)
}

impl Lease {
    pub(crate) fn new(prefix: &Path) -> Self {
        let paths = LeasePaths::new(prefix);
        Lease { paths, state: Mutex::default(), turn: tokio::sync::Mutex::default() }
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.state.lock().is_ended
    }

    /// The rounds of which no body was read, among these; the others are forgotten.
    fn unread(&self, listed: &HashSet<Uuid>) -> Vec<Uuid> {
        let rounds = &mut self.state.lock().rounds;
        rounds.retain(|id, _| listed.contains(id));
        listed.iter().filter(|id| !rounds.contains_key(id)).copied().collect()
    }
}

impl Inner {
    /// Whether the lease allows to use what is in the bucket.
    ///
    /// # Errors
    ///
    /// `LeaseEnded`, `LeaseExpired`.
    pub(crate) fn check_lease(&self) -> Result<(), RequestError> {
        let state = self.lease.state.lock();
        let limit = self.client.options().grace / 2;
        match state.renewed {
            _ if state.is_ended => Err(RequestError::LeaseEnded),
            Some(renewed) if renewed.elapsed() < limit => Ok(()),
            _ => Err(RequestError::LeaseExpired),
        }
    }

    /// The same, after a renewal if it has expired.
    ///
    /// # Errors
    ///
    /// `LeaseEnded`, or that of a request of the renewal.
    pub(crate) async fn leased(&self) -> Result<(), RequestError> {
        let checked = self.check_lease();
        if checked != Err(RequestError::LeaseExpired) {
            return checked;
        }
        let _turn = self.lease.turn.lock().await;
        // The renewal before was perhaps enough.
        match self.check_lease() {
            Err(RequestError::LeaseExpired) => self.renew_in_turn().await,
            checked => checked,
        }
    }

    /// Keeps these segments for a commit.
    ///
    /// # Errors
    ///
    /// `Abandoned` once the tier has ended.
    pub(crate) fn hold(&self, segments: HashSet<SegmentId>) -> Result<Held, RequestError> {
        let mut state = self.lease.state.lock();
        let key = state.held.enter(segments).ok_or(RequestError::Abandoned)?;
        Ok(Held::new(self.me(), key))
    }

    /// Puts the lease anew, with an answer to each round.
    ///
    /// # Errors
    ///
    /// `LeaseEnded`, or that of a request.
    pub(crate) async fn renew(&self) -> Result<(), RequestError> {
        // The renewal that has the turn makes requests, each of which ends.
        let _turn = self.lease.turn.lock().await;
        self.renew_in_turn().await
    }

    async fn renew_in_turn(&self) -> Result<(), RequestError> {
        let began = Instant::now();
        self.read_rounds().await?;
        let late = began.checked_sub(self.client.options().grace);
        late.into_iter().for_each(|before| self.ledger.lock().forget_awaited(before));
        let body = record::encode_lease(self.id, &self.answers());
        self.client.put(&entry(&self.lease.paths.instances, self.id), &[body], |_| ()).await?;
        // After the put, and counted from before it: a collector that ends the lease after this
        // look waits until what it allows has ended.
        let ended = self.client.get_whole(&entry(&self.lease.paths.ended, self.id), 64).await?;
        let mut state = self.lease.state.lock();
        if ended.is_some() {
            state.is_ended = true;
            return Err(RequestError::LeaseEnded);
        }
        state.renewed = Some(began);
        Ok(())
    }

    /// Finds out which rounds there are, and what they ask.
    async fn read_rounds(&self) -> Result<(), RequestError> {
        let folder = &self.lease.paths.rounds;
        let fold = |listed: &mut HashSet<Uuid>, path: &Path, _| listed.extend(id_of(folder, path));
        let listed: HashSet<Uuid> = self.client.scan(folder, fold).await?;
        for id in self.lease.unread(&listed) {
            let read = self.client.get_whole(&entry(folder, id), ROUND_LEN_MAX).await?;
            let Some((body, _)) = read else { continue };
            match record::decode_round(id, &body) {
                Ok(candidates) => {
                    self.lease.state.lock().rounds.insert(id, candidates.into());
                }
                // A round without an answer deletes nothing.
                Err(flaw) => {
                    tracing::warn!(target: "vmem::remote", round = %id, flaw, "a round is unread");
                }
            }
        }
        Ok(())
    }

    /// Which of the candidates of each round this instance uses.
    fn answers(&self) -> Answers {
        let (rounds, held) = {
            let mut state = self.lease.state.lock();
            (state.rounds.clone(), state.held.segments())
        };
        let ledger = self.ledger.lock();
        let is_used = |segment: &SegmentId| {
            held.contains(segment) && !planted!("lease-unheld") || ledger.uses(self.id, *segment)
        };
        let answer = |candidates: Arc<[SegmentId]>| candidates.iter().map(is_used).collect();
        rounds.into_iter().map(|(round, candidates)| (round, answer(candidates))).collect()
    }

    /// Gives the lease back, once all else has ended. It stays if a put of a commit may still
    /// arrive: then it ends as that of a process that was killed.
    pub(crate) async fn give_lease_back(&self) -> Result<(), RequestError> {
        let is_free = self.lease.state.lock().held.close();
        if !is_free {
            return Ok(());
        }
        self.client.delete(&[entry(&self.lease.paths.instances, self.id)]).await
    }

    /// How long a put of which the outcome is unknown may still arrive.
    fn late(&self) -> Duration {
        self.client.options().grace / 2
    }
}

/// Renews the lease of a tier until it closes, or is dropped, or the lease has ended.
pub(crate) async fn keep_lease(tier: Weak<Inner>, closing: CancellationToken) {
    let Some(mut pause) = tier.upgrade().map(|inner| inner.client.options().grace / 4) else {
        return;
    };
    loop {
        let closed = timeout(pause, closing.cancelled()).await;
        let (Err(_), Some(inner)) = (closed, tier.upgrade()) else { return };
        let options = inner.client.options();
        pause = options.grace / 4;
        if let Err(error) = inner.renew().await {
            tracing::warn!(target: "vmem::remote", %error, "the lease is not renewed");
            if error == RequestError::LeaseEnded {
                return;
            }
            pause = (options.grace / 16).min(options.circuit_pause);
        }
    }
}
