//! Which driver serves, found out by trying.
//!
//! Invariant: what is chosen has moved bytes on the store's own file system, in the way in which it
//! will; what was wished for and refused is told, with its cause. Called when the store opens.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread::available_parallelism;

use vmem_core::{IoDriver, MemoryTier, VirtualMemoryError};

use super::direct::Alignment;
use super::{BlockingDriver, BlockingOptions, Driver};
use crate::directory::StoreDirectory;

/// The driver of a store, and why not another one.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) kind: IoDriver,
    pub(crate) direct: bool,
    pub(crate) notes: Vec<Arc<str>>,
}

/// Takes `data`, a file of `directory`, into the driver that was asked for, or into the best that works.
/// A file that has extents already keeps its `block_bytes`.
///
/// # Errors
///
/// `TierNotAvailable` for a driver that was asked for and is not to be had; `Io` if descriptors or
/// space for the trials are.
pub(crate) fn choose(
    asked: IoDriver,
    data: File,
    directory: &StoreDirectory,
    block_bytes: Option<u32>,
) -> Result<Chosen, VirtualMemoryError> {
    let scratch = || directory.scratch();
    let io = |error| VirtualMemoryError::io("trying the disk drivers", error);
    let mut notes: Vec<Arc<str>> = Vec::new();
    let probed = scratch().and_then(|scratch| Alignment::probe(&data, &scratch));
    let fits = probed.and_then(|alignment| match block_bytes {
        Some(block) if block < alignment.block_bytes() => {
            super::direct::set_direct(&data, false)?;
            let sector = alignment.block_bytes();
            let why = format!("the store has blocks of {block} bytes, the device of {sector}");
            Err(io::Error::other(why))
        }
        _ => Ok(alignment),
    });
    let alignment = fits.unwrap_or_else(|error| {
        notes.push(format!("direct I/O (O_DIRECT): {error}").into());
        Alignment::NONE
    });
    let block_bytes = block_bytes.unwrap_or(alignment.block_bytes());
    let candidates: &[IoDriver] = match asked {
        // Seen with Linux 6.18: the kernel waits for the answer of the server inside of the call that submits,
        // and goes on by itself after a short direct transfer, at the wrong offset.
        IoDriver::Auto if directory.is_fuse() => {
            notes.push("io_uring: not trusted with a FUSE file system".into());
            &[IoDriver::Blocking]
        }
        IoDriver::Auto => &[IoDriver::Reactor, IoDriver::TokioUring, IoDriver::Blocking],
        _ => &[asked],
    };
    for &kind in candidates {
        let trial = scratch().map_err(io)?;
        let data = data.try_clone().map_err(io)?;
        match make(kind, data, trial, alignment, block_bytes) {
            Ok(driver) => {
                let direct = alignment.is_direct();
                return Ok(Chosen { driver, kind, direct, notes });
            }
            Err(error) if asked == IoDriver::Auto => {
                notes.push(format!("{kind} driver: {}", explained(&error)).into());
            }
            Err(error) => {
                let reason = format!(
                    "the {kind} driver: {}; `IoDriver::Auto` takes what works",
                    explained(&error)
                );
                return Err(VirtualMemoryError::TierNotAvailable {
                    tier: MemoryTier::Disk,
                    reason: reason.into(),
                });
            }
        }
    }
    Err(io(io::ErrorKind::Unsupported.into()))
}

/// Tries the driver on `trial`, and makes it over `data`.
fn make(
    kind: IoDriver,
    data: File,
    trial: File,
    alignment: Alignment,
    block_bytes: u32,
) -> io::Result<Arc<dyn Driver>> {
    #[cfg(target_os = "linux")]
    use super::{RingOptions, reactor, tokio_uring};
    if alignment.is_direct() {
        super::direct::set_direct(&trial, true)?;
    }
    let cores = available_parallelism().map_or(1, usize::from);
    match kind {
        #[cfg(target_os = "linux")]
        IoDriver::Reactor => {
            reactor::prove(trial, alignment)?;
            let rings = cores.min(8);
            let options = RingOptions { alignment, rings, block_bytes, ..Default::default() };
            Ok(Arc::new(super::ReactorDriver::new(data, options)?))
        }
        #[cfg(target_os = "linux")]
        IoDriver::TokioUring => {
            // A bare ring first: where submission is denied, tokio-uring waits for ever.
            reactor::prove(trial.try_clone()?, alignment)?;
            trial.set_len(0)?;
            tokio_uring::prove(trial, alignment)?;
            let rings = (cores / 2).clamp(1, 4);
            let options = RingOptions { alignment, rings, block_bytes, ..Default::default() };
            Ok(Arc::new(super::TokioUringDriver::new(data, options)?))
        }
        IoDriver::Blocking => {
            let options = BlockingOptions { alignment, block_bytes, ..Default::default() };
            Ok(Arc::new(BlockingDriver::new(data, options)))
        }
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// An error with its usual cause and the remedy.
fn explained(error: &io::Error) -> String {
    let hint = match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::PERM | rustix::io::Errno::ACCESS | rustix::io::Errno::NOSYS) => {
            match denied_by_sysctl() {
                Some(value) => format!(" (kernel.io_uring_disabled is {value}: set it to 0)"),
                None => " (a seccomp profile may deny io_uring, as containers' default ones do, \
                         or the kernel lacks it: allow io_uring_setup, _enter and _register)"
                    .to_owned(),
            }
        }
        Some(rustix::io::Errno::NOMEM) => " (raise RLIMIT_MEMLOCK, `ulimit -l`)".to_owned(),
        Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => {
            " (raise RLIMIT_NOFILE, `ulimit -n`)".to_owned()
        }
        _ => String::new(),
    };
    format!("{error}{hint}")
}

/// The setting that denies io_uring, if it does.
fn denied_by_sysctl() -> Option<String> {
    let value = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?;
    let value = value.trim();
    (value != "0").then(|| value.to_owned())
}
