//! What kind of file system a directory lies in.
//!
//! Invariant: a kind that is not known is none of those that are asked for. Called by
//! `StoreDirectory`.

use std::fs::File;
use std::io;

const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;
const FUSE: i64 = 0x6573_5546;

/// File systems whose locks all processes that see them share: ext, XFS, Btrfs, bcachefs, F2FS,
/// ZFS, overlayfs, tmpfs. Those that reach over a network may lock on each machine for itself.
const LOCAL: [i64; 8] =
    [0xef53, 0x5846_5342, 0x9123_683e, 0xca45_1a4e, 0xf2f5_2010, 0x2fc1_2fc1, 0x794c_7630, TMPFS];

/// Whether its files take memory and not disk.
pub(super) fn is_tmpfs(directory: &File) -> io::Result<bool> {
    Ok([TMPFS, RAMFS].contains(&kind_of(directory)?))
}

/// Whether a process serves it.
pub(super) fn is_fuse(directory: &File) -> io::Result<bool> {
    Ok(kind_of(directory)? == FUSE)
}

/// Whether a lock that is free here is held nowhere.
pub(super) fn has_local_locks(directory: &File) -> io::Result<bool> {
    Ok(LOCAL.contains(&kind_of(directory)?))
}

/// The number by which Linux knows the kind of the file system.
#[cfg(target_os = "linux")]
fn kind_of(directory: &File) -> io::Result<i64> {
    Ok(rustix::fs::fstatfs(directory)?.f_type as i64)
}

#[cfg(not(target_os = "linux"))]
fn kind_of(_directory: &File) -> io::Result<i64> {
    Ok(0)
}
