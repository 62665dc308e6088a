//! Objects that move under their users: scenarios 4, 6, 24, 31.
//!
//! Invariant: every read is a version that was written, in order, even if futures were dropped or
//! the store closed meanwhile. Called by `scenarios`.

use super::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;
use vmem::VirtualMemoryError;
use vmem::gpu::DeviceTarget;

/// 4: calls dropped at every point at which they wait. Nothing is corrupt, and nothing is left.
pub(super) fn dropped(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let len = 96 * KIB + 3;
        let calls = env.scaled(20_000, 3000);
        let vmem = env.store(5 * len, 64 * MIB, |set| set).await?;
        let mut objects = Vec::new();
        for object in 0..12 {
            objects.push(vmem.put(bytes(object, 0, len), HOST).await?);
        }
        let mut tasks = Vec::new();
        for task in 0..4_u64 {
            let vmem = vmem.clone();
            let objects = objects.clone();
            let device = env.device;
            let mut rng = SmallRng::seed_from_u64(env.seed ^ (task << 32));
            tasks.push(tokio::spawn(async move {
                let stream = crate::user::stream(device)?;
                let mut dropped = 0;
                for _ in 0..calls / 4 {
                    let object = rng.random_range(0..objects.len());
                    let handle = &objects[object];
                    let polls = rng.random_range(0..12);
                    let ended = match rng.random_range(0..8) {
                        0 => dropped_after(polls, vmem.promote(handle, VRAM)).await.is_some(),
                        1 => dropped_after(polls, vmem.demote(handle, HOST)).await.is_some(),
                        2 => dropped_after(polls, vmem.demote(handle, DISK)).await.is_some(),
                        3 => dropped_after(polls, vmem.prefetch(handle, VRAM)).await.is_some(),
                        4 => dropped_after(polls, vmem.device_on(handle, &stream)).await.is_some(),
                        5 => dropped_after(polls, vmem.device_mut_on(handle, &stream))
                            .await
                            .is_some(),
                        6 => dropped_after(polls, vmem.pin(handle, VRAM)).await.is_some(),
                        _ => {
                            let read = dropped_after(polls, vmem.read(handle)).await;
                            if let Some(read) = &read {
                                let right = bytes(object as u64, 0, len);
                                ensure!(
                                    *read.as_ref().map_err(Clone::clone)? == right,
                                    "object {object}"
                                );
                            }
                            read.is_some()
                        }
                    };
                    dropped += usize::from(!ended);
                }
                anyhow::Ok(dropped)
            }));
        }
        let mut dropped = 0;
        for task in tasks {
            dropped += task.await??;
        }
        ensure!(dropped > calls / 20, "only {dropped} of {calls} were dropped");
        let user = env.user()?;
        for (object, handle) in objects.iter().enumerate() {
            ensure!(vmem.read(handle).await? == bytes(object as u64, 0, len), "object {object}");
            ensure!(
                kernel_reads(&vmem, &user, handle).await? == bytes(object as u64, 0, len),
                "{object} on the device"
            );
        }
        drop(user);
        end(env, vmem, objects).await?;
        passed(json!({"calls": calls, "dropped": dropped}))
    })
}

/// 6: readers hammer an object that is promoted and demoted. Every read is a version that was
/// written, in order.
pub(super) fn evicted_under_readers(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let len = 24 * KIB;
        let moves = env.scaled(100_000, 4000);
        let vmem = env.store(4 * MIB, 16 * MIB, |set| set).await?;
        let handle = vmem.put(bytes(1, 0, len), HOST).await?;
        // What is being written, and what has been.
        let begun = Arc::new(AtomicU64::new(0));
        let done = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let mut readers = Vec::new();
        for reader in 0..4 {
            let vmem = vmem.clone();
            let handle = handle.clone();
            let begun = begun.clone();
            let done = done.clone();
            let stop = stop.clone();
            readers.push(tokio::spawn(async move {
                let mut seen = 0;
                let mut reads = 0_u64;
                while !stop.load(Ordering::SeqCst) {
                    let least = done.load(Ordering::SeqCst).max(seen);
                    let read = vmem.read(&handle).await?;
                    let most = begun.load(Ordering::SeqCst);
                    let found = (least..=most).find(|&version| read == bytes(1, version, len));
                    seen = found.with_context(|| {
                        format!("reader {reader}: no version of {least} to {most}")
                    })?;
                    reads += 1;
                    tokio::task::yield_now().await;
                }
                anyhow::Ok(reads)
            }));
        }
        let mut rng = env.rng();
        let user = env.user()?;
        let limit = Instant::now() + Duration::from_secs(env.scaled(120, 10) as u64);
        let mut moved = 0;
        let mut version = 0;
        while moved < moves && Instant::now() < limit {
            match rng.random_range(0..8) {
                0 => {
                    version += 1;
                    begun.store(version, Ordering::SeqCst);
                    vmem.write(&handle, bytes(1, version, len)).await?;
                    done.store(version, Ordering::SeqCst);
                }
                1..4 => {
                    vmem.promote(&handle, VRAM).await?;
                    if moved % 8 == 0 {
                        let there = kernel_reads(&vmem, &user, &handle).await?;
                        ensure!(there == bytes(1, version, len), "a kernel reads another version");
                    }
                }
                4 | 5 => vmem.demote(&handle, HOST).await?,
                _ => {
                    vmem.promote(&handle, VRAM).await?;
                    // Drops the host copy, unless it has a reader just now, and the device's copy
                    // serves.
                    vmem.demote(&handle, DISK).await?;
                }
            }
            moved += 1;
        }
        stop.store(true, Ordering::SeqCst);
        let mut reads = 0;
        for reader in readers {
            reads += reader.await??;
        }
        ensure!(reads > 0 && moved > 100, "{reads} reads, {moved} moves");
        end(env, vmem, vec![handle]).await?;
        passed(json!({"moves": moved, "reads": reads, "versions": version}))
    })
}

/// 24: closed during a thousand operations; and a runtime that is dropped without a close. Each
/// ends well or with `Closed`.
pub(super) fn closed(env: &Env) -> Result<Outcome> {
    let operations = 1000;
    let outcome = env.block_on(async {
        let len = 64 * KIB;
        let vmem = env.store(64 * len, 128 * MIB, |set| set).await?;
        let mut objects = Vec::new();
        for object in 0..100 {
            objects.push(vmem.put(bytes(object, 0, len), HOST).await?);
        }
        let mut tasks = Vec::new();
        let mut rng = env.rng();
        for _ in 0..operations {
            let vmem = vmem.clone();
            let handle = objects[rng.random_range(0..100)].clone();
            let kind = rng.random_range(0..5);
            let device = env.device;
            tasks.push(tokio::spawn(async move {
                match kind {
                    0 => vmem.promote(&handle, VRAM).await,
                    1 => vmem.read(&handle).await.map(drop),
                    2 => vmem.demote(&handle, DISK).await,
                    3 => vmem.prefetch(&handle, VRAM).await,
                    _ => {
                        let stream = crate::user::stream(device);
                        match stream {
                            Ok(stream) => vmem.device_on(&handle, &stream).await.map(drop),
                            Err(_) => Ok(()),
                        }
                    }
                }
            }));
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(1..20))).await;
        let begun = Instant::now();
        vmem.close().await.context("closing")?;
        let took = begun.elapsed();
        ensure!(took < Duration::from_secs(45), "it took {took:?} to close");
        let mut ended = 0;
        let mut refused = 0;
        for task in tasks {
            match task.await? {
                Ok(()) => ended += 1,
                Err(VirtualMemoryError::Closed) => refused += 1,
                Err(error) => anyhow::bail!("neither done nor closed: {error:?}"),
            }
        }
        passed(json!({"ended": ended, "closed": refused, "close_seconds": took.as_secs_f64()}))
    })?;
    // Dropped with everything under way: nothing hangs, and nothing is used after it was freed.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let kept = runtime.block_on(async {
        let len = 256 * KIB;
        let vmem = env.store(16 * len, 64 * MIB, |set| set).await?;
        let mut objects = Vec::new();
        for object in 0..32 {
            let handle = vmem.put(bytes(object, 0, len), HOST).await?;
            vmem.prefetch(&handle, VRAM).detach();
            objects.push(handle);
        }
        anyhow::Ok((vmem, objects))
    })?;
    runtime.shutdown_timeout(Duration::from_secs(20));
    drop(kept);
    Ok(outcome)
}

/// 31: slabs of host memory are given back and committed again while copies run over others. Bytes
/// are right everywhere.
pub(super) fn slabs(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let host = env.scaled(256 * MIB, 6 * MIB);
        let rounds = env.scaled(400, 120);
        let set = |set: vmem::VirtualMemoryConfigBuilder| set.staging_capacity((host / 16) as u64);
        let vmem = env.store(env.scaled(512 * MIB, 32 * MIB), host, set).await?;
        // Slabs have memory, and are registered as it passes. The holes in them are too short for
        // much of what follows, which has their pages given back.
        let mut between = Vec::new();
        for object in 0..12 {
            let handle = vmem.put(bytes(4_000_000 + object, 0, host / 16), HOST).await?;
            vmem.promote(&handle, VRAM).await?;
            between.push(handle);
        }
        let mut most = vmem.stats().registered_bytes;
        for hole in (0..6).rev() {
            vmem.free(between.remove(2 * hole)).await?;
        }
        let mut tasks = Vec::new();
        for task in 0..4_u64 {
            let vmem = vmem.clone();
            let device = env.device;
            let mut rng = SmallRng::seed_from_u64(env.seed ^ (task << 40));
            tasks.push(tokio::spawn(async move {
                let stream = crate::user::stream(device)?;
                for round in 0..rounds as u64 {
                    let len = rng.random_range(1..host / 12);
                    let object = task * 1_000_000 + round;
                    let handle = vmem.put(bytes(object, 0, len), HOST).await?;
                    vmem.promote(&handle, VRAM).await?;
                    let mut found = stream.alloc_zeros::<u8>(len)?;
                    let target = DeviceTarget::from_slice(&mut found);
                    vmem.gather(&[(&handle, 0..len, 0)], &target).await?;
                    drop(target);
                    ensure!(
                        stream.clone_dtoh(&found)? == bytes(object, 0, len),
                        "{object}: on the device"
                    );
                    if round % 3 == 0 {
                        // Down into host memory, which may have been registered; and from disk, by
                        // fixed reads.
                        vmem.device_mut_on(&handle, &stream).await?.finish().await?;
                        vmem.demote(&handle, DISK).await?;
                    }
                    ensure!(
                        vmem.read(&handle).await? == bytes(object, 0, len),
                        "{object}: in host memory"
                    );
                    vmem.free(handle).await?;
                }
                anyhow::Ok(())
            }));
        }
        for task in &mut tasks {
            while !task.is_finished() {
                most = most.max(vmem.stats().registered_bytes);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        for task in tasks {
            task.await??;
        }
        ensure!(most > 0, "nothing was registered at any time");
        ensure!(most <= host as u64, "{most} registered of {host}");
        end(env, vmem, between).await?;
        passed(json!({"rounds": 4 * rounds, "most_registered_bytes": most}))
    })
}
