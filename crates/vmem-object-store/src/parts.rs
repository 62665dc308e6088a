//! The parts of an upload that have arrived.
//!
//! Invariant: the parts that were joined are the first ones, in their order, and each other part is
//! an unnamed object of its own; once the upload has ended there is neither, and what arrives later
//! is given up. No call here waits. Called by `upload.rs`.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use vmem_core::{ObjectWriter, VMemHandle};

use crate::error::RequestError;

/// The first parts of an upload, one behind the other.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) writer: ObjectWriter,
    /// How many parts it has.
    pub(crate) count: usize,
}

/// See the module's documentation; none once the upload has ended.
#[derive(Debug)]
pub(crate) struct Parts(Mutex<Option<State>>);

#[derive(Debug, Default)]
struct State {
    arrived: BTreeMap<usize, VMemHandle>,
    /// How many parts were joined.
    joined: usize,
    /// The writer that has the joined parts; `None` before the first, and while a caller writes. No
    /// other part is next in order then, since the one being written is neither joined nor here.
    writer: Option<ObjectWriter>,
}

impl State {
    /// The parts from those that were joined up to this one, if they have all arrived.
    fn take_up_to(&mut self, part: usize) -> Result<Vec<VMemHandle>, RequestError> {
        let missing = (self.joined..part).find(|part| !self.arrived.contains_key(part));
        match missing.filter(|_| !vmem_core::planted!("object-store-turn")) {
            Some(part) => Err(RequestError::PartMissing { part }),
            None => Ok((self.joined..part).filter_map(|part| self.arrived.remove(&part)).collect()),
        }
    }

    fn take_writer(&mut self, make: impl FnOnce() -> ObjectWriter) -> Joined {
        Joined { writer: self.writer.take().unwrap_or_else(make), count: self.joined }
    }
}

impl Parts {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Parts(Mutex::new(Some(State::default()))))
    }

    /// Takes the writer with the parts before this one, and those parts that must be added to it
    /// first. `None`, at once, if a part before it has not arrived, or if another caller writes.
    pub(crate) fn take_turn(
        &self,
        part: usize,
        make: impl FnOnce() -> ObjectWriter,
    ) -> Option<(Joined, Vec<VMemHandle>)> {
        let mut state = self.0.lock();
        let state = state.as_mut()?;
        let before = state.take_up_to(part).ok()?;
        Some((state.take_writer(make), before))
    }

    /// # Errors
    ///
    /// `NoUpload`.
    pub(crate) fn give_back(&self, joined: Joined) -> Result<(), RequestError> {
        let mut state = self.0.lock();
        let state = state.as_mut().ok_or(RequestError::NoUpload)?;
        (state.writer, state.joined) = (Some(joined.writer), joined.count);
        Ok(())
    }

    /// Adds a part that arrived out of turn. A previous part of this number is given up.
    ///
    /// # Errors
    ///
    /// `NoUpload`.
    pub(crate) fn add(&self, part: usize, handle: VMemHandle) -> Result<(), RequestError> {
        let before = match &mut *self.0.lock() {
            Some(state) => state.arrived.insert(part, handle),
            None => return Err(RequestError::NoUpload),
        };
        drop(before);
        Ok(())
    }

    /// The first `count` parts, of which none was joined.
    ///
    /// # Errors
    ///
    /// `NoUpload`, `PartMissing`.
    pub(crate) fn arrived(&self, count: usize) -> Result<Vec<VMemHandle>, RequestError> {
        let state = self.0.lock();
        let arrived = &state.as_ref().ok_or(RequestError::NoUpload)?.arrived;
        let part = |part| arrived.get(&part).cloned().ok_or(RequestError::PartMissing { part });
        (0..count).map(part).collect()
    }

    /// Ends the upload: what has the first of `count` parts, and the others.
    ///
    /// # Errors
    ///
    /// `NoUpload`; `PartMissing`, after which it goes on.
    pub(crate) fn finish(
        &self,
        count: usize,
        make: impl FnOnce() -> ObjectWriter,
    ) -> Result<(Joined, Vec<VMemHandle>), RequestError> {
        let mut ended = self.0.lock();
        let state = ended.as_mut().ok_or(RequestError::NoUpload)?;
        let rest = state.take_up_to(count)?;
        let joined = state.take_writer(make);
        *ended = None;
        Ok((joined, rest))
    }

    /// Parts that are still being uploaded are given up when they arrive.
    pub(crate) fn end(&self) {
        let ended = self.0.lock().take();
        drop(ended);
    }
}
