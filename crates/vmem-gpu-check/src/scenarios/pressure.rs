//! Too little space: scenarios 1, 12, 21.
//!
//! Invariant: whatever can be served is, and what cannot gets an error that says why, by its
//! deadline. Called by `scenarios`.

use super::*;
use rand::Rng;
use std::time::Instant;
use vmem::VirtualMemoryError;

/// 1: staging exhaustion. Host memory is held, and 32 tasks read from disk to the device: all
/// finish, and no thread spins.
pub(super) fn staging(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let len = MIB + 13;
        let space = 8 * MIB;
        let staging = 2 * MIB;
        let set = |set: vmem::VirtualMemoryConfigBuilder| {
            set.staging_capacity(staging as u64).max_pinned(1.0).max_held(1.0)
        };
        let vmem = env.store(40 * len, space + staging, set).await?;
        let mut objects = Vec::new();
        for object in 0..32 {
            let handle = vmem.put(bytes(object, 0, len), DISK).await?;
            vmem.demote(&handle, DISK).await?;
            objects.push(handle);
        }
        // Bytes that are held take all of object space that one more object could have.
        let mut held = Vec::new();
        let mut fillers = Vec::new();
        while vmem.stats().host.largest_free_bytes >= 256 * KIB as u64 {
            let filler = vmem.put(bytes(1000, 0, 256 * KIB), HOST).await?;
            held.push(vmem.read(&filler).await?);
            fillers.push(filler);
        }
        let before = processor_time()?;
        let begun = Instant::now();
        let host = vmem.stats().host.used_bytes;
        if let Some(emulator) = &env.emulator {
            emulator.delay(vmem_cuda_emulator::Kind::Up, 10_000);
        }
        let promotes = objects.iter().map(|handle| vmem.promote(handle, VRAM));
        futures::future::try_join_all(promotes).await.context("with host memory held")?;
        let took = begun.elapsed();
        let spent = processor_time()?.saturating_sub(before);
        if let Some(emulator) = &env.emulator {
            emulator.delay(vmem_cuda_emulator::Kind::Up, 0);
        }
        let used = vmem.stats().host;
        ensure!(used.peak_bytes <= used.capacity_bytes, "more than its budget");
        ensure!(used.used_bytes <= host, "object space was not taken");
        let user = env.user()?;
        for (object, handle) in objects.iter().enumerate() {
            ensure!(vmem.residency(handle)?.vram, "object {object} is not there");
            let found = kernel_reads(&vmem, &user, handle).await?;
            ensure!(found == bytes(object as u64, 0, len), "object {object}");
        }
        let allowed = took * 3 + Duration::from_millis(500);
        ensure!(spent < allowed, "{spent:?} of processor time in {took:?}");
        drop((held, fillers, user));
        end(env, vmem, objects).await?;
        let seconds = took.as_secs_f64();
        let processor_seconds = spent.as_secs_f64();
        passed(json!({"objects": 32, "seconds": seconds, "processor_seconds": processor_seconds}))
    })
}

/// 12: everything in device memory is pinned or leased. Another object gets `AllPinned` at its
/// deadline, with the bytes of each; all else goes on, and no thread spins.
pub(super) fn all_pinned(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let len = 256 * KIB;
        let deadline = Duration::from_millis(700);
        let set =
            |set: vmem::VirtualMemoryConfigBuilder| set.max_pinned(1.0).wait_timeout(deadline);
        let vmem = env.store(4 * len, 64 * MIB, set).await?;
        let user = env.user()?;
        let mut pins = Vec::new();
        let mut objects = Vec::new();
        for object in 0..3 {
            let handle = vmem.put(bytes(object, 0, len), HOST).await?;
            pins.push(vmem.pin(&handle, VRAM).await?);
            objects.push(handle);
        }
        let leased = vmem.put(bytes(3, 0, len), HOST).await?;
        let lease = vmem.device_on(&leased, &user.stream).await?;
        let other = vmem.put(bytes(4, 0, len), HOST).await?;
        let before = processor_time()?;
        let begun = Instant::now();
        let refused = vmem.promote(&other, VRAM).await;
        let took = begun.elapsed();
        let spent = processor_time()?.saturating_sub(before);
        match refused {
            Err(VirtualMemoryError::AllPinned { tier, pinned_bytes, capacity_bytes, .. }) => {
                ensure!(
                    tier == VRAM && pinned_bytes >= 3 * len as u64,
                    "{pinned_bytes} bytes pinned in {tier}"
                );
                ensure!(capacity_bytes == 4 * len as u64, "of {capacity_bytes}");
            }
            other => anyhow::bail!("all is pinned, and it came to {other:?}"),
        }
        ensure!(took >= deadline, "before its deadline: {took:?}");
        ensure!(spent < took / 2, "{spent:?} of processor time in {took:?}");
        let again = vmem.device_on(&other, &user.stream).await.map(drop);
        ensure!(matches!(again, Err(VirtualMemoryError::AllPinned { .. })), "a lease: {again:?}");
        ensure!(
            matches!(vmem.demote(&objects[0], HOST).await, Err(VirtualMemoryError::Pinned { .. })),
            "pinned"
        );
        // Nothing else minds.
        vmem.write(&other, bytes(4, 1, len)).await?;
        ensure!(vmem.read(&other).await? == bytes(4, 1, len), "what was written");
        vmem.write(&objects[1], bytes(1, 1, len)).await.context("a pinned object is written")?;
        ensure!(vmem.read(&objects[1]).await? == bytes(1, 1, len), "what was written to it");
        // And it recovers without help.
        drop(lease);
        user.stream.synchronize()?;
        vmem.promote(&other, VRAM).await.context("once the lease has ended")?;
        ensure!(kernel_reads(&vmem, &user, &other).await? == bytes(4, 1, len), "on the device");
        drop((pins, user));
        objects.extend([leased, other]);
        end(env, vmem, objects).await?;
        passed(
            json!({"waited_seconds": took.as_secs_f64(), "processor_seconds": spent.as_secs_f64()}),
        )
    })
}

/// 21: random sizes, with the device full and nothing pinned: everything that fits it is promoted.
pub(super) fn fragments(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let vram = env.scaled(256 * MIB, 16 * MIB);
        let steps = env.scaled(20_000, 1500);
        let vmem = env.store(vram, 4 * vram, |set| set).await?;
        let mut rng = env.rng();
        let largest = (vram / 4) as f64;
        let mut live: Vec<(VMemHandle, u64)> = Vec::new();
        let mut bytes_live = 0;
        let user = env.user()?;
        for step in 0..steps as u64 {
            // As many small ones as large ones, by their logarithm.
            let len = (512.0 * (largest / 512.0).powf(rng.random::<f64>())) as usize;
            while bytes_live + len > 2 * vram {
                let (handle, _) = live.swap_remove(rng.random_range(0..live.len()));
                bytes_live -= handle.len();
                vmem.free(handle).await?;
            }
            let handle = vmem.put(bytes(step, 0, len), HOST).await?;
            vmem.promote(&handle, VRAM)
                .await
                .with_context(|| format!("step {step}: {len} bytes"))?;
            bytes_live += len;
            live.push((handle, step));
            if step % 50 == 0 {
                let (handle, object) = &live[rng.random_range(0..live.len())];
                let there = kernel_reads(&vmem, &user, handle).await?;
                ensure!(there == bytes(*object, 0, handle.len()), "step {step}: object {object}");
                let stats = vmem.stats().vram;
                ensure!(
                    stats.largest_free_bytes <= stats.capacity_bytes - stats.used_bytes,
                    "{stats:?}"
                );
            }
        }
        drop(user);
        end(env, vmem, live.into_iter().map(|(handle, _)| handle).collect()).await?;
        counted("objects", steps)
    })
}
