//! Device memory as pages: free memory that lies in pieces serves whatever fits it.
//!
//! Invariant: what others hold, or use in a kernel, keeps its bytes while pages move. Called by
//! `scenarios`.

use super::*;
use crate::user::Paging;
use rand::Rng;
use rand::rngs::SmallRng;

/// The lengths of objects in the second half: 16 KiB to 7 MiB.
const SHORTEST: usize = 16 * KIB;
const LONGEST: usize = 7 * MIB;

/// An object, and what kernels have added to its bytes.
struct Object {
    handle: VMemHandle,
    number: u64,
    added: u8,
}

impl Object {
    fn bytes(&self) -> Vec<u8> {
        plus(&bytes(self.number, 0, self.handle.len()), self.added)
    }
}

/// Every other page is pinned, and an object of half the memory comes to the others; then lengths,
/// kernels, promotions and demotions at random; then the budget is halved and doubled again.
pub(super) fn rearranged(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let page = match Paging::find(&user)? {
        Ok(paging) => paging.page_bytes()?,
        Err(why) => return Ok(Outcome::Skipped(why)),
    };
    env.block_on(async {
        let vram = (32 * page).max(64 * MIB);
        let vmem = env.store(vram, 4 * vram, |set| set.max_pinned(1.0)).await?;
        let evicted = in_pieces(&vmem, &user, vram, page).await.context("memory in pieces")?;
        let mapped = || env.emulator.as_ref().map(|emulator| emulator.calls("cuMemMap"));
        let before = mapped();
        let steps = env.scaled(2000, 200);
        let objects = at_random(env, &vmem, &user, vram, steps).await.context("at random")?;
        let moved = mapped().zip(before).map(|(now, before)| now - before);
        ensure!(moved.is_none_or(|moved| moved > 0), "no page moved");
        let evictions = vmem.stats().evictions;
        let (shrunk, grown) = resized(&vmem, &user, &objects).await.context("another budget")?;
        let count = objects.len();
        drop(user);
        end(env, vmem, objects.into_iter().map(|object| object.handle).collect()).await?;
        if let Some(emulator) = &env.emulator {
            given_back(emulator).await?;
        }
        passed(json!({
            "vram_bytes": vram, "page_bytes": page, "evictions_for_half_of_the_memory": evicted,
            "objects": count, "steps": steps, "evictions": evictions, "pages_moved": moved,
            "halved_ms": shrunk.as_secs_f64() * 1e3, "doubled_ms": grown.as_secs_f64() * 1e3,
        }))
    })
}

/// Returns how much was evicted for an object that fits what is free.
async fn in_pieces(vmem: &VirtualMemory, user: &User, vram: usize, page: usize) -> Result<u64> {
    let mut handles = Vec::new();
    for object in 0..(vram / page) as u64 {
        let handle = vmem.put(bytes(object, 0, page), HOST).await?;
        vmem.promote(&handle, VRAM).await?;
        handles.push(handle);
    }
    ensure!(vmem.stats().vram.used_bytes == vram as u64, "it is not full: {:?}", vmem.stats().vram);
    let mut pins = Vec::new();
    for handle in handles.iter().step_by(2) {
        pins.push(vmem.pin(handle, VRAM).await?);
    }
    for handle in handles.iter().skip(1).step_by(2) {
        vmem.demote(handle, HOST).await?;
    }
    let longest = vmem.stats().vram.largest_free_bytes;
    ensure!(
        longest == vram as u64 / 2,
        "{longest} bytes are the longest object that fits, of {}: memory is no pages",
        vram / 2
    );
    let before = vmem.stats().evictions;
    let large = vmem.put(bytes(1000, 0, vram / 2), HOST).await?;
    vmem.promote(&large, VRAM).await.context("an object of half the memory")?;
    let evicted = vmem.stats().evictions - before;
    ensure!(evicted == 0, "{evicted} were evicted, though half of the memory was free");
    let found = kernel_reads(vmem, user, &large).await?;
    ensure!(found == bytes(1000, 0, vram / 2), "the large object on the device");
    ensure!(vmem.residency(&large)?.vram, "it left the device");
    // The pinned ones, between which its pages were, and the others over it.
    for step in [0, 1] {
        if step == 1 {
            drop(std::mem::take(&mut pins));
        }
        for (object, handle) in handles.iter().enumerate().skip(step).step_by(2) {
            let found = kernel_reads(vmem, user, handle).await?;
            ensure!(found == bytes(object as u64, 0, page), "object {object} on the device");
        }
    }
    ensure!(vmem.read(&large).await? == bytes(1000, 0, vram / 2), "the large object");
    for handle in handles.into_iter().chain([large]) {
        vmem.free(handle).await?;
    }
    Ok(evicted)
}

/// Objects of twice the memory, with a lease of a kernel or a move in each step.
async fn at_random(
    env: &Env,
    vmem: &VirtualMemory,
    user: &User,
    vram: usize,
    steps: usize,
) -> Result<Vec<Object>> {
    let mut rng = env.rng();
    let streams = [user.context.new_stream()?, user.context.new_stream()?];
    let mut objects = Vec::new();
    let mut total = 0;
    while total < 2 * vram {
        let number = 2000 + objects.len() as u64;
        let len = length(&mut rng);
        let handle = vmem.put(bytes(number, 0, len), HOST).await?;
        vmem.promote(&handle, VRAM).await?;
        objects.push(Object { handle, number, added: 0 });
        total += len;
    }
    for step in 0..steps {
        let at = rng.random_range(0..objects.len());
        let object = &mut objects[at];
        match rng.random_range(0..10) {
            0..5 => {
                let stream = &streams[rng.random_range(0..streams.len())];
                let lease = vmem.device_mut_on(&object.handle, stream).await?;
                // SAFETY: used by the kernel on the stream of the lease, before that is dropped.
                let address = unsafe { lease.device_ptr() };
                // SAFETY: as above.
                unsafe { user.add(address, object.handle.len(), 1, stream) }?;
                object.added = object.added.wrapping_add(1);
            }
            5..8 => vmem.promote(&object.handle, VRAM).await?,
            8 => vmem.demote(&object.handle, HOST).await?,
            _ => {
                let read = vmem.read(&object.handle).await?;
                ensure!(read == object.bytes(), "step {step}: object {at}");
            }
        }
    }
    for (at, object) in objects.iter().enumerate() {
        let is_there = vmem.residency(&object.handle)?.vram;
        ensure!(vmem.read(&object.handle).await? == object.bytes(), "object {at}");
        if is_there {
            let found = kernel_reads(vmem, user, &object.handle).await?;
            ensure!(found == object.bytes(), "object {at} on the device");
        }
    }
    Ok(objects)
}

/// Half of the memory goes back to the device and comes again, with objects used meanwhile; how
/// long each took.
async fn resized(
    vmem: &VirtualMemory,
    user: &User,
    objects: &[Object],
) -> Result<(Duration, Duration)> {
    let all = vmem.stats().vram.capacity_bytes;
    let free = || {
        user.context.bind_to_thread()?;
        anyhow::Ok(cudarc::driver::result::mem_get_info()?.0 as u64)
    };
    let mut took = [Duration::ZERO; 2];
    let mut free_before = free()?;
    for (place, wanted) in [all / 2, all].into_iter().enumerate() {
        let begun = std::time::Instant::now();
        let changed = async {
            let capacity = vmem.set_vram_capacity(VRAM, wanted).await?;
            took[place] = begun.elapsed();
            anyhow::Ok(capacity)
        };
        let used = async {
            for (at, object) in objects.iter().enumerate() {
                let found = kernel_reads(vmem, user, &object.handle).await?;
                ensure!(found == object.bytes(), "object {at} while the budget changes");
            }
            Ok(())
        };
        let (capacity, ()) = futures::try_join!(changed, used)?;
        ensure!(capacity == wanted, "{capacity} bytes in place of {wanted}");
        let now = free()?;
        let differs = now.abs_diff(free_before);
        // Others may have changed it by a little.
        ensure!(differs.abs_diff(all / 2) <= all / 8, "{free_before} bytes were free, {now} are");
        free_before = now;
    }
    for (at, object) in objects.iter().enumerate() {
        ensure!(vmem.read(&object.handle).await? == object.bytes(), "object {at}");
    }
    Ok((took[0], took[1]))
}

/// As many short ones as long ones, by their logarithm.
fn length(rng: &mut SmallRng) -> usize {
    let ratio = LONGEST as f64 / SHORTEST as f64;
    (SHORTEST as f64 * ratio.powf(rng.random::<f64>())) as usize
}

/// The driver has everything back, soon after the store was closed.
async fn given_back(emulator: &vmem_cuda_emulator::Emulator) -> Result<()> {
    let left = || {
        ["created", "mapped_bytes", "reserved_bytes"]
            .into_iter()
            .filter(|gauge| emulator.counter(gauge) > 0)
            .collect::<Vec<_>>()
    };
    for _ in 0..5000 {
        if left().is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    anyhow::bail!("the driver still has {:?}", left())
}
