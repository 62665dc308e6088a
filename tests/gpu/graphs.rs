//! Kernels of a graph that was captured over leases.
//!
//! Excluded: an object that moves, or leaves the device, while a graph that has its address may be
//! launched; a launch that is not ordered before the end of its lease; and a version that others
//! see before that. Noticed by bytes, by memory that is gone, and by races that the driver finds.

use std::sync::Arc;

use vmem::gpu::VramExt;
use vmem::gpu::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use vmem::gpu::cudarc::driver::{CudaGraph, CudaStream};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{DISK, HOST, LEN, VRAM, bytes, end, launch, open, plus, stream, until};

/// A graph of what `work` queues.
fn captured(stream: &Arc<CudaStream>, work: impl FnOnce()) -> CudaGraph {
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    work();
    stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap()
}

/// While others fill the device, and write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn graphs_read_and_change_what_is_leased_at_each_launch() {
    const ROUNDS: u8 = 5;
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 * LEN as u64).await;
    let stream = stream();
    let weights = vmem.put(bytes(1), HOST).await.unwrap();
    let state = vmem.put(bytes(2), HOST).await.unwrap();
    let mut others = Vec::new();
    for seed in 10..20 {
        others.push(vmem.put(bytes(seed), HOST).await.unwrap());
    }
    let leases = vmem.device_set(&stream).read(&weights).write(&state).acquire().await.unwrap();
    // SAFETY: used by the graph, which is launched on the stream of the leases while they live.
    let from = unsafe { leases.read[0].device_ptr() };
    // SAFETY: as above.
    let to = unsafe { leases.write[0].device_ptr() };
    let half = LEN as u64 / 2;
    let graph = captured(&stream, || {
        launch("vmem_slow_copy", to, from, half, &stream);
        launch("vmem_add", to + half, LEN as u64 - half, 3, &stream);
    });
    for round in 0..ROUNDS {
        graph.launch().unwrap();
        for other in &others {
            vmem.promote(other, VRAM).await.unwrap();
        }
        vmem.write(&others[0], bytes(30 + round)).await.unwrap();
        vmem.demote(&weights, DISK).await.unwrap_err();
        assert!(vmem.read(&weights).await.unwrap() == bytes(1));
    }
    assert!(vmem.stats().evictions > 0, "others left the device");
    drop(leases);
    let mut expected = bytes(1);
    expected[LEN / 2..].copy_from_slice(&plus(&bytes(2), 3 * ROUNDS)[LEN / 2..]);
    assert!(vmem.read(&state).await.unwrap() == expected);
    drop(graph);
    others.extend([weights, state]);
    end(vmem, others, &emulator).await;
}

/// The launches stand still, and the leases are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn launches_are_ordered_before_the_end_of_their_leases() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 * LEN as u64).await;
    let stream = stream();
    let state = vmem.put(bytes(4), HOST).await.unwrap();
    let other = vmem.put(bytes(5), HOST).await.unwrap();
    let lease = vmem.device_mut_on(&state, &stream).await.unwrap();
    // SAFETY: used by the graph, which is launched on the stream of the lease while it lives.
    let at = unsafe { lease.device_ptr() };
    let graph = captured(&stream, || launch("vmem_add", at, LEN as u64, 1, &stream));
    emulator.hold(Kind::Kernel);
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    drop(lease);
    let reading = tokio::spawn({
        let vmem = vmem.clone();
        let state = state.clone();
        async move { vmem.read(&state).await }
    });
    vmem.promote(&other, VRAM).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    assert!(!reading.is_finished(), "its version is not there yet");
    emulator.release_all();
    assert!(reading.await.unwrap().unwrap() == plus(&bytes(4), 3));
    drop(graph);
    until("the end of the launches", || emulator.counter("in_flight") == 0).await;
    end(vmem, vec![state, other], &emulator).await;
}
