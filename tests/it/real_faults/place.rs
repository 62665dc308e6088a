//! Places to fail in: mounts of a thread's own, and an ext4 on a loop device.
//!
//! Invariant: everything here ends with the thread that made it. Mounts lie in a namespace that
//! ends with its last thread; a loop device is detached by the kernel at its last close. Called by
//! the tests of real faults.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::OFlags;
use rustix::ioctl::{Setter, ioctl};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;
use tempfile::TempDir;

/// What stopped us, for a `SKIPPED` line.
pub(crate) type Refused = String;

/// Gives the calling thread, and those that it starts, mounts that no other process sees.
pub(crate) fn own_mounts() -> Result<(), Refused> {
    // SAFETY: only with `FILES` is this unsafe, since other threads' descriptors would be lost.
    let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
    unshared.map_err(|error| format!("no mount namespace (not root?): {error}"))?;
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    rustix::mount::mount_change("/", private).map_err(|error| format!("mounts are shared: {error}"))
}

/// A file as a block device.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    /// Holds the device, which is detached with its last user.
    _held: File,
    path: PathBuf,
}

impl LoopDevice {
    /// A device of `bytes`, whose sectors have `sector` bytes.
    pub(crate) fn new(bytes: u64, sector: u32) -> Result<Self, Refused> {
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        let image = dir.path().join("image");
        let file = File::create(&image).map_err(|error| error.to_string())?;
        file.set_len(bytes).map_err(|error| error.to_string())?;
        let sector = sector.to_string();
        let path = run("losetup", &["--find", "--show", "--sector-size", &sector], &[&image])?;
        let path = PathBuf::from(path.trim());
        let held = File::open(&path);
        // Of a device in use this only says that it is to go with its last user.
        run("losetup", &["--detach"], &[&path])?;
        let held = held.map_err(|error| error.to_string())?;
        // The file behind it has no name any more, and is freed with the device.
        Ok(LoopDevice { _held: held, path })
    }
}

/// An ext4 of its own. Dropping it unmounts it.
#[derive(Debug)]
pub(crate) struct Ext4 {
    device: LoopDevice,
    mountpoint: TempDir,
}

/// How an ext4 dies: the argument of its ioctl.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shutdown {
    /// Everything is written first.
    Default = 0,
    /// The journal is written first.
    LogFlush = 1,
    /// At once, as in a power cut.
    NoLogFlush = 2,
}

impl Ext4 {
    /// Makes and mounts one of `bytes`, with blocks of 4096 bytes on sectors of `sector`.
    pub(crate) fn mount(bytes: u64, sector: u32) -> Result<Self, Refused> {
        let device = LoopDevice::new(bytes, sector)?;
        run("mkfs.ext4", &["-q", "-F", "-b", "4096"], &[&device.path])?;
        let mountpoint = tempfile::tempdir().map_err(|error| error.to_string())?;
        let ext4 = Ext4 { device, mountpoint };
        ext4.attach().map_err(|error| format!("mount: {error}"))?;
        Ok(ext4)
    }

    pub(crate) fn path(&self) -> &Path {
        self.mountpoint.path()
    }

    fn attach(&self) -> io::Result<()> {
        let source = &self.device.path;
        Ok(rustix::mount::mount(source, self.path(), "ext4", MountFlags::empty(), None)?)
    }

    /// The file system refuses everything from now on.
    pub(crate) fn shut_down(&self, how: Shutdown) -> io::Result<()> {
        const EXT4_IOC_SHUTDOWN: u32 = 0x8004_587d;
        let root = File::open(self.path())?;
        // SAFETY: the opcode takes a pointer to one u32, and `Setter` brings one.
        let setter = unsafe { Setter::<{ EXT4_IOC_SHUTDOWN }, u32>::new(how as u32) };
        // SAFETY: as above; the descriptor is that of a directory of this file system.
        Ok(unsafe { ioctl(&root, setter) }?)
    }

    /// The device, as cgroups name it.
    fn device_number(&self) -> io::Result<String> {
        let device = std::fs::metadata(&self.device.path)?.rdev();
        Ok(format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)))
    }

    /// Unmounts and mounts again, which replays the journal.
    pub(crate) fn remount(&self) -> io::Result<()> {
        // Not lazily: it is the same device, and must be given back before.
        let mut tries = 0;
        while let Err(error) = rustix::mount::unmount(self.path(), UnmountFlags::empty()) {
            // A process that is being started has our descriptors for a moment.
            if error != rustix::io::Errno::BUSY || tries > 200 {
                return Err(error.into());
            }
            tries += 1;
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        self.attach()
    }

    /// Whether direct I/O of half a sector is refused, as a device with sectors of 4096 must.
    pub(crate) fn refuses_small_direct_io(&self) -> io::Result<bool> {
        let path = self.path().join("probe");
        std::fs::write(&path, vec![1; 8192])?;
        let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
        let file = rustix::fs::open(&path, flags, rustix::fs::Mode::empty())?;
        // 4096-aligned memory, so that the length alone is at fault.
        let mut memory = vec![0; 8192];
        let start = memory.as_ptr().align_offset(4096);
        let refused = rustix::io::pread(&file, &mut memory[start..start + 512], 512);
        std::fs::remove_file(&path)?;
        Ok(refused == Err(rustix::io::Errno::INVAL))
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path(), UnmountFlags::DETACH);
    }
}

/// A control group (of version 1) whose threads are slow on one device.
#[derive(Debug)]
pub(crate) struct SlowGroup(PathBuf);

/// Where the groups are.
const BLKIO: &str = "/sys/fs/cgroup/blkio";
/// What their names begin with, before the number of the process.
const GROUP: &str = "vmem-faults-";

impl SlowGroup {
    /// A group that reads and writes this many bytes a second, each, on the device of `ext4`.
    pub(crate) fn new(ext4: &Ext4, bytes_per_second: u64) -> Result<Self, Refused> {
        let why = |error: io::Error| format!("blkio of cgroup v1: {error}");
        sweep();
        let path = Path::new(BLKIO).join(format!("{GROUP}{}", std::process::id()));
        std::fs::create_dir(&path).map_err(why)?;
        let group = SlowGroup(path);
        let rule = format!("{} {bytes_per_second}", ext4.device_number().map_err(why)?);
        for way in ["read", "write"] {
            let file = group.0.join(format!("blkio.throttle.{way}_bps_device"));
            std::fs::write(file, &rule).map_err(why)?;
        }
        Ok(group)
    }

    /// Takes the calling thread in, and the threads that it starts from now on.
    pub(crate) fn join(&self) -> io::Result<()> {
        let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
        std::fs::write(self.0.join("tasks"), thread)
    }

    /// Bytes that the group has moved on throttled devices.
    pub(crate) fn moved_bytes(&self) -> u64 {
        let file = self.0.join("blkio.throttle.io_service_bytes");
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let total = text.lines().rev().find_map(|line| line.strip_prefix("Total "));
        total.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0)
    }
}

impl Drop for SlowGroup {
    fn drop(&mut self) {
        // Threads of the kernel leave a little later than those that they worked for.
        for _ in 0..200 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        eprintln!("{} stays: it has threads", self.0.display());
    }
}

/// Removes the groups of processes that were killed: of all that is made here these alone stay.
fn sweep() {
    for entry in std::fs::read_dir(BLKIO).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(process) = name.to_str().and_then(|name| name.strip_prefix(GROUP)) else {
            continue;
        };
        if !Path::new("/proc").join(process).exists() {
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

/// Runs a tool of the system; what it printed, or why not.
fn run(tool: &str, args: &[&str], paths: &[&Path]) -> Result<String, Refused> {
    let output = Command::new(tool).args(args).args(paths).output();
    let output = output.map_err(|error| format!("{tool}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{tool}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}
