//! What a read of a resident object costs: nothing but a count.
//!
//! Excluded: a hit that copies, waits, switches tasks, or allocates with the size of the object;
//! each was the whole cost of a cache hit in a system like this one. Noticed by polling by hand, by
//! the addresses of the bytes, and by an allocator that counts, for each thread.

#![allow(missing_docs, unsafe_code, clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use vmem::backend::Backends;
use vmem::{Capabilities, MemoryTier, ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryConfig};
use vmem_io::DiskTier;
use vmem_testkit::{Pattern, SimConfig, SimDriver};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

thread_local! {
    /// Allocations of this thread, and their bytes.
    static ALLOCATED: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

struct Counting;

fn count(size: usize) {
    // A thread that ends allocates after its locals are gone; that does not count.
    let _ = ALLOCATED.try_with(|allocated| {
        let (times, bytes) = allocated.get();
        allocated.set((times + 1, bytes + size as u64));
    });
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is handed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The output of a future that is ready at its first poll, and what that poll allocated.
fn first_poll<F: Future>(what: &str, future: F) -> (F::Output, (u64, u64)) {
    let before = ALLOCATED.get();
    let mut future = pin!(future);
    let polled = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    let after = ALLOCATED.get();
    let Poll::Ready(output) = polled else { panic!("{what} is not ready at its first poll") };
    (output, (after.0 - before.0, after.1 - before.1))
}

const LENS: [usize; 5] = [1, 4 * KIB, 64 * KIB, MIB, 8 * MIB];
/// More than the bookkeeping of one `Bytes` needs, less than any object worth reading.
const SMALL_BYTES: u64 = 128;

fn bytes(len: usize) -> Bytes {
    Pattern::new(3, 1).bytes(0, len)
}

/// A store over a simulated disk, and an object in its host memory.
async fn resident(len: usize) -> (VirtualMemory, VMemHandle) {
    let host = 32 * MIB as u64;
    let config = VirtualMemoryConfig::builder().host_capacity(host);
    let config = config.staging_capacity(128 << 10).build().unwrap();
    let backends = Backends {
        remote: None,
        host_capacity_bytes: host,
        disk: DiskTier::new(SimDriver::new(SimConfig::default()), 64 * MIB as u64),
        catalog: None,
        devices: Vec::new(),
        capabilities: Capabilities::new("simulated".into(), "not in this test".into()),
    };
    let vmem = VirtualMemory::with_backends(&config, backends).unwrap();
    let object = vmem.put(bytes(len), MemoryTier::Host).await.unwrap();
    (vmem, object)
}

#[tokio::test]
async fn a_hit_is_ready_at_its_first_poll_and_copies_nothing() {
    for len in LENS {
        let (vmem, object) = resident(len).await;
        let (first, _) = first_poll("read", vmem.read(&object));
        let (second, _) = first_poll("read", vmem.read(&object));
        let first = first.unwrap();
        let second = second.unwrap();
        assert_eq!(first.as_ptr(), second.as_ptr(), "the same memory for both");
        assert!(first == bytes(len) && second.len() == len);
        let (part, _) = first_poll("read_at", vmem.read_at(&object, len / 2..len));
        assert_eq!(part.unwrap().as_ptr(), first[len / 2..].as_ptr(), "a part is in place");
        let (with, _) = first_poll("read_with", vmem.read_with(&object, ReadOptions::new()));
        assert_eq!(with.unwrap().as_ptr(), first.as_ptr());
        let set = vec![object.clone(); 3];
        let (many, _) = first_poll("read_many", vmem.read_many(&set));
        assert!(many.unwrap().iter().all(|one| one.as_ptr() == first.as_ptr()));
        assert_eq!(vmem.stats().misses, 0);
    }
}

#[tokio::test]
async fn a_hit_makes_one_small_allocation_at_most() {
    for len in LENS {
        let (vmem, object) = resident(len).await;
        let mut most = (0, 0);
        for _ in 0..100 {
            // Within a test's task the budget for cooperation runs out after some reads.
            tokio::task::yield_now().await;
            let (read, allocated) = first_poll("read", vmem.read(&object));
            most = (most.0.max(allocated.0), most.1.max(allocated.1));
            assert_eq!(read.unwrap().len(), len);
            let (part, allocated) = first_poll("read_at", vmem.read_at(&object, 0..len / 2));
            most = (most.0.max(allocated.0), most.1.max(allocated.1));
            assert_eq!(part.unwrap().len(), len / 2);
        }
        println!("{len} bytes: at most {} allocations of {} bytes", most.0, most.1);
        assert!(most.0 <= 1 && most.1 <= SMALL_BYTES, "{len} bytes: {most:?}");
    }
}

/// The counter counts: else the test above proves nothing.
#[tokio::test]
async fn a_miss_allocates_and_waits() {
    let (vmem, object) = resident(64 * KIB).await;
    vmem.demote(&object, MemoryTier::Disk).await.unwrap();
    let before = ALLOCATED.get();
    let mut read = Box::pin(vmem.read(&object));
    assert!(read.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    assert!(ALLOCATED.get().0 > before.0);
    assert!(read.await.unwrap() == bytes(64 * KIB));
}

/// Reads beside each other, from threads of their own: still no more than one allocation each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hits_from_several_threads_cost_no_more() {
    let (vmem, object) = resident(4 * KIB).await;
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let vmem = vmem.clone();
            let object = object.clone();
            std::thread::spawn(move || {
                let before = ALLOCATED.get().0;
                for _ in 0..10_000 {
                    drop(first_poll("read", vmem.read(&object)).0.unwrap());
                }
                ALLOCATED.get().0 - before
            })
        })
        .collect();
    for reader in readers {
        let allocated = reader.join().unwrap();
        assert!(allocated <= 10_000 + 16, "{allocated} allocations for 10000 reads");
    }
}
