//! Faults of the device, which only the emulated driver has at command: scenarios 18 and 32.
//!
//! Invariant: what fails says so, and says nothing wrong: no bytes but those that were written.
//! Called by `scenarios`.

use super::*;
use std::time::Instant;
use vmem::VirtualMemoryError;
use vmem_cuda_emulator::Emulator;

/// A copy that failed to launch.
const REFUSED: i32 = 719;
/// An address that is none: it sticks.
const ILLEGAL: i32 = 700;

fn emulator(env: &Env) -> Result<&Emulator> {
    env.emulator.as_ref().context("it needs the emulated driver")
}

/// 18, of the device: what fails gets `Device`, an older copy stays readable, others do not notice,
/// and when the cause goes all is well again.
pub(super) fn errors(env: &Env) -> Result<Outcome> {
    let emulator = emulator(env)?;
    env.block_on(async {
        let len = 100 * KIB;
        let vmem = env.store(8 * MIB, 64 * MIB, |set| set).await?;
        let user = env.user()?;
        let handle = vmem.put(bytes(1, 0, len), HOST).await?;
        let other = vmem.put(bytes(2, 0, len), HOST).await?;
        let mut failed = 0;
        let function = "cuMemcpyHtoDAsync_v2";
        for _ in 0..2 {
            emulator.fail(function, 1, REFUSED);
            let refused = vmem.promote(&handle, VRAM).await;
            ensure!(
                matches!(refused, Err(VirtualMemoryError::Device { code: REFUSED, .. })),
                "{function}: {refused:?}"
            );
            ensure!(!vmem.residency(&handle)?.vram, "{function}: it is no copy");
            ensure!(vmem.read(&handle).await? == bytes(1, 0, len), "{function}: the copy below");
            vmem.promote(&other, VRAM).await.context("another object")?;
            vmem.promote(&handle, VRAM).await.context("once the cause is gone")?;
            ensure!(
                kernel_reads(&vmem, &user, &handle).await? == bytes(1, 0, len),
                "{function}: on the device"
            );
            vmem.demote(&handle, HOST).await?;
            vmem.demote(&other, HOST).await?;
            failed += 1;
        }
        // The copy of what a kernel wrote fails once, and for longer: the version is not lost.
        let function = "cuMemcpyDtoHAsync_v2";
        let mut expected = bytes(1, 0, len).to_vec();
        for is_refused in [false, true] {
            let lease = vmem.device_mut_on(&handle, &user.stream).await?;
            // SAFETY: used on the stream of the lease, before it ends.
            let at = unsafe { lease.device_ptr() };
            // SAFETY: as above.
            unsafe { user.add(at, len, 1, &user.stream) }?;
            if is_refused {
                emulator.refuse(function, REFUSED);
            } else {
                emulator.fail(function, 1, REFUSED);
            }
            lease.finish().await.context("copying to the host")?;
            if is_refused {
                let refused = vmem.read(&handle).await;
                ensure!(
                    matches!(refused, Err(VirtualMemoryError::Device { code: REFUSED, .. })),
                    "{function}: the device alone has it: {refused:?}"
                );
                ensure!(vmem.stats().vram_dirty_bytes == len as u64, "it is counted");
                emulator.refuse(function, 0);
            }
            expected.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
            ensure!(vmem.read(&handle).await? == expected, "what the kernel wrote");
        }
        // Zeros that cannot be made.
        emulator.fail("cuMemsetD8Async", 1, REFUSED);
        let fresh = vmem.allocate(len, VRAM).await;
        if let Ok(fresh) = &fresh {
            ensure!(
                vmem.read(fresh).await? == vec![0; len],
                "an object that was never written is zeros"
            );
        }
        drop(fresh);
        // An error that sticks: the tier is gone, the copies below serve, and all is said.
        vmem.demote(&handle, HOST).await?;
        vmem.promote(&other, VRAM).await?;
        emulator.sticky(ILLEGAL);
        let refused = vmem.promote(&handle, VRAM).await;
        ensure!(
            matches!(
                refused,
                Err(VirtualMemoryError::Device { .. } | VirtualMemoryError::TierNotAvailable { .. })
            ),
            "lost: {refused:?}"
        );
        ensure!(vmem.read(&handle).await? == expected, "what was changed, after the loss");
        ensure!(vmem.read(&other).await? == bytes(2, 0, len), "what was not, after the loss");
        let refused = vmem.promote(&other, VRAM).await;
        ensure!(
            matches!(refused, Err(VirtualMemoryError::TierNotAvailable { .. })),
            "and says so: {refused:?}"
        );
        vmem.write(&handle, bytes(1, 1, len)).await.context("writing goes on")?;
        ensure!(vmem.read(&handle).await? == bytes(1, 1, len), "what was written");
        drop((handle, other));
        vmem.close().await.context("closing without its device")?;
        emulator.sticky(0);
        drop(user);
        counted("refused", failed + 3)
    })
}

/// 32: the notice of the driver is lost, comes twice, or does not come after a fault. Every call
/// ends, and none with `Ok` over bytes that are wrong.
pub(super) fn notices(env: &Env) -> Result<Outcome> {
    let emulator = emulator(env)?;
    env.block_on(async {
        let len = 64 * KIB;
        let objects = 24_u64;
        let vmem = env.store(64 * MIB, 64 * MIB, |set| set).await?;
        let user = env.user()?;
        let mut handles = Vec::new();
        for object in 0..objects {
            handles.push(vmem.put(bytes(object, 0, len), HOST).await?);
        }
        let mut slowest = Duration::ZERO;
        for kind in ["lost", "twice"] {
            emulator.suppress_host_functions(kind == "lost");
            emulator.double_host_functions(kind == "twice");
            for (object, handle) in handles.iter().enumerate() {
                let begun = Instant::now();
                let ended =
                    tokio::time::timeout(Duration::from_secs(20), vmem.promote(handle, VRAM));
                ended.await.with_context(|| format!("{kind}: it hangs"))??;
                slowest = slowest.max(begun.elapsed());
                let there = kernel_reads(&vmem, &user, handle).await?;
                ensure!(there == bytes(object as u64, 0, len), "{kind}: object {object}");
                let lease = vmem.device_mut_on(handle, &user.stream).await?;
                let ended = tokio::time::timeout(Duration::from_secs(20), lease.finish());
                ended.await.with_context(|| format!("{kind}: the lease hangs"))??;
                vmem.demote(handle, HOST).await?;
            }
        }
        emulator.suppress_host_functions(false);
        emulator.double_host_functions(false);
        // Under way when the device fails: none of them ends well.
        emulator.hold(vmem_cuda_emulator::Kind::Up);
        let promotes: Vec<_> = handles
            .iter()
            .map(|handle| {
                let vmem = vmem.clone();
                let handle = handle.clone();
                tokio::spawn(async move { vmem.promote(&handle, VRAM).await })
            })
            .collect();
        while emulator.counter("queued_up") == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        emulator.sticky(ILLEGAL);
        emulator.release_all();
        for promote in promotes {
            let ended = tokio::time::timeout(Duration::from_secs(20), promote).await;
            let outcome = ended.context("it hangs after a fault")??;
            ensure!(outcome.is_err(), "it ended well over a device that had failed");
        }
        for (object, handle) in handles.iter().enumerate() {
            ensure!(
                vmem.read(handle).await? == bytes(object as u64, 0, len),
                "object {object} after the fault"
            );
        }
        drop(handles);
        vmem.close().await.context("closing without its device")?;
        emulator.sticky(0);
        drop(user);
        passed(json!({"slowest_seconds": slowest.as_secs_f64()}))
    })
}
