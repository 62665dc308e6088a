//! Temporary.
#![allow(missing_docs, missing_debug_implementations)]
use std::io;
use std::sync::Arc;
use std::sync::atomic::*;
pub(crate) struct HostArena {
    cap: u64,
    used: AtomicU64,
    peak: AtomicU64,
    hook: std::sync::OnceLock<Box<dyn Fn() + Send + Sync>>,
}
#[derive(Debug, Clone, Copy)]
pub(crate) struct NoRoom {
    pub(crate) scattered: bool,
}
impl NoRoom {
    pub(crate) fn new(_f: u64, _g: u64) -> Self {
        NoRoom { scattered: false }
    }
}
pub(crate) struct HostSlot {
    a: Arc<HostArena>,
    v: Vec<u8>,
}
impl HostArena {
    pub(crate) fn new(cap: u64) -> io::Result<Arc<Self>> {
        Ok(Arc::new(HostArena { cap, used: 0.into(), peak: 0.into(), hook: Default::default() }))
    }
    pub(crate) fn footprint(len: usize) -> u64 {
        let l = len as u64;
        if len <= 4096 { l.div_ceil(64) * 64 } else { l.div_ceil(4096).saturating_mul(4096) }
    }
    pub(crate) fn try_alloc(self: &Arc<Self>, len: usize, _o: u64) -> Result<HostSlot, NoRoom> {
        let f = Self::footprint(len);
        self.used
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |u| {
                (u + f <= self.cap).then_some(u + f)
            })
            .map_err(|_| NoRoom { scattered: false })?;
        self.peak.fetch_max(self.used.load(Ordering::SeqCst), Ordering::SeqCst);
        Ok(HostSlot { a: self.clone(), v: vec![0xAA; len] })
    }
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::SeqCst)
    }
    pub(crate) fn peak_bytes(&self) -> u64 {
        self.peak.load(Ordering::SeqCst)
    }
    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.cap
    }
    pub(crate) fn largest_free_bytes(&self) -> u64 {
        self.cap - self.used_bytes()
    }
    pub(crate) fn set_freed_hook(&self, f: Box<dyn Fn() + Send + Sync>) {
        let _ = self.hook.set(f);
    }
    pub(crate) fn want(&self, _b: bool) {}
    pub(crate) fn sparsest_span(&self, _s: &dyn Fn(u64) -> bool) -> Option<Vec<u64>> {
        None
    }
}
impl HostSlot {
    pub(crate) fn footprint(&self) -> u64 {
        HostArena::footprint(self.v.len())
    }
    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.v
    }
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.v
    }
}
impl Drop for HostSlot {
    fn drop(&mut self) {
        self.a.used.fetch_sub(self.footprint(), Ordering::SeqCst);
        if let Some(h) = self.a.hook.get() {
            h()
        }
    }
}
pub(crate) struct StagingPool {
    n: usize,
    s: Arc<tokio::sync::Semaphore>,
    p: usize,
}
pub(crate) struct StagingPiece {
    v: Vec<u8>,
    _p: tokio::sync::OwnedSemaphorePermit,
}
impl StagingPool {
    pub(crate) fn new(t: u64) -> io::Result<Arc<Self>> {
        let p = (t / 2).min(1 << 20) / 65536 * 65536;
        let n = (t / p) as usize;
        Ok(Arc::new(StagingPool { n, s: Arc::new(tokio::sync::Semaphore::new(n)), p: p as usize }))
    }
    pub(crate) async fn acquire(&self) -> StagingPiece {
        let _ = self.n;
        StagingPiece { _p: self.s.clone().acquire_owned().await.unwrap(), v: vec![0; self.p] }
    }
    pub(crate) fn piece_bytes(&self) -> usize {
        self.p
    }
}
impl StagingPiece {
    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.v
    }
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.v
    }
}
