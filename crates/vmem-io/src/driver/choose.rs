//! Which driver serves, found out by trying.
//!
//! Invariant: what is chosen has moved bytes on the store's own file system, in the way in which it
//! will; what was wished for and refused is reported, with its cause. Called when the store opens.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread::available_parallelism;

use vmem_core::{IoDriver, MemoryTier, VirtualMemoryError};

use super::direct::Alignment;
use super::{BlockingDriver, BlockingOptions, Driver, RingOptions};
use crate::directory::StoreDirectory;

/// The driver of a store, and why not another one.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) kind: IoDriver,
    pub(crate) direct: bool,
    pub(crate) notes: Vec<Arc<str>>,
}

/// Takes `data`, a file of `directory`, into the driver that was asked for, or into the best that
/// works. A file that has extents already keeps its `block_bytes`.
///
/// # Errors
///
/// `TierNotAvailable` for a driver that was asked for and is unavailable; `Io` if descriptors or
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
        // Seen with Linux 6.18: the kernel waits for the answer of the server inside of the call
        // that submits, and continues a short direct transfer on its own, at the wrong offset.
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
                for error in &notes {
                    tracing::warn!(target: "vmem::fallback", %error, driver = %kind, "refused");
                }
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
                return Err(VirtualMemoryError::tier_not_available(MemoryTier::Disk, reason));
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
    if alignment.is_direct() {
        super::direct::set_direct(&trial, true)?;
    }
    prove(kind, trial, alignment)?;
    let cores = available_parallelism().map_or(1, usize::from);
    let rings = match kind {
        IoDriver::Reactor => cores.min(8),
        _ => (cores / 2).clamp(1, 4),
    };
    driver_over(kind, data, RingOptions { alignment, rings, block_bytes, ..Default::default() })
}

/// Moves bytes of `trial` by a ring, where the driver has rings.
#[cfg(target_os = "linux")]
fn prove(kind: IoDriver, trial: File, alignment: Alignment) -> io::Result<()> {
    match kind {
        IoDriver::Reactor => super::reactor::prove(trial, alignment),
        #[cfg(feature = "tokio-uring")]
        IoDriver::TokioUring => {
            // A bare ring first: where submission is denied, tokio-uring waits for ever.
            super::reactor::prove(trial.try_clone()?, alignment)?;
            trial.set_len(0)?;
            super::tokio_uring::prove(trial, alignment)
        }
        _ => Ok(()),
    }
}

#[cfg(not(target_os = "linux"))]
fn prove(_kind: IoDriver, _trial: File, _alignment: Alignment) -> io::Result<()> {
    Ok(())
}

/// The driver of this kind over `file`, which it owns from now on. The reactor driver needs the
/// runtime that it is made in; the blocking one has no rings and takes the other options.
///
/// # Errors
///
/// What the machine refuses; [`Unsupported`](io::ErrorKind::Unsupported) for a driver that this
/// build lacks, and for `Auto`, which asks for a trial.
///
/// ```
/// use vmem_core::IoDriver;
/// use vmem_io::driver::{RingOptions, driver_over};
///
/// let driver = driver_over(IoDriver::Blocking, tempfile::tempfile()?, RingOptions::default())?;
/// assert!(driver.describe().contains("blocking"));
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn driver_over(
    kind: IoDriver,
    file: File,
    options: RingOptions,
) -> io::Result<Arc<dyn Driver>> {
    match kind {
        #[cfg(target_os = "linux")]
        IoDriver::Reactor => Ok(Arc::new(super::ReactorDriver::new(file, options)?)),
        #[cfg(all(target_os = "linux", feature = "tokio-uring"))]
        IoDriver::TokioUring => Ok(Arc::new(super::TokioUringDriver::new(file, options)?)),
        IoDriver::Blocking => {
            let RingOptions { queue_max, alignment, block_bytes, .. } = options;
            let threads = BlockingOptions::default();
            let options = BlockingOptions { queue_max, alignment, block_bytes, ..threads };
            Ok(Arc::new(BlockingDriver::new(file, options)))
        }
        missing => Err(io::Error::new(io::ErrorKind::Unsupported, lacks(missing))),
    }
}

/// Why this build has no driver of this kind.
fn lacks(kind: IoDriver) -> &'static str {
    match kind {
        IoDriver::TokioUring if cfg!(target_os = "linux") => {
            "this build lacks the feature `tokio-uring`"
        }
        IoDriver::TokioUring | IoDriver::Reactor => "io_uring is of Linux alone",
        _ => "it is no driver of its own",
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
