//! The current figures to the recorder of the process, with the feature `metrics`.
//!
//! Invariant: each metric of [`ALL`](crate::metrics::ALL) is published here. Called by services,
//! when they are scraped.

use metrics::{counter, gauge, histogram};

use super::VirtualMemory;
use crate::latency::{ReadOp, ReadStage};
use crate::memory_tier::MemoryTier;
use crate::metrics::{Timed, label, set, set_total};
use crate::stats::VirtualMemoryStats;
use crate::tier::Storage;
use crate::totals::MigrationStats;

impl VirtualMemory {
    /// Publishes the current figures to the recorder of the `metrics` crate; for a service to call
    /// when it is scraped, and every few seconds besides, where nobody may scrape or metrics are
    /// pushed: each time that a read or a migration took is handed over once, by the first call
    /// after it, so a call takes longer the more there were. Times are exact to 1/64.
    ///
    /// The metrics are those of [`metrics::ALL`](crate::metrics::ALL). They have no label for the
    /// store: of several in one process, one publishes.
    ///
    /// ```
    /// # use vmem::VirtualMemoryConfig;
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// // Once, after the recorder of the service was installed.
    /// vmem::metrics::describe();
    /// // In the handler of `GET /metrics`, before the recorder renders.
    /// vmem.publish_metrics();
    /// # vmem.close().await
    /// # }
    /// ```
    pub fn publish_metrics(&self) {
        let stats = self.stats();
        for tier in self.tiers() {
            self.publish_tier(tier);
        }
        let ended = |outcome, reads| {
            counter!("vmem_reads_total", "tier" => "none", "outcome" => outcome).absolute(reads);
        };
        ended("failed", stats.reads_failed);
        ended("cancelled", stats.reads_cancelled);
        for stage in ReadStage::ALL {
            let reads = gauge!("vmem_reads_in_stage", "stage" => stage.as_str());
            reads.set(stats.reads_in(stage) as f64);
        }
        self.publish_times(&stats);
        publish_links(&stats);
        publish_store(&stats);
    }

    fn publish_tier(&self, tier: MemoryTier) {
        let stats = self.tier_stats(tier);
        let tier = label(tier);
        let gauges = [
            ("vmem_tier_used_bytes", stats.used_bytes),
            ("vmem_tier_capacity_bytes", stats.capacity_bytes),
            ("vmem_tier_peak_bytes", stats.peak_bytes),
            ("vmem_tier_largest_free_bytes", stats.largest_free_bytes),
            ("vmem_tier_objects", stats.objects),
        ];
        for (name, value) in gauges {
            gauge!(name, "tier" => tier.clone()).set(value as f64);
        }
        let incidents = [
            ("vmem_tier_refusals_total", stats.refusals),
            ("vmem_tier_faults_total", stats.faults),
            ("vmem_tier_fallbacks_total", stats.fallbacks),
        ];
        for (name, count) in incidents {
            counter!(name, "tier" => tier.clone()).absolute(count);
        }
        let reads = counter!("vmem_reads_total", "tier" => tier, "outcome" => "served");
        reads.absolute(stats.hits);
    }

    /// The distributions of times, and what moved for which cause.
    fn publish_times(&self, stats: &VirtualMemoryStats) {
        let mut published = self.shared.published.lock();
        for tier in self.tiers() {
            for op in ReadOp::ALL {
                let seconds = stats.latency(op, tier);
                if seconds.count() > 0 {
                    let to = histogram!(
                        "vmem_read_seconds", "op" => op.as_str(), "tier" => label(tier)
                    );
                    published.publish(Timed::Read(op, tier), seconds, &to);
                }
            }
        }
        for stage in ReadStage::ALL {
            let seconds = stats.waits(stage);
            if seconds.count() > 0 {
                let to = histogram!("vmem_waits_seconds", "cause" => stage.as_str());
                published.publish(Timed::Stage(stage), seconds, &to);
            }
        }
        for MigrationStats { from, to, cause, migrations, failed, bytes, took } in
            stats.migrations()
        {
            let labels = [("from", label(from)), ("to", label(to)), ("cause", cause.to_string())];
            counter!("vmem_migrations_total", &labels).absolute(migrations);
            counter!("vmem_migrations_failed_total", &labels).absolute(failed);
            counter!("vmem_moved_bytes_total", &labels).absolute(bytes);
            let seconds = histogram!("vmem_migration_seconds", &labels);
            published.publish(Timed::Migration(from, to, cause), took, &seconds);
        }
    }

    /// All that the store has, from fast to slow.
    fn tiers(&self) -> impl Iterator<Item = MemoryTier> {
        let devices = (0..self.shared.devices().len() as u8).map(MemoryTier::of_device);
        let below = self.shared.storage().iter().map(Storage::tier);
        devices.chain([MemoryTier::Host]).chain(below)
    }
}

fn publish_links(stats: &VirtualMemoryStats) {
    let links = [
        ("host", "vram", stats.host_to_vram_bytes),
        ("vram", "host", stats.vram_to_host_bytes),
        ("disk", "host", stats.disk_to_host_bytes),
        ("host", "disk", stats.host_to_disk_bytes),
        ("remote", "host", stats.remote_to_host_bytes),
        ("host", "remote", stats.host_to_remote_bytes),
    ];
    for (from, to, bytes) in links {
        counter!("vmem_link_bytes_total", "from" => from, "to" => to).absolute(bytes);
    }
}

fn publish_store(stats: &VirtualMemoryStats) {
    set("vmem_held_bytes", stats.held_bytes);
    set("vmem_pinned_bytes", stats.pinned_bytes);
    set("vmem_dirty_bytes", stats.dirty_bytes);
    set("vmem_vram_dirty_bytes", stats.vram_dirty_bytes);
    set("vmem_staging_bytes", stats.staging_bytes);
    set("vmem_stream_bytes", stats.stream_bytes);
    set("vmem_registered_bytes", stats.registered_bytes);
    set("vmem_metadata_bytes", stats.metadata_bytes);
    set("vmem_objects", stats.objects);
    set("vmem_names_in_memory", stats.names_in_memory);
    set("vmem_waiters", stats.waiters);
    set("vmem_migrations_in_flight", stats.migrations_in_flight);
    set_total("vmem_misses_total", stats.misses);
    set_total("vmem_evictions_total", stats.evictions);
    set_total("vmem_promotions_total", stats.promotions);
    set_total("vmem_clean_drops_total", stats.clean_drops);
    set_total("vmem_relocated_bytes_total", stats.relocated_bytes);
    set_total("vmem_named_changes_total", stats.named_changes);
    set_total("vmem_commits_total", stats.commits);
    set_total("vmem_errors_total", stats.errors);
    set("vmem_commits_stopped", u64::from(stats.commits_stopped));
    set_total("vmem_spans_left_out_total", stats.spans_left_out);
}
