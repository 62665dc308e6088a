//! The table of names: the named objects that are in memory.
//!
//! Invariant: an object in the table is alive, and its entry has one of its handles. No handle is
//! dropped under a lock of the table: the last one but this lets others leave it. Called by the
//! rest of `names/` and by `vmem/named.rs`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Names;
use crate::catalog::CatalogRecord;
use crate::handle::VMemHandle;

impl Names {
    /// The object of this name, if it is in memory.
    pub(crate) fn get(&self, name: &str) -> Option<VMemHandle> {
        self.table.get(name).map(|handle| handle.clone())
    }

    /// The object of this name and its record, if it is in memory.
    pub(crate) fn get_entry(&self, name: &str) -> Option<(VMemHandle, CatalogRecord)> {
        let handle = self.table.get(name)?;
        let record = handle.object().named.get()?.record()?;
        Some((handle.clone(), record))
    }

    /// The record of this name, if its object is in memory.
    pub(crate) fn record_in_memory(&self, name: &str) -> Option<CatalogRecord> {
        self.table.get(name)?.object().named.get()?.record()
    }

    /// Names of objects in memory that the catalog does not know, in order.
    pub(crate) fn volatile(&self, prefix: &str) -> BTreeMap<Arc<str>, CatalogRecord> {
        self.table
            .iter()
            .filter(|entry| entry.key().starts_with(prefix))
            .filter_map(|entry| {
                let record = entry.value().object().named.get()?.volatile_record()?;
                Some((entry.key().clone(), record))
            })
            .collect()
    }

    /// Every named object in memory, in the order of their names.
    pub(super) fn all(&self) -> Vec<(Arc<str>, VMemHandle)> {
        let mut all: Vec<_> =
            self.table.iter().map(|entry| (entry.key().clone(), entry.value().clone())).collect();
        all.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        all
    }

    /// Lets the objects go; at the end of the store. Each holds the store, which holds the table.
    pub(crate) fn clear(&self) {
        self.cleared.store(true, Ordering::SeqCst);
        for (name, handle) in self.all() {
            drop(self.take(&name));
            drop(handle);
        }
    }

    /// Puts an object into the table; returns what had the name there.
    pub(super) fn insert(&self, name: &Arc<str>, handle: VMemHandle) -> Option<VMemHandle> {
        let before = self.table.insert(name.clone(), handle);
        if self.cleared.load(Ordering::SeqCst) {
            // The store has ended meanwhile, and nobody would take it out again.
            drop(self.take(name));
        }
        before
    }

    /// Takes what has the name out of the table.
    pub(super) fn take(&self, name: &Arc<str>) -> Option<VMemHandle> {
        self.table.remove(name).map(|(_, handle)| handle)
    }
}
