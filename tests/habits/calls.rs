//! Every public async call of the store that needs no device, as a future that owns what it uses.
//!
//! Invariant: call `i` is about object `i` alone (a set: about the objects from `i` on), so what it
//! may bring or leave is known. Called by the tests of kept futures.

use std::path::PathBuf;

use bytes::Bytes;
use futures::TryStreamExt;
use futures::future::{BoxFuture, FutureExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmem::{
    ObjectWriter, PinGuard, PutOptions, ReadClass, ReadOptions, VMemHandle, VirtualMemory,
    VirtualMemoryError,
};

use crate::stores::{DISK, HOST, KIB, bytes, check};

/// The length of the objects: three chunks, so more than one piece of the least staging.
pub(crate) const LEN: usize = 150 * KIB + 77;
/// The part that a partial write changes: within two chunks.
const PATCH: std::ops::Range<usize> = 60_000..70_001;
/// Objects of one set.
const SET: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Read,
    ReadAt,
    ReadAtSmall,
    ReadInto,
    ReadWith,
    ReadBackground,
    ReadToStay,
    ReadMany,
    Stream,
    Write,
    WriteAt,
    WriteWith,
    WriteStream,
    Allocate,
    AllocateOnDisk,
    Put,
    PutOnDisk,
    Free,
    Promote,
    Demote,
    Pin,
    Prefetch,
    PrefetchMany,
    Flush,
    FlushAll,
    AllocateNamed,
    PutNamed,
    OpenNamed,
    RenameNamed,
    RemoveNamed,
    SetMetadata,
    Names,
    PutNamedWith,
    WriteStreamNamed,
    OpenEntry,
    Adopt,
    RemoveMany,
    Snapshot,
}

/// What a call brought.
#[derive(Debug)]
pub(crate) enum Got {
    Nothing,
    /// Bytes of an object from an offset on.
    Bytes(usize, usize, Bytes),
    Many(usize, Vec<Bytes>),
    Object(VMemHandle),
    Pin(#[expect(dead_code, reason = "held until it is dropped")] PinGuard),
    Count(usize),
}

pub(crate) type Outcome = Result<Got, VirtualMemoryError>;

/// What the calls are about.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    pub(crate) vmem: VirtualMemory,
    pub(crate) objects: Vec<VMemHandle>,
    pub(crate) dir: PathBuf,
}

pub(crate) fn name(object: usize) -> String {
    format!("kept {object}")
}

impl Call {
    /// Whether the names of the objects exist when it begins.
    pub(crate) fn is_of_names(self) -> bool {
        matches!(
            self,
            Call::OpenNamed
                | Call::RenameNamed
                | Call::RemoveNamed
                | Call::SetMetadata
                | Call::Names
                | Call::OpenEntry
                | Call::RemoveMany
                | Call::Snapshot
        )
    }

    /// Whether it changes the objects so that others cannot use them meanwhile.
    pub(crate) fn ends_objects(self) -> bool {
        self == Call::Free
    }

    /// How many of it are kept.
    pub(crate) fn count(self) -> usize {
        if self == Call::Snapshot { 8 } else { 64 }
    }

    /// The call, about object `i`.
    pub(crate) fn start(self, subject: &Subject, i: usize) -> BoxFuture<'static, Outcome> {
        let vmem = subject.vmem.clone();
        let handle = subject.objects[i].clone();
        match self {
            Call::ReadMany | Call::PrefetchMany => {
                let set = (0..SET).map(|n| (i + n) % subject.objects.len());
                let set = set.map(|n| subject.objects[n].clone()).collect();
                many(self, vmem, set, i).boxed()
            }
            Call::Read
            | Call::ReadAt
            | Call::ReadAtSmall
            | Call::ReadInto
            | Call::ReadWith
            | Call::ReadBackground
            | Call::ReadToStay
            | Call::Stream => read(self, vmem, handle, i).boxed(),
            Call::AllocateNamed
            | Call::PutNamed
            | Call::OpenNamed
            | Call::RenameNamed
            | Call::RemoveNamed
            | Call::SetMetadata
            | Call::Names
            | Call::PutNamedWith
            | Call::WriteStreamNamed
            | Call::OpenEntry
            | Call::RemoveMany
            | Call::Snapshot => of_names(self, vmem, subject.dir.clone(), i).boxed(),
            _ => change(self, vmem, handle, i).boxed(),
        }
    }

    /// What the object may hold after the call, which ended well or not at all.
    pub(crate) fn check_object(self, i: usize, ended: bool, found: &[u8]) -> Result<(), String> {
        match (self, ended) {
            (Call::Write | Call::WriteWith, true) => check(i, &[2], 0, found),
            (Call::Write | Call::WriteWith, false) => check(i, &[1, 2, 3], 0, found),
            (Call::WriteAt, _) => {
                let patched: &[u64] = if ended { &[2] } else { &[1, 2, 3] };
                check(i, &[1, 3], 0, &found[..PATCH.start])?;
                check(i, patched, PATCH.start, &found[PATCH])?;
                check(i, &[1, 3], PATCH.end, &found[PATCH.end..])
            }
            _ => check(i, &[1, 3], 0, found),
        }
    }
}

impl Got {
    /// Whether these are bytes that the objects had.
    pub(crate) fn check(&self, objects: usize) -> Result<(), String> {
        match self {
            Got::Bytes(object, offset, found) => check(*object, &[1, 3], *offset, found),
            Got::Many(first, found) => found
                .iter()
                .enumerate()
                .try_for_each(|(n, found)| check((first + n) % objects, &[1, 3], 0, found)),
            Got::Object(handle) if handle.is_empty() => Err("an object of no bytes".into()),
            Got::Count(0) => Err("a listing of no names".into()),
            Got::Nothing | Got::Object(_) | Got::Pin(_) | Got::Count(_) => Ok(()),
        }
    }
}

async fn read(call: Call, vmem: VirtualMemory, handle: VMemHandle, i: usize) -> Outcome {
    let part = 1_000..LEN - 1_000;
    let all = ReadOptions::new();
    let (offset, bytes) = match call {
        Call::Read => (0, vmem.read(&handle).await?),
        Call::ReadAt => (part.start, vmem.read_at(&handle, part).await?),
        Call::ReadAtSmall => (65_530, vmem.read_at(&handle, 65_530..65_594).await?),
        Call::ReadInto => {
            let mut buf = vec![0; part.len()];
            vmem.read_into(&handle, part.clone(), &mut buf).await?;
            (part.start, buf.into())
        }
        Call::ReadWith => (part.start, vmem.read_with(&handle, all.range(part)).await?),
        Call::ReadBackground => {
            (0, vmem.read_with(&handle, all.class(ReadClass::Background)).await?)
        }
        Call::ReadToStay => (0, vmem.read_with(&handle, all.promote(true)).await?),
        Call::Stream => {
            let mut read = Vec::new();
            vmem.reader(&handle, part.clone()).read_to_end(&mut read).await.map_err(of_io)?;
            (part.start, read.into())
        }
        other => unreachable!("{other:?} is no read"),
    };
    Ok(Got::Bytes(i, offset, bytes))
}

async fn many(call: Call, vmem: VirtualMemory, set: Vec<VMemHandle>, i: usize) -> Outcome {
    match call {
        Call::ReadMany => Ok(Got::Many(i, vmem.read_many(&set).await?)),
        Call::PrefetchMany => vmem.prefetch_many(&set, HOST).await.map(|()| Got::Nothing),
        other => unreachable!("{other:?} is about one object"),
    }
}

async fn change(call: Call, vmem: VirtualMemory, handle: VMemHandle, i: usize) -> Outcome {
    let new = bytes(i, 2, LEN);
    match call {
        Call::Write => vmem.write(&handle, &new).await?,
        Call::WriteAt => vmem.write_at(&handle, PATCH.start, &new[PATCH]).await?,
        Call::WriteWith => vmem.write_with(&handle, |to| to.copy_from_slice(&new)).await?,
        Call::Allocate => return vmem.allocate(LEN, HOST).await.map(Got::Object),
        Call::AllocateOnDisk => return vmem.allocate(LEN, DISK).await.map(Got::Object),
        Call::Put => return vmem.put(&new, HOST).await.map(Got::Object),
        Call::PutOnDisk => return vmem.put(&new, DISK).await.map(Got::Object),
        Call::Free => vmem.free(handle).await?,
        Call::Promote => vmem.promote(&handle, HOST).await?,
        Call::Demote => vmem.demote(&handle, DISK).await?,
        Call::Pin => return vmem.pin(&handle, HOST).await.map(Got::Pin),
        Call::Prefetch => vmem.prefetch(&handle, HOST).await?,
        Call::WriteStream => return stream(vmem.writer(DISK), &new).await,
        Call::Adopt => vmem.adopt(&handle, &format!("adopted {i}")).await?,
        Call::Flush => vmem.flush(&handle).await?,
        Call::FlushAll => vmem.flush_all().await?,
        other => unreachable!("{other:?} is no change of an object"),
    }
    Ok(Got::Nothing)
}

async fn of_names(call: Call, vmem: VirtualMemory, dir: PathBuf, i: usize) -> Outcome {
    let name = name(i);
    match call {
        Call::AllocateNamed => {
            let name = format!("allocated {i}");
            return vmem.allocate_named(&name, LEN, HOST).await.map(Got::Object);
        }
        Call::PutNamed => {
            return vmem.put_named(&name, bytes(i, 2, LEN), HOST).await.map(Got::Object);
        }
        Call::PutNamedWith => {
            let options = PutOptions::new(HOST).metadata(vec![7; 100]);
            let put = vmem.put_named_with(&name, bytes(i, 2, LEN), options);
            return put.await.map(Got::Object);
        }
        Call::WriteStreamNamed => {
            let writer = vmem.writer_named(&name, PutOptions::new(DISK));
            return stream(writer, &bytes(i, 2, LEN)).await;
        }
        Call::OpenEntry => return vmem.open_entry(&name).await.map(|(it, _)| Got::Object(it)),
        Call::RemoveMany => {
            return vmem.remove_many(&[name]).await.map(|count| Got::Count(count as usize));
        }
        Call::OpenNamed => return vmem.open_named(&name).await.map(Got::Object),
        Call::RenameNamed => vmem.rename_named(&name, &format!("{name} renamed")).await?,
        Call::RemoveNamed => vmem.remove_named(&name).await?,
        Call::SetMetadata => vmem.set_metadata(&name, &[7; 100]).await?,
        Call::Names => {
            let names: Vec<_> = vmem.names("kept ").try_collect().await?;
            return Ok(Got::Count(names.len()));
        }
        Call::Snapshot => vmem.snapshot(&dir.join(format!("snapshot {i}"))).await?,
        other => unreachable!("{other:?} is not about names"),
    }
    Ok(Got::Nothing)
}

/// Writes an object of unknown length, in two parts.
async fn stream(mut writer: ObjectWriter, new: &[u8]) -> Outcome {
    let (front, rest) = new.split_at(PATCH.start);
    writer.write_all(front).await.map_err(of_io)?;
    writer.write_all(rest).await.map_err(of_io)?;
    writer.commit().await.map(Got::Object)
}

/// The error of the store in that of a stream.
fn of_io(error: std::io::Error) -> VirtualMemoryError {
    match error.downcast() {
        Ok(error) => error,
        Err(error) => VirtualMemoryError::io("streaming", error),
    }
}
