//! What a device alone has, and scratch memory: scenario 47, as far as a card can be asked for it.
//!
//! Invariant: no read gets an older version than that of the last kernel, unless an error said
//! before that this one is lost. Called by `scenarios`.

use super::*;
use vmem::{VirtualMemoryError, WriteBack};

/// Queues a kernel that adds to each byte of an object, in a lease that it ends.
async fn add(
    vmem: &VirtualMemory,
    user: &User,
    handle: &VMemHandle,
    value: u8,
    stream: &Arc<CudaStream>,
) -> Result<()> {
    let lease = vmem.device_mut_on(handle, stream).await.context("a lease")?;
    // SAFETY: used by the kernel on the stream of the lease, before that ends.
    let at = unsafe { lease.device_ptr() };
    // SAFETY: as above.
    unsafe { user.add(at, handle.len(), value, stream) }?;
    Ok(lease.finish().await?)
}

/// Under each policy of writing back: kernels over more objects than the device holds, scratch
/// memory beside them, and changes that are given up half way.
pub(super) fn written_back(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let policies =
            [WriteBack::Eager, WriteBack::After(Duration::from_millis(5)), WriteBack::OnEvict];
        let mut figures = serde_json::Map::new();
        for policy in policies {
            let copied = under(env, policy).await.with_context(|| format!("{policy:?}"))?;
            figures.insert(format!("{policy:?}"), json!({ "bytes_copied_down": copied }));
        }
        passed(figures.into())
    })
}

/// Returns how many bytes were copied down.
async fn under(env: &Env, policy: WriteBack) -> Result<u64> {
    const ROUNDS: u8 = 3;
    let len = env.scaled(4 * MIB, 100 * KIB);
    let count = 24;
    let vmem = env.store(count / 2 * len, 2 * count * len, |set| set.write_back(policy)).await?;
    let user = env.user()?;
    let stream = user.context.new_stream()?;
    let mut handles = Vec::new();
    for object in 0..count as u64 {
        handles.push(vmem.put(bytes(object, 0, len), DISK).await?);
    }
    for round in 0..ROUNDS {
        for handle in &handles {
            add(&vmem, &user, handle, 1 + round, &stream).await?;
        }
        let mut scratch = vmem.allocate_scratch(2 * len, &stream).await.context("scratch")?;
        ensure!(scratch.view_mut().len() == 2 * len, "the length of scratch");
        // SAFETY: used by the work below, on the stream of the scratch, before that is dropped.
        let at = unsafe { scratch.device_ptr() };
        let sink = user.allocate(2 * len)?;
        // SAFETY: as above; the sink is read after it.
        unsafe { user.copy(sink.address, at, 2 * len, &stream) }?;
        // SAFETY: as above.
        unsafe { user.fill(at, 2 * len, 0xA5, &stream) }?;
        drop(scratch);
        ensure!(sink.read(&stream)?.iter().all(|&byte| byte == 0), "scratch begins as zeros");
    }
    let written = |object: usize| plus(&bytes(object as u64, 0, len), 6);
    for (object, handle) in handles.iter().enumerate() {
        ensure!(vmem.read(handle).await? == written(object), "object {object}");
    }
    vmem.flush_all().await?;
    ensure!(vmem.stats().vram_dirty_bytes == 0, "a flush leaves what only the device has");
    given_up(&vmem, &user, &handles[0], policy, &stream).await?;
    let copied = vmem.stats().vram_to_host_bytes;
    drop(stream);
    drop(user);
    end(env, vmem, handles).await?;
    Ok(copied)
}

/// A change is given up half way: what was written back stays, and what only the device had is
/// lost, with an error, until it is reverted.
async fn given_up(
    vmem: &VirtualMemory,
    user: &User,
    handle: &VMemHandle,
    policy: WriteBack,
    stream: &Arc<CudaStream>,
) -> Result<()> {
    vmem.demote(handle, DISK).await?;
    let before = vmem.read(handle).await?.to_vec();
    add(vmem, user, handle, 1, stream).await?;
    let lease = vmem.device_mut_on(handle, stream).await?;
    // SAFETY: used by the kernel on the stream of the lease, before that ends.
    let at = unsafe { lease.device_ptr() };
    // SAFETY: as above.
    unsafe { user.add(at, handle.len() / 2, 9, stream) }?;
    lease.abandon();
    let after = plus(&before, 1);
    match vmem.read(handle).await {
        Ok(read) => ensure!(read == after, "neither the version before nor an error"),
        Err(VirtualMemoryError::Device { .. }) if policy != WriteBack::Eager => {
            vmem.revert(handle).await.context("reverting")?;
            ensure!(vmem.read(handle).await? == before, "what was written back");
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
