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
use crate::object::Named;

/// What an entry of the table takes beside the bytes of its name: key, value and control byte, with
/// the share of the table that stands empty; the two counts in front of the name; what the object
/// knows of it.
const ENTRY_BYTES: usize =
    (size_of::<(Arc<str>, VMemHandle)>() + 1) * 3 / 2 + 2 * size_of::<usize>() + size_of::<Named>();

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

    /// The durable names in memory, with their versions.
    pub(super) fn durable_versions(&self) -> Vec<(Arc<str>, u64)> {
        let version = |handle: &VMemHandle| {
            let named = handle.object().named.get().filter(|named| named.is_durable())?;
            Some(named.record()?.version)
        };
        let entries = self.table.iter();
        entries.filter_map(|entry| Some((entry.key().clone(), version(entry.value())?))).collect()
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
        self.follower.get().iter().for_each(|follower| follower.end());
        self.closed.clear();
        for (name, handle) in self.all() {
            drop(self.take(&name));
            drop(handle);
        }
    }

    /// Puts an object into the table; returns what had the name there.
    pub(super) fn insert(&self, name: &Arc<str>, handle: VMemHandle) -> Option<VMemHandle> {
        let current = handle.object().named.get().and_then(|named| named.current());
        assert!(current.as_ref() == Some(name), "an object stands under the name that it has");
        // Before the entry, so that it cannot be taken out uncounted.
        self.name_bytes.fetch_add(name.len() as u64, Ordering::Relaxed);
        let before = self.table.insert(name.clone(), handle);
        if before.is_some() {
            self.forget_bytes(name);
        }
        if self.cleared.load(Ordering::SeqCst) {
            // The store has ended meanwhile, so nothing else would take it out again.
            drop(self.take(name));
        }
        before
    }

    /// Takes what has the name out of the table.
    pub(super) fn take(&self, name: &Arc<str>) -> Option<VMemHandle> {
        let (name, handle) = self.table.remove(name)?;
        self.forget_bytes(&name);
        Some(handle)
    }

    /// An entry was taken out.
    pub(super) fn forget_bytes(&self, name: &str) {
        let before = self.name_bytes.fetch_sub(name.len() as u64, Ordering::Relaxed);
        assert!(before >= name.len() as u64, "the bytes of names never fall below zero");
    }

    /// How many names are in memory.
    pub(crate) fn in_memory(&self) -> u64 {
        self.table.len() as u64
    }

    /// What the names in memory take beside their objects, in bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let entries = self.table.len() * ENTRY_BYTES + self.closed.len() * size_of::<usize>();
        entries as u64 + self.name_bytes.load(Ordering::Relaxed)
    }
}
