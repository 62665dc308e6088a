//! Follows the names that other stores change: one that no longer stands for the version in memory
//! is given up here, and the next look finds what it stands for.
//!
//! Invariant: what was written here and is not durable keeps its name until its own flush says what
//! has become of that. Handles keep the version that they have. The task holds nothing of the store
//! while it sleeps, and ends with it. Started with the names.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::{Names, Turn};
use crate::error::VirtualMemoryError;
use crate::task::spawn_named;

/// The task; dropped, it ends.
#[derive(Debug)]
pub(super) struct Follower(JoinHandle<()>);

impl Follower {
    /// Looks each time that `every` has passed after the last look.
    pub(super) fn start(names: &Arc<Names>, every: Duration) -> Self {
        let weak = Arc::downgrade(names);
        Follower(spawn_named(&names.shared.runtime, "vmem-follow", follow(weak, every)))
    }

    pub(super) fn end(&self) {
        self.0.abort();
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.end();
    }
}

async fn follow(names: Weak<Names>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let Some(names) = names.upgrade() else { return };
        if let Err(error) = look(&names).await {
            tracing::debug!(target: "vmem::names", %error, "names are not followed for now");
        }
    }
}

/// Looks at all names in memory that are durable.
///
/// # Errors
///
/// Those of the catalog.
async fn look(names: &Arc<Names>) -> Result<(), VirtualMemoryError> {
    let versions = names.durable_versions();
    if versions.is_empty() {
        return Ok(());
    }
    let asked: HashMap<_, _> = versions.iter().cloned().collect();
    for error in names.catalog()?.changed(versions).await? {
        use VirtualMemoryError::{NameNotFound, VersionChanged};
        let (VersionChanged { name, .. } | NameNotFound { name }) = &error else { continue };
        let Some(&version) = asked.get(name) else { continue };
        let what = give_up(names, (name, version), &error).await;
        what.unwrap_or_else(|late| {
            tracing::debug!(target: "vmem::names", %error, %late, "the name is given up later");
        });
    }
    Ok(())
}

/// Gives up a name that stands for another version than this one by now.
///
/// # Errors
///
/// `TimedOut` if other changes of the name are under way for that long.
async fn give_up(
    names: &Arc<Names>,
    (name, version): (&Arc<str>, u64),
    error: &VirtualMemoryError,
) -> Result<(), VirtualMemoryError> {
    let turn = Turn::of(names, name.clone(), &names.shared.deadline()).await?;
    let Some(handle) = names.get(name) else { return Ok(()) };
    let object = handle.object();
    let Some((record, Some(durable))) = object.named().state() else { return Ok(()) };
    // Else it was committed here meanwhile, or is about to be.
    let is_it = record.version == version;
    let may_go = object.is_as_durable(&durable) || crate::planted!("follow-dirty");
    drop(durable);
    if is_it && may_go {
        names.yield_name(&turn, object, error);
    }
    Ok(())
}
