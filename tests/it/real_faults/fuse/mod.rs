//! A file system in user space that holds one directory in memory and misbehaves on command.
//!
//! Invariant: what goes wrong follows from the rules, the seed and the order of the requests, and
//! each fault that really happened is counted. The directory itself always works, so that opening
//! and closing a store tests the store and not this. Called by the tests of real faults.
//!
//! The server has a table of descriptors of its own: if the process is killed, the connection goes
//! with the server's threads, and no call is left in the kernel waiting for an answer.

#![allow(unsafe_code)]

mod served;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use fuser::{Errno as FuseErrno, FileAttr, FileType, FopenFlags, INodeNo, OpenFlags};
use parking_lot::{Condvar, Mutex};
use rand::Rng;
use rand::rngs::SmallRng;
use rustix::fs::OFlags;
use rustix::mount::UnmountFlags;
use tempfile::TempDir;
use vmem_io::DATA_FILE;
use vmem_testkit::{Errno, OpKind, Seed, When};

use crate::real_faults::place::Refused;
use served::serve;

/// Nothing is cached for longer than it takes to ask: the file changes behind the kernel's back.
const TTL: Duration = Duration::ZERO;
/// What it says it could hold, in bytes.
const CAPACITY: u64 = 1 << 30;
/// Direct I/O in other units than this is refused, as by a disk.
const SECTOR: usize = 512;

/// Whether transfers pass the kernel's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opens {
    /// They do not: a short answer is what the caller gets.
    Direct,
    /// They do, unless the caller asks for direct I/O. A short answer means the end of the file,
    /// and no write may be short.
    Cached,
    /// As `Direct`, and a request for direct I/O is refused.
    Refused,
}

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Nothing is done, and this is the answer.
    Fail(Errno),
    /// A write: the first half is done, and this is the answer.
    Torn(Errno),
    /// At least one unit of this many bytes is transferred, but not all.
    Short(usize),
    /// It is answered this much later.
    Late(Duration),
    /// It is answered after [`FaultyFs::heal`].
    Held,
}

#[derive(Debug)]
struct Rule {
    kind: OpKind,
    when: When,
    trouble: Trouble,
    seen: u64,
    injected: u64,
}

#[derive(Debug)]
struct Inode {
    name: Option<String>,
    bytes: Vec<u8>,
    perm: u16,
}

#[derive(Debug)]
struct State {
    rng: SmallRng,
    rules: Vec<Rule>,
    /// Of rules that are gone.
    injected: BTreeMap<OpKind, u64>,
    seen: BTreeMap<OpKind, u64>,
    inodes: BTreeMap<u64, Inode>,
    held: usize,
    misaligned: u64,
}

#[derive(Debug)]
struct Core {
    opens: Opens,
    state: Mutex<State>,
    /// Notified when what was held may go on.
    release: Condvar,
}

/// The file system, mounted. Dropping it ends it, even if calls still wait for an answer.
#[derive(Debug)]
pub(crate) struct FaultyFs {
    core: Arc<Core>,
    mountpoint: TempDir,
    server: Option<JoinHandle<()>>,
}

impl FaultyFs {
    pub(crate) fn mount(opens: Opens, seed: Seed) -> Result<Self, Refused> {
        let state = State {
            rng: seed.rng(),
            rules: Vec::new(),
            injected: BTreeMap::new(),
            seen: BTreeMap::new(),
            inodes: BTreeMap::from([(1, Inode { name: None, bytes: Vec::new(), perm: 0o700 })]),
            held: 0,
            misaligned: 0,
        };
        let core = Arc::new(Core { opens, state: Mutex::new(state), release: Condvar::new() });
        let mountpoint = tempfile::tempdir().map_err(|error| error.to_string())?;
        let served = Served(core.clone());
        let target = mountpoint.path().to_owned();
        let (told, connected) = channel();
        let server = thread::Builder::new().name("faulty-fs".into());
        let server = server.spawn(move || serve(served, &target, &told));
        let server = server.map_err(|error| error.to_string())?;
        let connected = connected.recv().expect("the server says how it began");
        connected.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => format!("FUSE: {error}"),
            _ if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => "no FUSE".into(),
            _ => panic!("FUSE is there and fails: {error:?}"),
        })?;
        Ok(FaultyFs { core, mountpoint, server: Some(server) })
    }

    pub(crate) fn path(&self) -> &Path {
        self.mountpoint.path()
    }

    /// Whether a caller may resume what was cut short (see `machine::over_fuse`).
    pub(crate) fn may_be_short(&self) -> bool {
        self.core.opens == Opens::Direct
    }

    /// Adds a rule; of those that meet a request the first counts. Requests are counted from here.
    pub(crate) fn on(&self, kind: OpKind, when: When, trouble: Trouble) {
        let rule = Rule { kind, when, trouble, seen: 0, injected: 0 };
        self.core.state.lock().rules.push(rule);
    }

    /// Nothing goes wrong from now on; what was held is answered.
    pub(crate) fn heal(&self) {
        let state = &mut *self.core.state.lock();
        for rule in state.rules.drain(..) {
            *state.injected.entry(rule.kind).or_default() += rule.injected;
        }
        self.core.release.notify_all();
    }

    /// Requests that are held right now.
    pub(crate) fn held(&self) -> usize {
        self.core.state.lock().held
    }

    /// Faults that happened to requests of this kind.
    pub(crate) fn injected(&self, kind: OpKind) -> u64 {
        let state = self.core.state.lock();
        let now = state.rules.iter().filter(|rule| rule.kind == kind).map(|rule| rule.injected);
        now.sum::<u64>() + state.injected.get(&kind).copied().unwrap_or(0)
    }

    /// Requests of this kind for the data file.
    pub(crate) fn seen(&self, kind: OpKind) -> u64 {
        self.core.state.lock().seen.get(&kind).copied().unwrap_or(0)
    }

    /// Direct transfers that were not in whole sectors.
    pub(crate) fn misaligned(&self) -> u64 {
        self.core.state.lock().misaligned
    }

    /// Truncates the data file behind the store's back; returns how long it was.
    pub(crate) fn truncate(&self, len: usize) -> usize {
        let mut state = self.core.state.lock();
        let data = state.inodes.values_mut().find(|inode| inode.name.as_deref() == Some(DATA_FILE));
        let data = data.expect("a store is open here");
        let before = data.bytes.len();
        data.bytes.truncate(len);
        before
    }

    /// The length of the data file.
    pub(crate) fn data_len(&self) -> usize {
        let state = self.core.state.lock();
        let data = state.inodes.values().find(|inode| inode.name.as_deref() == Some(DATA_FILE));
        data.map_or(0, |data| data.bytes.len())
    }

    /// What it served, and what went wrong.
    pub(crate) fn summary(&self) -> String {
        let kinds = [OpKind::Read, OpKind::Write, OpKind::Sync, OpKind::Punch];
        let of = |kind| format!("{kind:?} {} of {}", self.injected(kind), self.seen(kind));
        format!("faults: {}", kinds.map(of).join(", "))
    }
}

impl Drop for FaultyFs {
    fn drop(&mut self) {
        self.heal();
        // By force, so that what was never answered ends with an error; lazily, so that an open
        // file does not keep it.
        let by = UnmountFlags::FORCE | UnmountFlags::DETACH;
        let _ = rustix::mount::unmount(self.path(), by);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

/// The file system as the kernel sees it.
#[derive(Clone, Debug)]
struct Served(Arc<Core>);

impl State {
    /// What goes wrong with the next request, which moves `len` bytes.
    fn draw(&mut self, kind: OpKind, len: usize) -> Option<Trouble> {
        *self.seen.entry(kind).or_default() += 1;
        let mut chosen = None;
        for rule in self.rules.iter_mut().filter(|rule| rule.kind == kind) {
            rule.seen += 1;
            let meets = match rule.when {
                When::Nth(n) => rule.seen == n,
                When::From(n) => rule.seen >= n,
                When::Chance(p) => self.rng.random_bool(p),
            };
            // Less than one unit cannot be cut short.
            let possible = !matches!(rule.trouble, Trouble::Short(unit) if len <= unit);
            if meets && possible && chosen.is_none() {
                rule.injected += 1;
                chosen = Some(rule.trouble);
            }
        }
        chosen
    }

    fn attr(&self, ino: u64) -> Option<FileAttr> {
        let inode = self.inodes.get(&ino)?;
        let epoch = SystemTime::UNIX_EPOCH;
        let (kind, nlink) = match ino {
            1 => (FileType::Directory, 2),
            _ => (FileType::RegularFile, u32::from(inode.name.is_some())),
        };
        Some(FileAttr {
            ino: INodeNo(ino),
            size: inode.bytes.len() as u64,
            blocks: inode.bytes.len().div_ceil(512) as u64,
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
            crtime: epoch,
            kind,
            perm: inode.perm,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn find(&self, name: &OsStr) -> Option<u64> {
        let named = |inode: &Inode| inode.name.as_deref().map(OsStr::new) == Some(name);
        self.inodes.iter().find(|(_, inode)| named(inode)).map(|(&ino, _)| ino)
    }

    fn is_data(&self, ino: INodeNo) -> bool {
        self.inodes.get(&ino.0).is_some_and(|inode| inode.name.as_deref() == Some(DATA_FILE))
    }

    fn read(&self, ino: INodeNo, offset: u64, len: usize) -> Vec<u8> {
        let bytes = self.inodes.get(&ino.0).map_or(&[][..], |inode| &inode.bytes);
        let start = bytes.len().min(offset as usize);
        let end = bytes.len().min(start + len);
        bytes[start..end].to_vec()
    }

    fn write(&mut self, ino: INodeNo, offset: u64, bytes: &[u8]) {
        let start = offset as usize;
        let end = offset as usize + bytes.len();
        if let Some(inode) = self.inodes.get_mut(&ino.0) {
            if inode.bytes.len() < end {
                inode.bytes.resize(end, 0);
            }
            inode.bytes[start..end].copy_from_slice(bytes);
        }
    }
}

impl Core {
    /// What goes wrong with a transfer, if it is one of the data file.
    fn draw(
        &self,
        kind: OpKind,
        ino: INodeNo,
        offset: u64,
        len: usize,
        flags: OpenFlags,
    ) -> Option<Trouble> {
        let mut state = self.state.lock();
        let direct = flags.0 & OFlags::DIRECT.bits() as i32 != 0;
        if direct && self.opens == Opens::Refused {
            return Some(Trouble::Fail(Errno::INVAL));
        }
        if !state.is_data(ino) {
            return None;
        }
        if direct && !(len.is_multiple_of(SECTOR) && offset.is_multiple_of(SECTOR as u64)) {
            state.misaligned += 1;
            return Some(Trouble::Fail(Errno::INVAL));
        }
        state.draw(kind, len)
    }

    /// How much of `len` bytes a short transfer in these units moves.
    fn cut(&self, len: usize, unit: usize) -> usize {
        let units = len.div_ceil(unit);
        unit * self.state.lock().rng.random_range(1..units)
    }

    /// Does `answer` now, or, when it is time, on a thread of its own, so that no other request
    /// waits for it.
    fn answer(
        self: &Arc<Self>,
        trouble: Option<Trouble>,
        answer: impl FnOnce(&Core) + Send + 'static,
    ) {
        let core = self.clone();
        drop(match trouble {
            Some(Trouble::Late(time)) => thread::spawn(move || {
                thread::sleep(time);
                answer(&core);
            }),
            Some(Trouble::Held) => thread::spawn(move || {
                core.stand();
                answer(&core);
            }),
            _ => return answer(self),
        });
    }

    fn stand(&self) {
        let holds = |state: &mut State| state.rules.iter().any(|r| r.trouble == Trouble::Held);
        let mut state = self.state.lock();
        state.held += 1;
        self.release.wait_while(&mut state, holds);
        state.held -= 1;
    }

    fn flags(&self, data: bool) -> FopenFlags {
        match (self.opens, data) {
            (Opens::Direct | Opens::Refused, true) => FopenFlags::FOPEN_DIRECT_IO,
            _ => FopenFlags::empty(),
        }
    }
}

fn errno(errno: Errno) -> FuseErrno {
    FuseErrno::from_i32(errno.raw_os_error())
}
