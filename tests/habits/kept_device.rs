//! Scenario 35 above the emulated CUDA driver: promotions, pins, leases, sets, gathers and scatters
//! that are polled once and left alone.
//!
//! Excluded: device memory, a turn, a lane or a lease held by a future that is not polled. Noticed
//! as in the table of the other calls. The emulator has seen no rule broken.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, join_all};
use vmem::gpu::cudarc::driver::{CudaContext, CudaStream};
use vmem::gpu::{DeviceLease, DeviceLeaseMut, DeviceSet, DeviceTarget, VramExt};
use vmem::{PinGuard, VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::harness::{
    BOUND, CLOSE_BOUND, THREADS, WAIT, assert_none, is_deadline, run, succeeds, within,
};
use crate::keep::Kept;
use crate::stores::{DISK, HOST, KIB, MIB, Sizes, VRAM, bytes, check, cold, on_a_device};

const SIZES: Sizes = Sizes { space: 4 * MIB, disk: 64 * MIB };
/// A third of what the kept calls are about.
const VRAM_BYTES: u64 = 2 << 20;
const LEN: usize = 90 * KIB;
const KEPT: usize = 64;
const BESIDE: usize = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Promote,
    Prefetch,
    Pin,
    Put,
    Lease,
    LeaseMut,
    Overwrite,
    Set,
    Gather,
    Scatter,
    Demote,
    Finish,
}

/// What a call brought; it is held until it is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "held until it is dropped")]
enum Got {
    Nothing,
    Object(VMemHandle),
    Pin(PinGuard),
    Lease(DeviceLease),
    LeaseMut(DeviceLeaseMut),
    Set(DeviceSet),
}

type Outcome = Result<Got, VirtualMemoryError>;

#[derive(Clone)]
struct Subject {
    vmem: VirtualMemory,
    objects: Vec<VMemHandle>,
    stream: Arc<CudaStream>,
}

impl Call {
    fn start(self, subject: &Subject, i: usize) -> BoxFuture<'static, Outcome> {
        let vmem = subject.vmem.clone();
        let stream = subject.stream.clone();
        let handle = subject.objects[i % subject.objects.len()].clone();
        let next = subject.objects[(i + 1) % subject.objects.len()].clone();
        async move {
            match self {
                Call::Promote => vmem.promote(&handle, VRAM).await?,
                Call::Prefetch => vmem.prefetch(&handle, VRAM).await?,
                Call::Pin => return vmem.pin(&handle, VRAM).await.map(Got::Pin),
                Call::Put => return vmem.put(bytes(i, 1, LEN), VRAM).await.map(Got::Object),
                Call::Lease => return vmem.device_on(&handle, &stream).await.map(Got::Lease),
                Call::LeaseMut => {
                    return vmem.device_mut_on(&handle, &stream).await.map(Got::LeaseMut);
                }
                Call::Overwrite => {
                    return vmem.device_overwrite_on(&handle, &stream).await.map(Got::LeaseMut);
                }
                Call::Set => {
                    let set = vmem.device_set(&stream).read(&handle).read(&next);
                    return set.acquire().await.map(Got::Set);
                }
                Call::Gather => gather(&vmem, &stream, [&handle, &next]).await?,
                Call::Scatter => {
                    let mut zeros = stream.alloc_zeros::<u8>(LEN).unwrap();
                    let target = DeviceTarget::from_slice(&mut zeros);
                    vmem.scatter(&target, &[(0, &handle, 0..LEN)]).await?;
                }
                Call::Demote => vmem.demote(&handle, HOST).await?,
                Call::Finish => vmem.device_mut_on(&handle, &stream).await?.finish().await?,
            }
            Ok(Got::Nothing)
        }
        .boxed()
    }

    /// Whether kernels, or a buffer of zeros, may have changed the objects.
    fn changes(self) -> bool {
        matches!(self, Call::Overwrite | Call::Scatter)
    }
}

async fn gather(
    vmem: &VirtualMemory,
    stream: &Arc<CudaStream>,
    [first, second]: [&VMemHandle; 2],
) -> Result<(), VirtualMemoryError> {
    let mut buffer = stream.alloc_zeros::<u8>(2 * LEN).unwrap();
    let target = DeviceTarget::from_slice(&mut buffer);
    vmem.gather(&[(first, 0..LEN, 0), (second, 100..LEN, LEN)], &target).await
}

/// What other tasks do beside it, on objects of their own.
async fn others(subject: &Subject, beside: &[VMemHandle]) -> Result<(), String> {
    // No prefetch: that gives way to whatever is wanted, and may be late.
    let calls = [
        Call::Promote,
        Call::Pin,
        Call::Put,
        Call::Lease,
        Call::LeaseMut,
        Call::Overwrite,
        Call::Set,
        Call::Gather,
        Call::Scatter,
        Call::Finish,
    ];
    let own = Subject { objects: beside[..calls.len() + 1].to_vec(), ..subject.clone() };
    let device = calls.into_iter().enumerate().map(|(n, call)| {
        let call = tokio::spawn(call.start(&own, n).map(|got| got.map(drop)));
        async move {
            let what = format!("{:?}", calls[n]);
            succeeds(&what, BOUND, async { call.await.unwrap() }).await
        }
    });
    let rest = [calls.len() + 1, calls.len() + 2].map(|n| {
        let vmem = subject.vmem.clone();
        let handle = beside[n].clone();
        async move {
            let read = succeeds("read", BOUND, vmem.read(&handle)).await?;
            check(BESIDE + n, &[1], 0, &read)?;
            let mut buf = vec![0; LEN];
            succeeds("read_into", BOUND, vmem.read_into(&handle, 0..LEN, &mut buf)).await?;
            succeeds("write", BOUND, vmem.write(&handle, bytes(BESIDE + n, 2, LEN))).await?;
            succeeds("put on disk", BOUND, vmem.put(buf, DISK)).await.map(drop)
        }
    });
    let (device, rest) = tokio::join!(join_all(device), join_all(rest));
    let ended = device.into_iter().chain(rest);
    let delayed: Vec<_> = ended.filter_map(Result::err).collect();
    match delayed.is_empty() {
        true => Ok(()),
        false => Err(format!("others are delayed: {}", delayed.join("; "))),
    }
}

async fn case(call: Call, crowded: bool) -> Result<(), String> {
    on_a_device(VRAM_BYTES, SIZES, async |store| on_device(&store.vmem, call, crowded).await).await
}

async fn on_device(vmem: &VirtualMemory, call: Call, crowded: bool) -> Result<(), String> {
    let objects = cold(vmem, 0, KEPT, LEN).await;
    let beside = cold(vmem, BESIDE, 14, LEN).await;
    let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
    let subject = Subject { vmem: vmem.clone(), objects, stream };
    let mut crowd = Vec::new();
    if crowded || call == Call::Demote {
        // Device memory is full of objects that are not in use, or that the calls demote.
        for n in 0..20 {
            crowd.push(vmem.put(bytes(2_000 + n, 1, LEN), VRAM).await.unwrap());
            vmem.promote(&subject.objects[n], VRAM).await.unwrap();
        }
    }
    let mut kept = Vec::new();
    for i in 0..KEPT {
        kept.push(Kept::once(call.start(&subject, i)).await);
    }
    tokio::time::sleep(Duration::from_millis(30)).await;
    others(&subject, &beside).await?;
    drop(crowd);
    let mut left = Vec::new();
    for (i, kept) in kept.into_iter().enumerate() {
        match i % 4 {
            0 | 2 => finish(call, &subject, i, kept).await?,
            1 => drop(kept),
            _ => left.push((i, kept)),
        }
    }
    drop(subject);
    succeeds("close", CLOSE_BOUND, vmem.clone().close()).await?;
    for (i, kept) in left {
        let what = format!("kept future {i}, polled again after close");
        match within(&what, WAIT + BOUND, kept.finish()).await? {
            Ok(_) | Err(VirtualMemoryError::Closed) => {}
            Err(error) if is_deadline(&error) => {}
            Err(error) => return Err(format!("{what}: {error}")),
        }
    }
    Ok(())
}

async fn finish(
    call: Call,
    subject: &Subject,
    i: usize,
    kept: Kept<Outcome>,
) -> Result<(), String> {
    let what = format!("kept future {i}, polled again");
    let age = kept.age();
    match within(&what, WAIT + BOUND, kept.finish()).await? {
        Ok(got) => drop(got),
        Err(error) if is_deadline(&error) && (age + BOUND > WAIT || call == Call::Prefetch) => {}
        Err(error) => return Err(format!("{what}: {error}")),
    }
    let mut found = vec![0; LEN];
    let read = subject.vmem.read_into(&subject.objects[i], 0..LEN, &mut found);
    succeeds("reading its object", BOUND, read).await?;
    let zeros = call.changes() && found.iter().all(|&byte| byte == 0);
    if zeros { Ok(()) } else { check(i, &[1], 0, &found) }
}

fn keep(call: Call) {
    let mut complaints = Vec::new();
    for threads in THREADS {
        for crowded in [false, true] {
            let found = run(threads, move || case(call, crowded)).err();
            let about = format!("{call:?}, {threads:?}, device memory full: {crowded}");
            complaints.extend(found.map(|why| format!("{about}: {why}")));
        }
    }
    assert_none(&complaints);
}

macro_rules! table {
    ($($name:ident: $call:ident,)*) => {
        $(#[test]
        fn $name() {
            keep(Call::$call);
        })*
    };
}

table! {
    kept_promotions_to_vram_delay_nobody: Promote,
    kept_prefetches_to_vram_delay_nobody: Prefetch,
    kept_pins_in_vram_delay_nobody: Pin,
    kept_puts_at_home_in_vram_delay_nobody: Put,
    kept_leases_delay_nobody: Lease,
    kept_leases_for_change_delay_nobody: LeaseMut,
    kept_leases_for_overwriting_delay_nobody: Overwrite,
    kept_sets_of_leases_delay_nobody: Set,
    kept_gathers_delay_nobody: Gather,
    kept_scatters_delay_nobody: Scatter,
    kept_demotions_from_vram_delay_nobody: Demote,
    kept_changes_that_are_finished_delay_nobody: Finish,
}
