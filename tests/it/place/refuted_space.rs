//! Ways in which requests for space, for the gate and for pins once got in each other's way.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use vmem::{ReadOptions, VirtualMemory, VirtualMemoryError};

use crate::support::{self, DISK, HOST, KIB, bytes, open, put_all};

async fn until_waiters(vmem: &VirtualMemory, count: u64) {
    while vmem.stats().waiters != count {
        sleep(Duration::from_millis(1)).await;
    }
}

/// A promotion that has space and waits for the gate, and a write that has the gate and waits for
/// space, once kept each other waiting until one of them timed out.
#[tokio::test(start_paused = true)]
async fn space_is_not_kept_while_waiting_for_the_gate() {
    let len = 256 * KIB;
    let (vmem, _driver) = open(len, 4 * len, |config| config);
    let object = vmem.put(bytes(1, 1, len), DISK).await.unwrap();
    let filler = vmem.put(bytes(2, 1, len), HOST).await.unwrap();
    let held = vmem.read(&filler).await.unwrap();
    let promote = tokio::spawn({
        let vmem = vmem.clone();
        let object = object.clone();
        async move { vmem.promote(&object, HOST).await }
    });
    until_waiters(&vmem, 1).await;
    let write = tokio::spawn({
        let vmem = vmem.clone();
        let object = object.clone();
        async move { vmem.write_with(&object, |bytes| bytes.fill(7)).await }
    });
    until_waiters(&vmem, 2).await;
    drop(held);
    let promote = promote.await.unwrap();
    let write = write.await.unwrap();
    assert!(promote.is_ok() && write.is_ok(), "{promote:?}, {write:?}");
    assert!(vmem.read(&object).await.unwrap().iter().all(|&byte| byte == 7));
}

/// The copy that keeps space from its own next version can be demoted first.
#[tokio::test(start_paused = true)]
async fn write_with_of_an_object_larger_than_half_of_host_memory() {
    let (vmem, _driver) = open(256 * KIB, 1024 * KIB, |config| config);
    let object = vmem.put(bytes(1, 1, 192 * KIB), HOST).await.unwrap();
    vmem.promote(&object, HOST).await.unwrap();
    vmem.write_with(&object, |bytes| bytes.fill(7)).await.unwrap();
    assert!(vmem.read(&object).await.unwrap().iter().all(|&byte| byte == 7));
}

/// The last pin may go while the next one is being taken: there is a charge exactly while there are
/// pins.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn pins_that_come_and_go_are_charged() {
    let (vmem, _driver) = open(1024 * KIB, 1024 * KIB, |config| config);
    let object = vmem.put(bytes(1, 1, 4 * KIB), HOST).await.unwrap();
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let vmem = vmem.clone();
            let object = object.clone();
            tokio::spawn(async move {
                for _ in 0..5_000 {
                    let pin = vmem.pin(&object, HOST).await.unwrap();
                    assert!(vmem.stats().pinned_bytes <= 4 * KIB as u64 * 4);
                    drop(pin);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(vmem.stats().pinned_bytes, 0);
}

/// A caller that guesses the number of an object that is still being allocated neither breaks the
/// allocation nor loses what it wrote.
#[tokio::test(start_paused = true)]
async fn an_object_is_not_found_before_it_has_space() {
    let len = 64 * KIB;
    let (vmem, _driver) = open(4 * len, 64 * len, |config| config);
    let handles = put_all(&vmem, 4, len, HOST).await;
    let mut held = Vec::new();
    for handle in &handles {
        held.push(vmem.read(handle).await.unwrap());
    }
    let next = handles.iter().map(vmem::VMemHandle::id).max().unwrap() + 1;
    let mut allocating = Box::pin(vmem.allocate(len, HOST));
    assert!(futures::poll!(&mut allocating).is_pending(), "host memory is full");
    let data = bytes(9, 1, len);
    let early = vmem.handle(next);
    if let Some(early) = &early {
        vmem.write(early, &data).await.unwrap();
    }
    let handle = allocating.await.unwrap();
    assert_eq!(handle.id(), next);
    let expected = if early.is_some() { data } else { vec![0; len] };
    let mut buf = vec![1; len];
    vmem.read_into(&handle, 0..len, &mut buf).await.unwrap();
    assert!(buf == expected, "what was written before is gone");
}

/// The deadline of the first reader is not that of the readers that joined it.
#[tokio::test(start_paused = true)]
async fn a_reader_does_not_inherit_the_deadline_of_another() {
    let len = 64 * KIB;
    let (vmem, _driver) = open(4 * len, 64 * len, |config| config);
    let cold = vmem.put(bytes(1, 1, len), DISK).await.unwrap();
    let mut held = Vec::new();
    for handle in put_all(&vmem, 4, len, HOST).await {
        held.push(vmem.read(&handle).await.unwrap());
    }
    let read = |options: ReadOptions| {
        let vmem = vmem.clone();
        let cold = cold.clone();
        tokio::spawn(async move { vmem.read_with(&cold, options).await })
    };
    let hasty = read(ReadOptions::new().timeout(Duration::from_millis(50)));
    until_waiters(&vmem, 1).await;
    let patient = read(ReadOptions::new());
    let hasty = hasty.await.unwrap();
    assert!(matches!(hasty, Err(VirtualMemoryError::AllPinned { .. })), "{hasty:?}");
    sleep(Duration::from_secs(1)).await;
    drop(held);
    let patient = patient.await.unwrap().expect("space came long before the deadline");
    assert!(patient == bytes(1, 1, len));
}

/// A pin that waits for another one to go is refused when the store is closed.
#[tokio::test(start_paused = true)]
async fn closing_refuses_a_pin_that_waits() {
    let len = 128 * KIB;
    let (vmem, _driver) = open(256 * KIB, 1024 * KIB, |config| config);
    let handles = put_all(&vmem, 2, len, HOST).await;
    let first = vmem.pin(&handles[0], HOST).await.unwrap();
    let second = tokio::spawn({
        let vmem = vmem.clone();
        let handle = handles[1].clone();
        async move { vmem.pin(&handle, HOST).await }
    });
    sleep(Duration::from_millis(10)).await;
    vmem.close().await.unwrap();
    let second = timeout(Duration::from_secs(1), second).await.expect("refused at once");
    assert!(matches!(second.unwrap(), Err(VirtualMemoryError::Closed)));
    drop(first);
}

/// One write that fails concerns its object alone.
#[tokio::test(start_paused = true)]
async fn one_failed_eviction_does_not_fail_a_read_of_another_object() {
    let len = 64 * KIB;
    let (vmem, driver) = open(4 * len, 64 * len, |config| config);
    let cold = vmem.put(bytes(9, 1, len), DISK).await.unwrap();
    let mut fails = 1;
    driver.fail(move |op, _| {
        let fail = op == support::Op::Write && fails > 0;
        fails -= i32::from(fail);
        fail.then(|| std::io::Error::from_raw_os_error(5))
    });
    let hot = put_all(&vmem, 4, len, HOST).await;
    let read = vmem.read(&cold).await.expect("there is space for it below");
    assert!(read == bytes(9, 1, len));
    drop(hot);
}
