//! What the tasks of a catalog have in common.
//!
//! Invariant: whatever runs for the catalog is counted by the tracker, so that a close can wait for
//! it; no lock is held over an await. Called by the catalog and its tasks.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use object_store::path::Path;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vmem_core::VirtualMemoryError;

use super::follow;
use super::generations::{Generation, Generations};
use super::paths::Paths;
use super::places::Places;
use crate::client::Client;
use crate::inner as tier;
use crate::lease::{Held, LeasePaths, SegmentId};

/// What the tasks of a catalog have in common.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) client: Client,
    pub(super) prefix: Path,
    pub(super) paths: Paths,
    pub(super) leases: LeasePaths,
    pub(super) places: Arc<dyn Places>,
    pub(super) generations: Mutex<Generations>,
    pub(super) next_id: AtomicU64,
    pub(super) attempts: AtomicU64,
    pub(super) listed: follow::Listed,
    /// The tier whose chunks the names lead to, and whose lease keeps those.
    pub(super) tier: Option<Arc<tier::Inner>>,
    /// Cancelled when the catalog closes.
    pub(super) closing: CancellationToken,
    pub(super) tracker: TaskTracker,
    pub(super) runtime: Handle,
}

impl Inner {
    /// Whether what names lead to may be used, after a renewal of the lease where that is needed.
    pub(super) async fn leased(&self, operation: &'static str) -> Result<(), VirtualMemoryError> {
        let Some(tier) = &self.tier else { return Ok(()) };
        tier.leased().await.map_err(|error| error.of_catalog(operation))
    }

    /// The same, as it is now.
    pub(super) fn check_lease(&self, operation: &'static str) -> Result<(), VirtualMemoryError> {
        let Some(tier) = &self.tier else { return Ok(()) };
        tier.check_lease().map_err(|error| error.of_catalog(operation))
    }

    /// Keeps segments that a commit leads to.
    pub(super) fn hold(
        &self,
        segments: HashSet<SegmentId>,
    ) -> Result<Option<Held>, VirtualMemoryError> {
        let tier = self.tier.as_ref().filter(|_| !segments.is_empty());
        let held = tier.map(|tier| tier.hold(segments)).transpose();
        held.map_err(|error| error.of_catalog("commit"))
    }

    /// Gives no number that this generation has.
    pub(super) fn saw(&self, generation: Generation) {
        if let Some((id, version)) = generation.object {
            self.saw_id(id.max(version));
        }
    }

    pub(super) fn saw_id(&self, id: u64) {
        self.next_id.fetch_max(id.saturating_add(1), Ordering::SeqCst);
    }
}
