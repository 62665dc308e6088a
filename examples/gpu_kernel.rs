//! A kernel over more data than device memory holds: each object is prefetched before its turn, is
//! changed on the device, and goes when others need the space.
//!
//! ```text
//! cargo run --release --example gpu_kernel                  # on a machine with an NVIDIA driver
//! cargo run --release --example gpu_kernel -- --emulated    # anywhere; says nothing about speed
//! ```

#![allow(unsafe_code, reason = "launching a kernel is")]

use std::ffi::CString;
use std::sync::Arc;

use anyhow::{Context, bail};
use bytesize::ByteSize;
use clap::Parser;
use vmem::gpu::VramExt;
use vmem::gpu::cudarc::driver::{CudaContext, CudaStream, result, sys};
use vmem::{MemoryTier, VirtualMemoryConfig};
use vmem_cuda_emulator::Emulator;

/// Adds a number to every byte. As text, so that no toolkit is needed; the emulator knows it by its
/// name.
const KERNELS: &str = "
.version 7.0
.target sm_52
.address_size 64
.visible .entry vmem_add(.param .u64 start, .param .u64 count, .param .u8 value)
{
    .reg .pred %p<2>;
    .reg .b16 %rs<4>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<7>;
    ld.param.u64 %rd1, [start];
    ld.param.u64 %rd2, [count];
    ld.param.u8 %rs1, [value];
    cvta.to.global.u64 %rd3, %rd1;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mul.wide.u32 %rd4, %r1, %r2;
    cvt.u64.u32 %rd5, %r3;
    add.s64 %rd4, %rd4, %rd5;
    setp.ge.u64 %p1, %rd4, %rd2;
    @%p1 bra DONE;
    add.s64 %rd6, %rd3, %rd4;
    ld.global.u8 %rs2, [%rd6];
    add.s16 %rs3, %rs2, %rs1;
    st.global.u8 [%rd6], %rs3;
DONE:
    ret;
}
";

/// Threads of a block.
const BLOCK: u32 = 256;

#[derive(Parser)]
struct Options {
    /// Uses the emulated driver.
    #[arg(long)]
    emulated: bool,
    /// Device memory that the store may use.
    #[arg(long, default_value = "16MiB")]
    vram: ByteSize,
    /// How many objects there are.
    #[arg(long, default_value_t = 64)]
    objects: usize,
    /// The size of each.
    #[arg(long, default_value = "1MiB")]
    size: ByteSize,
    /// Objects that are prefetched before their turn.
    #[arg(long, default_value_t = 4)]
    prefetched: usize,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let _emulator = match options.emulated {
        true => Some(Emulator::load().map_err(anyhow::Error::msg)?),
        false => None,
    };
    let total = options.size.as_u64() * options.objects as u64;
    let config = VirtualMemoryConfig::builder()
        .vram_capacity(options.vram.as_u64())
        .host_capacity((total / 2).max(64 << 20))
        .disk_capacity(2 * total + (64 << 20));
    let vmem = vmem::open(config.build()?).await?;
    println!("{}", vmem.capabilities());
    if vmem.capabilities().vram.is_none() {
        println!("no VRAM tier here: try --emulated");
        return Ok(());
    }

    let size = options.size.as_u64() as usize;
    let byte = |object: usize, at: usize| (at >> 5) as u8 ^ object as u8;
    let mut objects = Vec::new();
    for object in 0..options.objects {
        let bytes: Vec<u8> = (0..size).map(|at| byte(object, at)).collect();
        objects.push(vmem.put(bytes, MemoryTier::Host).await?);
    }
    println!("{} in {} objects, {} of VRAM", ByteSize(total), objects.len(), options.vram);

    let stream = CudaContext::new(0)?.new_stream()?;
    let add = kernel(&stream, "vmem_add")?;
    let begun = std::time::Instant::now();
    for (at, object) in objects.iter().enumerate() {
        if let Some(next) = objects.get(at + options.prefetched) {
            vmem.prefetch(next, MemoryTier::Vram).detach();
        }
        let lease = vmem.device_mut_on(object, &stream).await?;
        launch(add, &lease, 1)?;
        // The kernel may still run: its memory stays, and what it writes is published when it has
        // ended.
        drop(lease);
    }
    let mut different = 0;
    for (number, object) in objects.iter().enumerate() {
        let bytes = vmem.read(object).await?;
        let right = |(at, &read): (usize, &u8)| read == byte(number, at).wrapping_add(1);
        different += usize::from(!bytes.iter().enumerate().all(right));
    }
    println!("changed on the device and read back in {:?}", begun.elapsed());
    let stats = vmem.stats();
    println!(
        "up {}, down {}, {} left device memory for others",
        ByteSize(stats.host_to_vram_bytes),
        ByteSize(stats.vram_to_host_bytes),
        stats.evictions
    );
    drop(objects);
    vmem.close().await?;
    if different > 0 {
        bail!("{different} objects differ");
    }
    println!("every byte is as it should be");
    Ok(())
}

/// Loads a kernel, which stays loaded.
fn kernel(stream: &Arc<CudaStream>, name: &str) -> anyhow::Result<sys::CUfunction> {
    stream.context().bind_to_thread()?;
    let text = CString::new(KERNELS)?;
    let name = CString::new(name)?;
    // SAFETY: the text ends with a zero, and is PTX.
    let module = unsafe { result::module::load_data(text.as_ptr().cast()) };
    let module = module.context("loading the kernels")?;
    // SAFETY: the module was loaded just now, and is never unloaded.
    unsafe { result::module::get_function(module, name) }.context("finding the kernel")
}

/// Adds `value` to every byte of an object.
fn launch(
    add: sys::CUfunction,
    lease: &vmem::gpu::DeviceLeaseMut,
    value: u8,
) -> anyhow::Result<()> {
    // SAFETY: it is used by the kernel that is launched here, on the stream of the lease.
    let mut start = unsafe { lease.device_ptr() };
    let mut count = lease.len() as u64;
    let mut value = value;
    let mut arguments = [(&raw mut start).cast(), (&raw mut count).cast(), (&raw mut value).cast()];
    let grid = ((lease.len() as u32).div_ceil(BLOCK), 1, 1);
    let stream = lease.stream();
    stream.context().bind_to_thread()?;
    // SAFETY: the arguments are those of the kernel, which stays within the object.
    unsafe {
        result::launch_kernel(add, grid, (BLOCK, 1, 1), 0, stream.cu_stream(), &mut arguments)
    }
    .context("launching the kernel")
}
