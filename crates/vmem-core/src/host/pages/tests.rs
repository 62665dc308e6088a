//! The pages of host memory: they are given back in time, and requests hear of it.

use std::io;
use std::sync::Barrier;

use super::*;

/// A device that blocks two unregistrations, once a test asks for it.
#[derive(Debug)]
struct Slow {
    stands: AtomicBool,
    barrier: Barrier,
}

impl Registrar for Slow {
    fn register(&self, _address: usize, _len: usize) -> io::Result<()> {
        Ok(())
    }

    fn unregister(&self, _address: usize, _len: usize) -> io::Result<()> {
        if self.stands.swap(false, Ordering::SeqCst) {
            self.barrier.wait();
            self.barrier.wait();
        }
        Ok(())
    }
}

/// A request that finds no space, because a slab is being unregistered for another one, is woken
/// when that has ended.
#[test]
fn request_is_woken_after_a_slab_changed() {
    let pages = Pages::new(64).unwrap();
    let device = Arc::new(Slow { stands: AtomicBool::new(false), barrier: Barrier::new(2) });
    pages.serve(device.clone());
    let all = pages.take(64).unwrap();
    let bytes = all.start as usize * PAGE_BYTES..all.end as usize * PAGE_BYTES;
    let entered = pages.enter(bytes);
    assert!(entered.iter().all(|(_, _, direct)| *direct), "all slabs are registered");
    entered.into_iter().filter_map(|(_, slab, _)| slab).for_each(|slab| {
        pages.leave(&[slab]);
    });
    // Free, and not in one run.
    pages.put(0..1);
    pages.put(2..3);
    device.stands.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| pages.take(2));
        device.barrier.wait();
        // Two more pages of the slab that is being unregistered.
        pages.put(1..2);
        pages.put(3..4);
        assert_eq!(pages.take(2), None, "the pages cannot be given back yet");
        assert!(!pages.has_settled());
        device.barrier.wait();
        assert!(first.join().unwrap().is_some());
    });
    assert!(pages.has_settled(), "the refused request is to look again");
    assert!(pages.take(2).is_some(), "and finds space");
}

/// The time to give back many small runs does not grow with the square of their number.
#[test]
fn scattered_pages_are_given_back_in_time() {
    let once = |count: u64| {
        let pages = Pages::new(2 * count).unwrap();
        assert!(pages.take(2 * count).is_some());
        {
            let mut state = pages.state.lock();
            state.live -= count;
            (0..count).for_each(|at| state.kept.add(2 * at..2 * at + 1));
        }
        let begun = std::time::Instant::now();
        assert!(pages.take(count).is_some());
        begun.elapsed().as_secs_f64()
    };
    // The least of several times, for other work on the machine only adds. With eight times as many
    // runs a square would take 64 times as long, however often it is tried.
    let mut few = f64::MAX;
    let mut many = f64::MAX;
    for _ in 0..32 {
        (few, many) = (few.min(once(4_000)), many.min(once(32_000)));
        if many < few * 32.0 {
            return;
        }
    }
    panic!("{few} s for 4,000, {many} s for 32,000");
}
