//! What an object knows of its name.
//!
//! Invariant: an object has one name at a time, and a call that names it claims it first, so that
//! of two calls at once only one succeeds. The record is that of the durable version, or of the
//! version that the first flush will make durable. Called with the turn of the name, by
//! `changes.rs` and `persist.rs`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::locks::{self, Lock};

use super::{ExtentMap, GatePass, Leave, Object};
use crate::catalog::CatalogRecord;
use crate::error::VirtualMemoryError;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Named {
    /// The name with which it came into memory: handles lend it out, so it stays.
    first: OnceLock<Arc<str>>,
    state: Lock<Option<State>, { locks::NAMED }>,
    /// Whether it stands in the line of those that may leave memory.
    in_line: AtomicBool,
    /// Why it has lost its name to another store, if it has.
    taken: OnceLock<Box<VirtualMemoryError>>,
}

#[derive(Debug)]
struct State {
    /// The name that it has now.
    current: Arc<str>,
    record: CatalogRecord,
    /// Where the version is to which the catalog leads. None before the first flush.
    durable: Option<ExtentMap>,
}

/// The right to give a name to an object that has none. Dropped, it still has none.
pub(crate) struct Claim<'a> {
    named: &'a Named,
    kept: bool,
}

impl<'a> Claim<'a> {
    /// Claims the object for this name, under this record.
    ///
    /// # Errors
    ///
    /// `AlreadyNamed`.
    pub(crate) fn of(
        object: &'a Object,
        name: &Arc<str>,
        record: CatalogRecord,
    ) -> Result<Self, VirtualMemoryError> {
        let named = object.named();
        let mut state = named.state.lock();
        if let Some(state) = &*state {
            return Err(VirtualMemoryError::AlreadyNamed {
                handle: object.id,
                name: state.current.clone(),
            });
        }
        *state = Some(State { current: name.clone(), record, durable: None });
        Ok(Claim { named, kept: false })
    }

    /// Gives the object the name; the catalog leads to `durable`, if it is given.
    pub(crate) fn keep(mut self, record: CatalogRecord, durable: Option<ExtentMap>) {
        self.kept = true;
        if let Some(state) = &mut *self.named.state.lock() {
            let _ = self.named.first.set(state.current.clone());
            (state.record, state.durable) = (record, durable);
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.kept {
            *self.named.state.lock() = None;
        }
    }
}

impl Named {
    /// The name with which it came into memory, once it has one.
    pub(crate) fn first(&self) -> Option<&str> {
        self.first.get().map(|name| &**name)
    }

    /// The name that it has now.
    pub(crate) fn current(&self) -> Option<Arc<str>> {
        self.state.lock().as_ref().map(|state| state.current.clone())
    }

    /// The record of the name that it has now.
    pub(crate) fn record(&self) -> Option<CatalogRecord> {
        self.state.lock().as_ref().map(|state| state.record.clone())
    }

    /// The record, unless the catalog has it.
    pub(crate) fn volatile_record(&self) -> Option<CatalogRecord> {
        let state = self.state.lock();
        state.as_ref().filter(|state| state.durable.is_none()).map(|state| state.record.clone())
    }

    pub(crate) fn is_durable(&self) -> bool {
        self.state.lock().as_ref().is_some_and(|state| state.durable.is_some())
    }

    /// Record and durable map; none of an object that has lost its name.
    pub(crate) fn state(&self) -> Option<(CatalogRecord, Option<ExtentMap>)> {
        let state = self.state.lock();
        state.as_ref().map(|state| (state.record.clone(), state.durable.clone()))
    }

    pub(crate) fn rename(&self, to: Arc<str>) {
        if let Some(state) = &mut *self.state.lock() {
            state.current = to;
        }
    }

    /// Takes the name from this object. Returns the durable map.
    pub(crate) fn lose(&self) -> Option<ExtentMap> {
        self.state.lock().take().and_then(|state| state.durable)
    }

    /// Another store has changed what has its name.
    pub(crate) fn set_taken(&self, error: VirtualMemoryError) {
        let _ = self.taken.set(Box::new(error));
    }

    pub(crate) fn taken(&self) -> Option<VirtualMemoryError> {
        self.taken.get().map(|error| (**error).clone())
    }

    /// Notes that the catalog leads to this version now. Returns the map of the previous one.
    pub(crate) fn set_durable(&self, record: CatalogRecord, map: ExtentMap) -> Option<ExtentMap> {
        let mut state = self.state.lock();
        let state = state.as_mut()?;
        state.record = record;
        state.durable.replace(map)
    }

    pub(crate) fn set_record(&self, record: CatalogRecord) {
        if let Some(state) = &mut *self.state.lock() {
            state.record = record;
        }
    }

    /// Lets the object leave memory if it may; the caller holds the lock of its entry in the table.
    pub(crate) fn try_leave(&self, object: &Object, pass: &GatePass) -> Leave {
        // Held meanwhile, so that the map is not cloned between the look and the end of the object.
        let state = self.state.lock();
        match state.as_ref().and_then(|state| state.durable.as_ref()) {
            Some(durable) => object.try_leave(pass, durable),
            None => Leave::Stays,
        }
    }

    /// Takes a place in the line of those that may leave memory; false if it has one.
    pub(crate) fn enter_line(&self) -> bool {
        !self.in_line.swap(true, Ordering::SeqCst)
    }

    /// Leaves the line, before it is looked at: what happens from now on offers it again.
    pub(crate) fn leave_line(&self) {
        self.in_line.store(false, Ordering::SeqCst);
    }
}
