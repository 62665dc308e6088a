//! The server of the faulty file system: what it answers to each request of the kernel.
//!
//! Invariant: it holds the lock of the state for one request at a time, and never while it waits.
//! Called by the thread that the mount starts.
#![allow(unsafe_code)]

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, Config, Errno as FuseErrno, FileHandle, Filesystem, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use rustix::mount::MountFlags;
use vmem_io::DATA_FILE;
use vmem_testkit::OpKind;

use super::*;

pub(super) fn serve(served: Served, target: &Path, told: &Sender<io::Result<()>>) {
    match connect(served, target) {
        Err(error) => drop(told.send(Err(error))),
        Ok(session) => {
            drop(told.send(Ok(())));
            // It ends when the file system is unmounted, which is no error of the test.
            let _ = session.run();
        }
    }
}

/// On the server's thread: mounts over a connection that only the server has.
fn connect(served: Served, target: &Path) -> io::Result<Session<Served>> {
    // A table of this thread's own that never held what others have open: to close a copy of a file
    // would tell its file system so, which may be a faulty one that is just being unmounted.
    // SAFETY: this thread has just begun and uses no descriptor; no other thread sees those that it
    // opens after this.
    let own =
        unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_UNSHARE) };
    if own != 0 {
        return Err(io::Error::last_os_error());
    }
    let device: File = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let data = std::ffi::CString::new(data)?;
    let flags = MountFlags::NODEV | MountFlags::NOSUID;
    rustix::mount::mount("faulty", target, "fuse", flags, data.as_c_str())?;
    Session::from_fd(served, device.into(), SessionACL::Owner, Config::default())
}

impl Filesystem for Served {
    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.0.state.lock();
        match state.find(name).and_then(|ino| state.attr(ino)) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(FuseErrno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.state.lock().attr(ino.0) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(FuseErrno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.0.state.lock();
        if let Some(inode) = state.inodes.get_mut(&ino.0) {
            if let Some(mode) = mode {
                inode.perm = mode as u16 & 0o7777;
            }
            if let Some(size) = size {
                inode.bytes.resize(size as usize, 0);
            }
        }
        match state.attr(ino.0) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(FuseErrno::ENOENT),
        }
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let mut state = self.0.state.lock();
        let name = name.to_string_lossy().into_owned();
        let flags = self.0.flags(name == DATA_FILE);
        let ino = state.inodes.last_key_value().map_or(1, |(&last, _)| last) + 1;
        let inode = Inode { name: Some(name), bytes: Vec::new(), perm: mode as u16 & 0o7777 };
        state.inodes.insert(ino, inode);
        match state.attr(ino) {
            Some(attr) => reply.created(&TTL, &attr, Generation(0), FileHandle(0), flags),
            None => reply.error(FuseErrno::EIO),
        }
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut state = self.0.state.lock();
        let ino = state.find(name);
        match ino.and_then(|ino| state.inodes.get_mut(&ino)) {
            // A process that has it open still reads it.
            Some(inode) => {
                inode.name = None;
                reply.ok();
            }
            None => reply.error(FuseErrno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let data = self.0.state.lock().is_data(ino);
        reply.opened(FileHandle(0), self.0.flags(data));
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = size as usize;
        let trouble = self.0.draw(OpKind::Read, ino, offset, size, flags);
        let size = match trouble {
            Some(Trouble::Fail(code) | Trouble::Torn(code)) => return reply.error(errno(code)),
            Some(Trouble::Short(unit)) => self.0.cut(size, unit),
            _ => size,
        };
        self.0.answer(trouble, move |core| {
            let bytes = core.state.lock().read(ino, offset, size);
            reply.data(&bytes);
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let trouble = self.0.draw(OpKind::Write, ino, offset, data.len(), flags);
        let data = match trouble {
            Some(Trouble::Fail(code)) => return reply.error(errno(code)),
            Some(Trouble::Torn(code)) => {
                self.0.state.lock().write(ino, offset, &data[..data.len() / 2]);
                return reply.error(errno(code));
            }
            Some(Trouble::Short(unit)) => &data[..self.0.cut(data.len(), unit)],
            _ => data,
        };
        let data = data.to_vec();
        self.0.answer(trouble, move |core| {
            core.state.lock().write(ino, offset, &data);
            reply.written(data.len() as u32);
        });
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let trouble = self.0.draw(OpKind::Sync, ino, 0, 0, OpenFlags(0));
        match trouble {
            Some(Trouble::Fail(code) | Trouble::Torn(code)) => reply.error(errno(code)),
            _ => self.0.answer(trouble, |_| reply.ok()),
        }
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        const PUNCH_HOLE_KEEP_SIZE: i32 = 3;
        if mode != PUNCH_HOLE_KEEP_SIZE {
            return reply.error(FuseErrno::EOPNOTSUPP);
        }
        let trouble = self.0.draw(OpKind::Punch, ino, offset, length as usize, OpenFlags(0));
        if let Some(Trouble::Fail(code) | Trouble::Torn(code)) = trouble {
            return reply.error(errno(code));
        }
        self.0.answer(trouble, move |core| {
            let mut state = core.state.lock();
            if let Some(inode) = state.inodes.get_mut(&ino.0) {
                let end = inode.bytes.len().min((offset + length) as usize);
                let start = end.min(offset as usize);
                inode.bytes[start..end].fill(0);
            }
            drop(state);
            reply.ok();
        });
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let blocks = CAPACITY / 4096;
        reply.statfs(blocks, blocks, blocks, 1024, 1024, 4096, 255, 4096);
    }
}
