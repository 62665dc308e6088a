//! Order between copies of the store and kernels of the user: scenarios 7, 8, 9, 10, 33.
//!
//! Invariant: a kernel finds the bytes of the version that its lease was given, and what it wrote
//! is in every copy that is made after its lease was dropped. Called by `scenarios`.

use super::*;
use std::time::Instant;
use vmem::VirtualMemoryError;

const SPIN: Duration = Duration::from_millis(20);

/// 7: eviction right after a kernel wrote on another stream. The host copy holds the kernel's
/// output.
pub(super) fn leaves_after_a_kernel(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let len = 300 * KIB + 7;
        let rounds = env.scaled(200, 30);
        let vmem = env.store(len * 3, 64 * MIB, |set| set).await?;
        let user = env.user()?;
        let mut rng = env.rng();
        for round in 0..rounds as u64 {
            let handle = vmem.put(bytes(1, round, len), HOST).await?;
            let other = vmem.put(bytes(2, round, len), HOST).await?;
            let stream = user.context.new_stream()?;
            let lease = vmem.device_mut_on(&handle, &stream).await?;
            // SAFETY: on the stream of the lease, before it is dropped.
            let at = unsafe { lease.device_ptr() };
            user.spin(SPIN / 4, &stream)?;
            // SAFETY: as above.
            unsafe { user.add(at, len, 3, &stream) }?;
            drop(lease);
            let expected = plus(&bytes(1, round, len), 3);
            let below = if rand::Rng::random_bool(&mut rng, 0.5) { HOST } else { DISK };
            vmem.demote(&handle, below).await.context("demoting")?;
            ensure!(!vmem.residency(&handle)?.vram, "it is in device memory still");
            ensure!(
                vmem.read(&handle).await? == expected,
                "round {round}: the kernel's output is not in {below}"
            );
            vmem.promote(&other, VRAM).await?;
            vmem.promote(&handle, VRAM).await?;
            ensure!(
                kernel_reads(&vmem, &user, &handle).await? == expected,
                "round {round}: up again"
            );
            drop((handle, other));
        }
        drop(user);
        end(env, vmem, Vec::new()).await?;
        counted("rounds", rounds)
    })
}

/// 8: reuse of a device range that a slow kernel still reads. The old reader sees the old bytes.
pub(super) fn reused_under_a_reader(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let len = 256 * KIB;
        let rounds = env.scaled(100, 20);
        // Space for two.
        let vmem = env.store(2 * len, 64 * MIB, |set| set.max_pinned(1.0)).await?;
        let user = env.user()?;
        let mut waited = 0;
        for round in 0..rounds as u64 {
            let read = vmem.put(bytes(1, round, len), HOST).await?;
            let new = [
                vmem.put(bytes(2, round, len), HOST).await?,
                vmem.put(bytes(3, round, len), HOST).await?,
            ];
            let stream = user.context.new_stream()?;
            let sink = slow_copy(&vmem, &user, &read, SPIN, &stream).await?;
            vmem.free(read).await?;
            let begun = Instant::now();
            let mut pins = Vec::new();
            for new in &new {
                pins.push(vmem.pin(new, VRAM).await.context("the second waits for the kernel")?);
            }
            waited += usize::from(begun.elapsed() > SPIN / 2);
            for (at, new) in new.iter().enumerate() {
                let there = kernel_reads(&vmem, &user, new).await?;
                ensure!(there == bytes(2 + at as u64, round, len), "round {round}: the new bytes");
            }
            ensure!(
                sink.read(&stream)? == bytes(1, round, len),
                "round {round}: the reader saw other bytes"
            );
        }
        ensure!(
            waited * 2 > rounds,
            "only {waited} of {rounds} had to wait: the kernel is not slow"
        );
        drop(user);
        end(env, vmem, Vec::new()).await?;
        counted("rounds", rounds)
    })
}

/// 9: free or evict while a kernel holds the pointer. Memory is reused after its event only, and
/// the device is never waited for as a whole.
pub(super) fn freed_under_a_kernel(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let len = 256 * KIB;
        let rounds = env.scaled(60, 15);
        let vmem = env.store(4 * len, 64 * MIB, |set| set).await?;
        let user = env.user()?;
        for round in 0..rounds as u64 {
            let mut objects = Vec::new();
            for object in 0..8 {
                objects.push(vmem.put(bytes(object, round, len), HOST).await?);
            }
            let mut readers = Vec::new();
            // Kernels over three that leave at once, one of them freed, while the other five come.
            for (object, handle) in objects[..3].iter().enumerate() {
                let stream = user.context.new_stream()?;
                let sink = slow_copy(&vmem, &user, handle, SPIN / 2, &stream).await?;
                readers.push((object as u64, stream, sink));
            }
            let freed = objects.remove(0);
            vmem.free(freed).await?;
            for handle in &objects {
                vmem.promote(handle, VRAM).await?;
            }
            for (object, stream, sink) in readers {
                ensure!(
                    sink.read(&stream)? == bytes(object, round, len),
                    "round {round}: object {object}"
                );
            }
            for (at, handle) in objects.iter().enumerate() {
                ensure!(
                    vmem.read(handle).await? == bytes(at as u64 + 1, round, len),
                    "round {round}: {at}"
                );
            }
        }
        drop(user);
        end(env, vmem, Vec::new()).await?;
        counted("rounds", rounds)
    })
}

/// 10: a tier of three equal objects; tasks take {A, B} and {C, D} in opposite orders. All finish;
/// a set of four fails at once.
pub(super) fn sets(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let len = 128 * KIB;
        let rounds = env.scaled(500, 100);
        let set = |set: vmem::VirtualMemoryConfigBuilder| set.max_pinned(1.0);
        let vmem = env.store(3 * len, 64 * MIB, set).await?;
        let mut objects = Vec::new();
        for object in 0..4 {
            objects.push(vmem.put(bytes(object, 0, len), HOST).await?);
        }
        let begun = Instant::now();
        let all = vmem
            .device_set(&env.user()?.stream)
            .read(&objects[0])
            .read(&objects[1])
            .read(&objects[2]);
        let refused = all.read(&objects[3]).acquire().await;
        ensure!(
            matches!(refused, Err(VirtualMemoryError::ExceedsCapacity { .. })),
            "four in a tier of three: {refused:?}"
        );
        ensure!(begun.elapsed() < Duration::from_secs(10), "at once");
        let mut tasks = Vec::new();
        for task in 0..8_usize {
            let vmem = vmem.clone();
            let objects = objects.clone();
            let device = env.device;
            tasks.push(tokio::spawn(async move {
                let stream = crate::user::stream(device)?;
                for round in 0..rounds {
                    let pair = if task % 2 == 0 { [0, 1] } else { [2, 3] };
                    let pair = if (task / 2 + round) % 2 == 0 { pair } else { [pair[1], pair[0]] };
                    let first = &objects[pair[0]];
                    let second = &objects[pair[1]];
                    let set = vmem.device_set(&stream);
                    let writes = (task + round) % 3 == 0;
                    let set = match writes {
                        true => set.write(first).write(second),
                        false => set.read(first).read(second),
                    };
                    let held = set.acquire().await;
                    let held = held.with_context(|| format!("task {task}, round {round}"))?;
                    ensure!(held.read.len() + held.write.len() == 2, "all of it");
                    if writes {
                        held.finish().await?;
                    }
                }
                anyhow::Ok(())
            }));
        }
        for task in tasks {
            task.await??;
        }
        for (object, handle) in objects.iter().enumerate() {
            ensure!(vmem.read(handle).await? == bytes(object as u64, 0, len), "object {object}");
        }
        end(env, vmem, objects).await?;
        counted("sets", 8 * rounds)
    })
}

/// 33: another library in the process captures a graph, allocates and changes its context while
/// objects move. Neither notices.
pub(super) fn neighbours(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let len = 200 * KIB;
        let rounds = env.scaled(300, 40);
        let vmem = env.store(4 * len, 64 * MIB, |set| set).await?;
        let mut objects = Vec::new();
        for object in 0..8 {
            objects.push(vmem.put(bytes(object, 0, len), HOST).await?);
        }
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let own = env.user()?;
        let device = env.device;
        let stopped = stop.clone();
        let library = std::thread::spawn(move || crate::user::capture_until(device, &stopped));
        for round in 0..rounds {
            for handle in &objects {
                vmem.promote(handle, VRAM).await.context("promoting beside a capture")?;
            }
            // Calls on this thread leave its context as it was.
            crate::user::without_context()?;
            let lease = vmem.device_on(&objects[round % 8], &own.stream).await?;
            drop(lease);
            let after = crate::user::current_context()?;
            ensure!(after == 0, "the thread had no context, and has {after:x} now");
        }
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        let captures = library.join().map_err(|_| anyhow::anyhow!("the library panicked"))??;
        ensure!(captures > 0, "no capture at all");
        for (object, handle) in objects.iter().enumerate() {
            ensure!(vmem.read(handle).await? == bytes(object as u64, 0, len), "object {object}");
        }
        end(env, vmem, objects).await?;
        passed(json!({"rounds": rounds, "captures": captures}))
    })
}
