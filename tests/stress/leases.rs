//! Leases at random on either device, in which the driver copies what kernels would read and write.
//!
//! Invariant: a lease is on the device of its stream and finds one of the versions that a reader
//! may see there; what it writes counts as a write of the task whose object it is. Called by the
//! workers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rand::Rng;
use vmem::gpu::cudarc::driver::{CudaStream, result};
use vmem::gpu::{DeviceLease, DeviceLeaseMut, VramExt};

use crate::DEVICES;
use crate::object::Object;
use crate::worker::{Worker, maybe_dropped};

/// The bytes at this address; the call waits for all that the stream has.
fn copied(address: u64, len: usize, stream: &CudaStream) -> Vec<u8> {
    let mut bytes = vec![0xEE; len];
    stream.context().bind_to_thread().unwrap();
    // SAFETY: a lease of that length has the address, and its stream is this one; the memory of
    // the vector is pageable, so the call waits.
    unsafe { result::memcpy_dtoh_async(&mut bytes, address, stream.cu_stream()) }.unwrap();
    bytes
}

/// What a lease finds, which began when `from` was complete.
fn check(lease: &DeviceLease, object: &Object, from: u64) {
    // SAFETY: read by the copy alone, which has ended when the call returns.
    let read = copied(unsafe { lease.device_ptr() }, lease.len(), lease.stream());
    object.check(from, 0..lease.len(), &read);
}

/// Writes all of an object.
fn write(lease: &DeviceLeaseMut, bytes: &[u8]) {
    let stream = lease.stream();
    stream.context().bind_to_thread().unwrap();
    // SAFETY: written by the copy below, on the stream of the lease, before that ends.
    let address = unsafe { lease.device_ptr() };
    // SAFETY: the object is as long as the bytes, which are pageable, so the call has read them
    // when it returns; the stream is that of the lease.
    unsafe { result::memcpy_htod_async(address, bytes, stream.cu_stream()) }.unwrap();
}

impl Worker {
    pub(crate) async fn lease(&mut self) {
        let device = self.rng.random_range(0..DEVICES);
        let stream = self.streams[device].clone();
        match self.rng.random_range(0..5) {
            0..=2 => self.lease_to_read(device, &stream).await,
            3 => self.lease_to_write(&stream).await,
            _ => self.lease_both(&stream).await,
        }
    }

    async fn lease_to_read(&mut self, device: usize, stream: &Arc<CudaStream>) {
        let object = self.any();
        let from = object.completed.load(Ordering::SeqCst);
        let settled = object.settled();
        let drop_after = self.drop_after();
        let asked = self.vmem.device_on(&object.handle, stream);
        let Some(lease) = Self::expect("device_on", maybe_dropped(drop_after, asked).await) else {
            return;
        };
        let residency = self.vmem.residency(&object.handle).expect("alive");
        // A version that came since is elsewhere.
        if settled.is_some() && settled == object.settled() {
            assert!(residency.is_in(self.tiers[device]), "of device {device}: {residency:?}");
        }
        check(&lease, &object, from);
        if self.rng.random_bool(0.1) {
            // Held for a while beside writers.
            tokio::task::yield_now().await;
            check(&lease, &object, from);
        }
        self.leases[device].fetch_add(1, Ordering::Relaxed);
    }

    async fn lease_to_write(&mut self, stream: &Arc<CudaStream>) {
        let at = self.rng.random_range(0..self.mine.len());
        let object = self.mine[at].clone();
        let from = object.completed.load(Ordering::SeqCst);
        let version = object.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let overwrites = self.rng.random_bool(0.3);
        let drop_after = self.drop_after();
        let lease = if overwrites {
            let asked = self.vmem.device_overwrite_on(&object.handle, stream);
            maybe_dropped(drop_after, asked).await
        } else {
            let asked = self.vmem.device_mut_on(&object.handle, stream);
            maybe_dropped(drop_after, asked).await
        };
        let Some(lease) = Self::expect("device_mut_on", lease) else { return };
        if self.rng.random_bool(0.1) {
            // Nobody has used it: the version before stays.
            return;
        }
        // SAFETY: read by the copy alone, which has ended when the call returns.
        let before = copied(unsafe { lease.device_ptr() }, lease.len(), stream);
        if overwrites {
            assert!(before.iter().all(|&byte| byte == 0), "starts as zeros");
        } else {
            object.check(from, 0..before.len(), &before);
        }
        write(&lease, &object.bytes(version));
        let drop_after = self.drop_after();
        let ended = maybe_dropped(drop_after, lease.finish()).await;
        if Self::expect("finish", ended).is_some() {
            object.completed.store(version, Ordering::SeqCst);
        }
    }

    /// A set that reads one object and changes another.
    async fn lease_both(&mut self, stream: &Arc<CudaStream>) {
        let at = self.rng.random_range(0..self.mine.len());
        let changed = self.mine[at].clone();
        let read = self.any();
        if Arc::ptr_eq(&read, &changed) {
            return;
        }
        let from = read.completed.load(Ordering::SeqCst);
        let version = changed.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let drop_after = self.drop_after();
        let set = self.vmem.device_set(stream).read(&read.handle).write(&changed.handle);
        let set = maybe_dropped(drop_after, set.acquire()).await;
        let Some(set) = Self::expect("device_set", set) else { return };
        check(&set.read[0], &read, from);
        write(&set.write[0], &changed.bytes(version));
        let drop_after = self.drop_after();
        let ended = maybe_dropped(drop_after, set.finish()).await;
        if Self::expect("finish of a set", ended).is_some() {
            changed.completed.store(version, Ordering::SeqCst);
        }
    }
}
