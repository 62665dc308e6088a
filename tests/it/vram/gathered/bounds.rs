//! What promotions that gathers ask for take from others: no place in a line, and no long look.
//!
//! Excluded: one that waits behind callers, and one that asks every object of a device. Noticed by
//! waiters and residency.

use futures::FutureExt;
use vmem::{Promotion, VMemHandle, VirtualMemoryConfigBuilder, WriteBack};

use super::{HANGS, LEN, Store, VRAM};
use crate::support::{self, HOST, bytes, settle};

/// Such a promotion stands in no line, also where what the callers wait for is on its way.
#[tokio::test]
async fn gathered_object_does_without_while_others_wait() {
    let promotes = |builder: VirtualMemoryConfigBuilder| {
        builder
            .gather_promotion(Promotion::OnNthGather(1))
            .max_pinned(1.0)
            .write_back(WriteBack::OnEvict)
            .wait_timeout(HANGS)
    };
    let store = Store::open_with(&[LEN], promotes);
    let handles = store.put(3).await;
    // What is on the device makes way for a caller, once it is written back.
    let access = store.access(0);
    let change = access.change(&handles[0], false).await.unwrap();
    let range = change.range().unwrap();
    access.backend().upload(range, 0, bytes(0, 1, LEN).into()).await.unwrap();
    change.finish(std::future::ready(Ok(())).boxed(), None).await.unwrap();
    store.devices[0].hold();
    let mut demand = Box::pin(store.vmem.promote(&handles[1], VRAM));
    assert!((&mut demand).now_or_never().is_none());
    support::eventually("the copy", || store.devices[0].in_flight() > 0).await;
    store.gather_beside_a_waiter(&handles[2]).await;
    store.devices[0].release_all();
    demand.await.unwrap();
    settle(&store.vmem, &store.driver).await;
    assert!(store.is_on(&handles[1]) && !store.is_on(&handles[2]));
    store.close(handles).await;
}

/// A look passes over what was used since the first gather, and ends before it has found the only
/// object that could go.
#[tokio::test]
async fn looks_for_gathered_objects_are_bounded() {
    const SMALL: usize = 512;
    const PASSED: usize = 1500;
    let store = Store::open(&[(PASSED + 1) * SMALL]);
    let mut handles = Vec::new();
    for object in 0..PASSED as u64 + 2 {
        handles.push(store.vmem.put(bytes(object, 1, SMALL), HOST).await.unwrap());
    }
    let promote_all = async |handles: &[VMemHandle]| {
        for handle in handles {
            store.vmem.promote(handle, VRAM).await.unwrap();
        }
    };
    let unused = &handles[PASSED];
    let gathered = &handles[PASSED + 1];
    promote_all(&handles[..=PASSED]).await;
    store.gather_bytes(0, gathered, SMALL).await;
    promote_all(&handles[..PASSED]).await;
    store.gather_bytes(0, gathered, SMALL).await;
    assert!(!store.is_on(gathered) && store.is_on(unused));
    // With fewer in the way it is found.
    for handle in &handles[..PASSED / 2] {
        store.vmem.demote(handle, HOST).await.unwrap();
    }
    let filled = store.vmem.put(vec![0; PASSED / 2 * SMALL], HOST).await.unwrap();
    store.vmem.promote(&filled, VRAM).await.unwrap();
    store.gather_bytes(0, gathered, SMALL).await;
    promote_all(&handles[PASSED / 2..PASSED]).await;
    store.gather_bytes(0, gathered, SMALL).await;
    assert!(store.is_on(gathered) && !store.is_on(unused));
    drop((filled, handles));
    store.close(Vec::new()).await;
}
