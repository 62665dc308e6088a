//! What a user of the store does on the device: its own context, streams, memory, kernels.
//!
//! Invariant: memory is freed by its owner only, after everything on the device has ended. Unsafe
//! code of this crate is here, where leases are lent to kernels, in `bars::raw`, and in `contract`,
//! which plays a careless user. Called by the parts.

#![allow(unsafe_code)]

mod batch;
mod machine;
mod memory;
mod pages;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::{CudaContext, CudaStream, result, sys};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use vmem::{GpuSelection, VirtualMemory, VirtualMemoryConfig, VirtualMemoryConfigBuilder};
use vmem_cuda_emulator::Emulator;

pub(crate) use batch::BatchCopy;
pub(crate) use machine::{
    capture_until, current_context, describe, processor_time, without_context,
};
pub(crate) use memory::{DeviceMemory, Pinned};
pub(crate) use pages::{Pages, Paging};

use crate::Options;

/// The kernels, for any card.
const KERNELS: &str = include_str!("kernels.ptx");
/// Threads of a block, and blocks at most.
const BLOCK: u32 = 256;
const GRID_MAX: u64 = 4096;

/// Where a part runs.
pub(crate) struct Env {
    /// The emulated driver, if that is where.
    pub(crate) emulator: Option<Emulator>,
    pub(crate) device: usize,
    pub(crate) seed: u64,
    dir: Option<PathBuf>,
}

impl Env {
    /// Loads the emulated driver, if that is asked for, or finds the card.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub(crate) fn open(options: &Options) -> Result<Self> {
        let emulator = match options.emulated {
            true => Some(Emulator::load().map_err(|why| anyhow!("the emulated driver: {why}"))?),
            false => None,
        };
        let opened = vmem_gpu::open_device(&GpuSelection::Device(options.device), Some(16 << 20));
        let opened = opened.context("no card: see --emulated")?;
        ensure!(opened.device.is_some(), "no card: {}", opened.reason);
        Ok(Env { emulator, device: options.device, seed: options.seed, dir: options.dir.clone() })
    }

    /// The folder that was asked for.
    pub(crate) fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    pub(crate) fn rng(&self) -> SmallRng {
        SmallRng::seed_from_u64(self.seed)
    }

    /// A folder for files, on the disk that is to be used.
    ///
    /// # Errors
    ///
    /// If it cannot be made.
    pub(crate) fn folder(&self) -> Result<tempfile::TempDir> {
        let made = match &self.dir {
            Some(dir) => tempfile::tempdir_in(dir),
            None => tempfile::tempdir(),
        };
        made.context("making a folder")
    }

    /// How much smaller everything is on the emulated driver, which copies with a processor.
    pub(crate) fn scaled(&self, on_a_card: usize, emulated: usize) -> usize {
        if self.emulator.is_some() { emulated } else { on_a_card }
    }

    /// Runs a part that awaits, on two workers.
    ///
    /// # Errors
    ///
    /// Those of the part.
    pub(crate) fn block_on<T>(&self, part: impl Future<Output = Result<T>>) -> Result<T> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).enable_all().build().context("a runtime")?;
        let outcome = runtime.block_on(part);
        runtime.shutdown_timeout(Duration::from_secs(20));
        outcome
    }

    /// A store with so much of each kind of memory, in bytes.
    ///
    /// # Errors
    ///
    /// If it does not open, or without VRAM.
    pub(crate) async fn store(
        &self,
        vram: usize,
        host: usize,
        set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
    ) -> Result<VirtualMemory> {
        let mut builder = VirtualMemoryConfig::builder()
            .gpu(GpuSelection::Device(self.device))
            .vram_capacity(vram as u64)
            .host_capacity(host as u64)
            .disk_capacity(4 * host as u64 + (1 << 30))
            .wait_timeout(Duration::from_secs(30));
        if let Some(dir) = &self.dir {
            builder = builder.disk_path(dir.join(format!("store-{}", std::process::id())));
        }
        let vmem = vmem::open(set(builder).build()?).await.context("opening a store")?;
        ensure!(vmem.capabilities().vram.is_some(), "{}", vmem.capabilities().vram_reason);
        Ok(vmem)
    }

    /// What the emulated driver saw that is against its rules.
    pub(crate) fn rules_broken(&self) -> Vec<String> {
        self.emulator.as_ref().map(Emulator::violations).unwrap_or_default()
    }

    /// The user.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn user(&self) -> Result<User> {
        User::new(self.device)
    }

    /// A user of another device.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn user_on(device: usize) -> Result<User> {
        User::new(device)
    }
}

/// A stream of a context object of its own.
///
/// # Errors
///
/// What the driver says.
pub(crate) fn stream(device: usize) -> Result<Arc<CudaStream>> {
    let context = CudaContext::new(device).context("a context")?;
    // SAFETY: the parts order what they do on several streams themselves. Otherwise the first
    // stream would wait for everything in the context.
    unsafe { context.disable_event_tracking() };
    context.new_stream().context("a stream")
}

/// Another user in the process, with its own context object.
pub(crate) struct User {
    pub(crate) context: Arc<CudaContext>,
    pub(crate) stream: Arc<CudaStream>,
    module: sys::CUmodule,
    functions: RefCell<HashMap<&'static str, sys::CUfunction>>,
}

// SAFETY: what the driver gave it is good on every thread, and the context is bound before each
// call.
unsafe impl Send for User {}

impl User {
    fn new(device: usize) -> Result<Self> {
        let stream = stream(device)?;
        let context = stream.context().clone();
        let text = CString::new(KERNELS)?;
        context.bind_to_thread()?;
        // SAFETY: a text that ends with a zero.
        let module = unsafe { result::module::load_data(text.as_ptr().cast()) };
        let module = module.context("loading the kernels")?;
        let user = User { context, stream, module, functions: RefCell::default() };
        // The first launch may wait for whatever the device does then.
        user.spin(Duration::ZERO, &user.stream)?;
        user.stream.synchronize().context("a first kernel")?;
        Ok(user)
    }

    /// Launches one of `kernels.ptx` over about `count` bytes, or things.
    ///
    /// # Errors
    ///
    /// What the driver says.
    ///
    /// # Safety
    ///
    /// The arguments are those of the kernel, and what they point to stays until it has ended.
    pub(crate) unsafe fn launch(
        &self,
        name: &'static str,
        arguments: &[u64],
        count: u64,
        stream: &CudaStream,
    ) -> Result<()> {
        self.context.bind_to_thread()?;
        let known = self.functions.borrow().get(name).copied();
        let function = match known {
            Some(function) => function,
            None => {
                // SAFETY: the module is never unloaded.
                let found =
                    unsafe { result::module::get_function(self.module, CString::new(name)?) };
                let found = found.with_context(|| format!("finding {name}"))?;
                self.functions.borrow_mut().insert(name, found);
                found
            }
        };
        let mut values = arguments.to_vec();
        let mut places: Vec<*mut c_void> =
            values.iter_mut().map(|value| (&raw mut *value).cast()).collect();
        let grid = count.div_ceil(u64::from(BLOCK)).clamp(1, GRID_MAX) as u32;
        let grid = (grid, 1, 1);
        let block = (BLOCK, 1, 1);
        // SAFETY: the caller promises that the arguments fit.
        let launched = unsafe {
            result::launch_kernel(function, grid, block, 0, stream.cu_stream(), &mut places)
        };
        launched.with_context(|| format!("launching {name}"))
    }

    /// Fills device memory.
    ///
    /// # Errors
    ///
    /// What the driver says.
    ///
    /// # Safety
    ///
    /// It is the caller's until the kernel has ended.
    pub(crate) unsafe fn fill(
        &self,
        at: u64,
        len: usize,
        value: u8,
        on: &CudaStream,
    ) -> Result<()> {
        // SAFETY: the caller promises it.
        unsafe { self.launch("vmem_fill", &[at, len as u64, u64::from(value)], len as u64, on) }
    }

    /// Adds to each byte of device memory.
    ///
    /// # Errors
    ///
    /// What the driver says.
    ///
    /// # Safety
    ///
    /// As [`fill`](Self::fill).
    pub(crate) unsafe fn add(&self, at: u64, len: usize, value: u8, on: &CudaStream) -> Result<()> {
        // SAFETY: the caller promises it.
        unsafe { self.launch("vmem_add", &[at, len as u64, u64::from(value)], len as u64, on) }
    }

    /// Copies device memory by a kernel.
    ///
    /// # Errors
    ///
    /// What the driver says.
    ///
    /// # Safety
    ///
    /// As [`fill`](Self::fill).
    pub(crate) unsafe fn copy(
        &self,
        to: u64,
        from: u64,
        len: usize,
        on: &CudaStream,
    ) -> Result<()> {
        // SAFETY: the caller promises it.
        unsafe { self.launch("vmem_copy", &[to, from, len as u64], len as u64, on) }
    }

    /// Keeps a stream busy for so long.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn spin(&self, time: Duration, on: &CudaStream) -> Result<()> {
        // SAFETY: it touches no memory.
        unsafe { self.launch("vmem_spin", &[time.as_nanos() as u64], 1, on) }
    }

    /// Device memory.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn allocate(&self, len: usize) -> Result<DeviceMemory> {
        self.context.bind_to_thread()?;
        // SAFETY: plain bytes, which are not read before they are written.
        let address = unsafe { result::malloc_sync(len) }.context("allocating device memory")?;
        Ok(DeviceMemory { address, len, pages: None, context: self.context.clone() })
    }

    /// Host memory that the device reaches directly.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn pinned(&self, len: usize) -> Result<Pinned> {
        self.context.bind_to_thread()?;
        // SAFETY: freed by the drop of what owns it.
        let address = unsafe { result::malloc_host(len, 0) }.context("allocating pinned memory")?;
        // SAFETY: just allocated, that long.
        unsafe { std::ptr::write_bytes(address.cast::<u8>(), 0, len) };
        let context = self.context.clone();
        Ok(Pinned { address: address.cast(), len, mapped: false, context })
    }

    /// Host memory that was mapped, and registered then.
    ///
    /// # Errors
    ///
    /// What the system or the driver says.
    pub(crate) fn registered(&self, len: usize) -> Result<Pinned> {
        self.context.bind_to_thread()?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, at an address of the system's choice.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        ensure!(address != libc::MAP_FAILED, "mapping memory");
        let portable = sys::CU_MEMHOSTREGISTER_PORTABLE;
        // SAFETY: just mapped, that long; unregistered and unmapped by the drop of what owns it.
        let registered = unsafe { sys::cuMemHostRegister_v2(address, len, portable) }.result();
        if let Err(error) = registered {
            // SAFETY: as above, and nothing uses it.
            unsafe { libc::munmap(address, len) };
            return Err(error).context("registering memory");
        }
        let context = self.context.clone();
        Ok(Pinned { address: address.cast(), len, mapped: true, context })
    }
}
