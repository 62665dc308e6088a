//! Gathers and scatters at random, between objects in any tier and a buffer on either device.
//!
//! Invariant: each piece of a gather is of one of the versions that a reader may see there; a
//! scatter counts as a write of each object, whole, of the task whose objects they are. Called by
//! the workers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rand::Rng;
use vmem::gpu::cudarc::driver::{CudaSlice, CudaStream};
use vmem::gpu::{DeviceTarget, VramExt};

use crate::DEVICES;
use crate::object::Object;
use crate::worker::{Worker, maybe_dropped, random_range};

/// Pieces of a call.
const PIECES_MAX: usize = 6;
/// A longer object is not written in one step, in bytes.
const STEP_MAX: usize = 1 << 20;

impl Worker {
    /// A stream of mine.
    fn stream(&mut self) -> Arc<CudaStream> {
        self.streams[self.rng.random_range(0..DEVICES)].clone()
    }

    pub(crate) async fn gather(&mut self) {
        let stream = self.stream();
        let mut chosen = Vec::new();
        let mut len = 0;
        for _ in 0..self.rng.random_range(1..=PIECES_MAX) {
            let object = self.any();
            let range = random_range(&mut self.rng, object.handle.len());
            let from = object.completed.load(Ordering::SeqCst);
            chosen.push((object, range.clone(), from, len));
            len += range.len() + self.rng.random_range(0..40);
        }
        let mut buffer: CudaSlice<u8> = stream.alloc_zeros(len + 1).unwrap();
        let pieces: Vec<_> = chosen
            .iter()
            .map(|(object, range, _, at)| (&object.handle, range.clone(), *at))
            .collect();
        let drop_after = self.drop_after();
        let gathered = {
            let target = DeviceTarget::from_slice(&mut buffer);
            maybe_dropped(drop_after, self.vmem.gather(&pieces, &target)).await
        };
        drop(pieces);
        // A buffer of a call that was dropped is freed behind its copies.
        if Self::expect("gather", gathered).is_none() {
            return;
        }
        let got = stream.clone_dtoh(&buffer).unwrap();
        for (object, range, from, at) in chosen {
            object.check(from, range.clone(), &got[at..at + range.len()]);
            self.pieces[0].fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) async fn scatter(&mut self) {
        let stream = self.stream();
        let mut chosen: Vec<(Arc<Object>, u64, usize)> = Vec::new();
        let mut bytes = Vec::new();
        for _ in 0..self.rng.random_range(1..=PIECES_MAX) {
            let object = self.mine[self.rng.random_range(0..self.mine.len())].clone();
            let is_new = chosen.iter().all(|(other, ..)| !Arc::ptr_eq(other, &object));
            if !is_new || object.handle.len() > STEP_MAX {
                continue;
            }
            let version = object.begun.fetch_add(1, Ordering::SeqCst) + 1;
            let at = bytes.len();
            bytes.extend_from_slice(&object.bytes(version));
            chosen.push((object, version, at));
        }
        if chosen.is_empty() {
            return;
        }
        let mut buffer = stream.clone_htod(&bytes).unwrap();
        let pieces: Vec<_> = chosen
            .iter()
            .map(|(object, _, at)| (*at, &object.handle, 0..object.handle.len()))
            .collect();
        let drop_after = self.drop_after();
        let scattered = {
            let target = DeviceTarget::from_slice(&mut buffer);
            maybe_dropped(drop_after, self.vmem.scatter(&target, &pieces)).await
        };
        drop(pieces);
        if Self::expect("scatter", scattered).is_none() {
            return;
        }
        for (object, version, _) in chosen {
            object.completed.store(version, Ordering::SeqCst);
            self.pieces[1].fetch_add(1, Ordering::Relaxed);
        }
    }
}
