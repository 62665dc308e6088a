//! What a store says of itself: its figures, what went wrong, what is held, and what serves.
//!
//! Invariant: nothing here waits, moves an object or marks it as used. Called by services and
//! pages.

use futures::Stream;

use super::VirtualMemory;
use crate::capabilities::Capabilities;
use crate::config::VirtualMemoryConfig;
use crate::events::MigrationEvent;
use crate::memory_tier::MemoryTier;
use crate::notice::Incident;
use crate::stats::{TierStats, VirtualMemoryStats};
use crate::tier::HeldObject;

impl VirtualMemory {
    /// The current figures; the cost does not depend on the number of objects.
    pub fn stats(&self) -> VirtualMemoryStats {
        let mut stats = self.shared.stats();
        stats.metadata_bytes += self.names.memory_bytes();
        stats.names_in_memory = self.names.in_memory();
        (stats.named_changes, stats.commits) = self.names.committed();
        stats.commits_stopped = self.names.has_stopped();
        stats
    }

    /// The current figures of one tier; the memory of each device is a tier of its own.
    pub fn tier_stats(&self, tier: MemoryTier) -> TierStats {
        self.shared.tier_stats(tier)
    }

    /// What the machine offers, as found when the store was opened, and what serves instead.
    pub fn capabilities(&self) -> &Capabilities {
        &self.lifetime.capabilities
    }

    /// The effective configuration: budgets in bytes, the driver that serves, and no GPU where none
    /// was found. The path of a temporary directory is not in it, but in
    /// [`capabilities`](Self::capabilities). Where devices got different amounts of memory,
    /// `vram_capacities` has them.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// let asked = vmem::VirtualMemoryConfig::builder().host_percent(1.0).disk_capacity(1 << 20);
    /// let vmem = vmem::open(asked.build()?).await?;
    /// assert!(vmem.config().host_capacity().is_some());
    /// # vmem.close().await
    /// # }
    /// ```
    pub fn config(&self) -> &VirtualMemoryConfig {
        &self.lifetime.config
    }

    /// Migrations as they end. A listener that is slow loses events and learns how many.
    pub fn migrations(&self) -> impl Stream<Item = MigrationEvent> + Send + 'static + use<> {
        self.shared.events.listen()
    }

    /// What went wrong lately, the newest first: at most eight of each kind and tier, and of a
    /// storm one a second of each kind. [`tier_stats`](Self::tier_stats) has how many there were.
    ///
    /// ```
    /// # use vmem::{MemoryTier, VirtualMemoryConfig};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// for incident in vmem.incidents() {
    ///     // refusal in host: TierFull { ... }
    ///     println!("{incident}");
    /// }
    /// # assert!(vmem.incidents().is_empty());
    /// # vmem.close().await
    /// # }
    /// ```
    pub fn incidents(&self) -> Vec<Incident> {
        self.shared.incidents()
    }

    /// The objects that pins and leases keep in their tiers, the largest first; at most this many.
    /// What readers hold is in [`held_bytes`](VirtualMemoryStats::held_bytes) alone.
    ///
    /// ```
    /// # use vmem::{MemoryTier, VirtualMemoryConfig};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// let handle = vmem.put_named("weights", [1, 2, 3], MemoryTier::Disk).await?;
    /// let pin = vmem.pin(&handle, MemoryTier::Host).await?;
    /// let [held] = &vmem.held_objects(10)[..] else { panic!("one object") };
    /// assert_eq!((held.name.as_deref(), held.tier), (Some("weights"), MemoryTier::Host));
    /// drop(pin);
    /// assert!(vmem.held_objects(10).is_empty());
    /// # vmem.close().await
    /// # }
    /// ```
    pub fn held_objects(&self, most: usize) -> Vec<HeldObject> {
        self.shared.held_objects(most)
    }

    /// Whether the store was closed, by any of its clones; then each call fails with `Closed`.
    pub fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }
}
