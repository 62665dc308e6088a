//! Two devices in one store, where there are two.
//!
//! Invariant: kernels of either device find the newest version of every object, wherever it was
//! written. What goes from one device to the other goes over host memory. Called by `scenarios`.

use std::time::Instant;

use super::*;
use cudarc::driver::CudaContext;
use vmem::gpu::DeviceTarget;
use vmem::{GpuSelection, WriteBack};

/// Says that there is one device, or has kernels of two change the same objects in turn, and gather
/// on the second what the first one alone has.
pub(super) fn two(env: &Env) -> Result<Outcome> {
    if let Some(emulator) = &env.emulator {
        emulator.devices(2);
    }
    let devices = CudaContext::device_count().context("counting devices")? as usize;
    if devices < 2 {
        return Ok(Outcome::Skipped("one device".into()));
    }
    env.block_on(async {
        let ordinals = [env.device, (env.device + 1) % devices];
        let tiers = [VRAM, MemoryTier::of_device(1)];
        let count = 16;
        let len = env.scaled(4 * MIB, 64 * KIB);
        let set = |set: vmem::VirtualMemoryConfigBuilder| {
            set.gpus(ordinals.map(GpuSelection::Device)).write_back(WriteBack::OnEvict)
        };
        let vmem = env.store(2 * count * len, 4 * count * len, set).await?;
        let users = [Env::user_on(ordinals[0])?, Env::user_on(ordinals[1])?];
        let mut handles = Vec::new();
        for object in 0..count as u64 {
            handles.push(vmem.put(bytes(object, 0, len), HOST).await?);
        }
        let rounds = 4_u8;
        let mut between = Duration::ZERO;
        for round in 0..rounds {
            let at = usize::from(round % 2);
            let user = &users[at];
            for handle in &handles {
                let begun = Instant::now();
                let lease = vmem.device_mut_on(handle, &user.stream).await.context("a lease")?;
                if round > 0 {
                    between += begun.elapsed();
                }
                // SAFETY: used by the kernel on the stream of the lease, before that ends.
                let address = unsafe { lease.device_ptr() };
                // SAFETY: as above.
                unsafe { user.add(address, len, 1, &user.stream) }?;
                lease.finish().await?;
                let residency = vmem.residency(handle)?;
                let is_there = residency.is_in(tiers[at]) && !residency.is_in(tiers[1 - at]);
                ensure!(is_there, "round {round}: {residency:?}");
            }
        }
        // The last ones were written by the second device: half of them go on to the first.
        let (first, second) = handles.split_at(count / 2);
        for handle in first {
            let read = kernel_reads(&vmem, &users[0], handle).await?;
            ensure!(read.len() == len, "the length of an object");
        }
        vmem.demote(&second[0], DISK).await?;
        let buffer = users[1].allocate(count * len)?;
        let stream = &users[1].stream;
        // SAFETY: memory of the second device, which outlives the target.
        let target = unsafe { DeviceTarget::from_raw(buffer.address, buffer.len, stream) };
        let pieces: Vec<_> =
            handles.iter().enumerate().map(|(n, handle)| (handle, 0..len, n * len)).collect();
        vmem.gather(&pieces, &target).await.context("a gather on the second device")?;
        let found = buffer.read(stream)?;
        for (object, found) in found.chunks(len).enumerate() {
            let expected = plus(&bytes(object as u64, 0, len), rounds);
            ensure!(found == expected, "object {object}, gathered");
            ensure!(vmem.read(&handles[object]).await? == expected, "object {object}, read");
        }
        drop((target, pieces));
        drop((buffer, users));
        end(env, vmem, handles).await?;
        let mut figures = json!({ "devices": devices, "between_devices": "over host memory" });
        if env.emulator.is_none() {
            let moved = usize::from(rounds - 1) * count * len;
            let rate = moved as f64 / between.as_secs_f64() / (1 << 30) as f64;
            figures["GiB_a_second_between_devices"] = rate.into();
        }
        passed(figures)
    })
}
