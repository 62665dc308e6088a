//! Scenario 47: versions that a device alone has, and what fails under them.
//!
//! Excluded: an older version without an error before it, half of a change, and the loss of what
//! was flushed; under a device that is lost at rest, under a kernel or under a copy, a copy
//! down that is refused once or for ever, and a panic in the middle of a change; each by itself,
//! and with a flush and a close meanwhile; with every time of writing back.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vmem::gpu::cudarc::driver::CudaStream;
use vmem::gpu::{DeviceLeaseMut, VramExt};
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError, WriteBack};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{
    HANGS, HOST, LEN, bytes, launch, plus, refuse_copies_down, refuse_next_copy_down, stream, until,
};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

const LAUNCH_FAILED: i32 = 719;
const REFUSED: i32 = 1;
const NAMES: [&str; 3] = ["changing", "dirty", "flushed"];
/// The version of each that is durable, by a flush.
const FLUSHED: u8 = 1;
/// The versions before the fault: a kernel is about to write another one of the first object.
const NEWEST: [u8; 3] = [2, 2, FLUSHED];
/// What that kernel would make of it.
const CHANGED: u8 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Lost,
    LostUnderAKernel,
    LostUnderACopy,
    RefusedOnce,
    RefusedForEver,
    Panic,
}

/// Which version of an object these bytes are.
fn version_of(nth: usize, read: &[u8]) -> u8 {
    let made = bytes(nth as u8);
    let version = read[0].wrapping_sub(made[0]);
    assert!(read == plus(&made, version), "{}: half of a change", NAMES[nth]);
    version
}

async fn open(folder: &Path, write_back: WriteBack) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .disk_path(folder)
        .host_capacity(4 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(4 << 20)
        .wait_timeout(Duration::from_secs(20))
        .write_back(write_back);
    vmem::open(config.build().unwrap()).await.unwrap()
}

struct Bench {
    vmem: VirtualMemory,
    stream: Arc<CudaStream>,
    handles: Vec<VMemHandle>,
    what: String,
}

impl Bench {
    /// Each object has a version that was flushed, and two a newer one, made by a kernel.
    async fn new(folder: &Path, write_back: WriteBack, what: String) -> Self {
        let vmem = open(folder, write_back).await;
        let stream = stream();
        let mut handles = Vec::new();
        for (seed, name) in NAMES.into_iter().enumerate() {
            handles.push(vmem.put_named(name, bytes(seed as u8), HOST).await.unwrap());
        }
        let bench = Bench { vmem, stream, handles, what };
        for nth in 0..NAMES.len() {
            bench.add(nth).await.unwrap();
            bench.vmem.flush(&bench.handles[nth]).await.unwrap();
        }
        for nth in (0..NAMES.len()).filter(|&nth| NEWEST[nth] > FLUSHED) {
            bench.add(nth).await.unwrap();
        }
        bench
    }

    /// A kernel makes the next version.
    async fn add(&self, nth: usize) -> Result<()> {
        let lease = self.vmem.device_mut_on(&self.handles[nth], &self.stream).await?;
        // SAFETY: used by the kernel, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &self.stream);
        lease.finish().await
    }

    /// The change of the first object, with the fault in the middle of it, and what else begins
    /// then. An error says that its new version, or the one before, is gone.
    async fn change(
        &self,
        fault: Fault,
        emulator: &Emulator,
        meanwhile: impl FnOnce(),
    ) -> Result<()> {
        if fault == Fault::Lost {
            emulator.sticky(LAUNCH_FAILED);
            meanwhile();
            return self.vmem.device_mut_on(&self.handles[0], &self.stream).await.map(drop);
        }
        let lease = self.vmem.device_mut_on(&self.handles[0], &self.stream).await?;
        // SAFETY: used by the kernel, on the stream of the lease.
        let at = unsafe { lease.device_ptr() };
        let half = if fault == Fault::Panic { LEN / 2 } else { LEN };
        if fault == Fault::LostUnderAKernel {
            emulator.hold(Kind::Kernel);
        }
        if fault == Fault::LostUnderACopy {
            emulator.hold(Kind::Down);
        }
        launch("vmem_add", at, half as u64, 1, &self.stream);
        if !matches!(fault, Fault::RefusedOnce | Fault::RefusedForEver) {
            meanwhile();
            return self.end_change(fault, emulator, lease).await;
        }
        if fault == Fault::RefusedOnce {
            refuse_next_copy_down(emulator, REFUSED);
        } else {
            refuse_copies_down(emulator, REFUSED);
        }
        meanwhile();
        lease.finish().await
    }

    async fn end_change(
        &self,
        fault: Fault,
        emulator: &Emulator,
        lease: DeviceLeaseMut,
    ) -> Result<()> {
        if fault == Fault::Panic {
            let panicked = tokio::spawn(async move {
                let _lease = lease;
                panic!("in the middle of a change");
            });
            assert!(panicked.await.unwrap_err().is_panic());
            return Ok(());
        }
        let ended = tokio::spawn(lease.finish());
        // What copies down, whenever this store writes back.
        let reading = tokio::spawn({
            let vmem = self.vmem.clone();
            let handle = self.handles[0].clone();
            async move { vmem.read(&handle).await.map(drop) }
        });
        until("what stands still", || emulator.counter("in_flight") > 0).await;
        tokio::time::sleep(Duration::from_millis(30)).await;
        emulator.sticky(LAUNCH_FAILED);
        emulator.release_all();
        let ended = tokio::time::timeout(HANGS, ended).await.expect("it hangs").unwrap();
        let read = tokio::time::timeout(HANGS, reading).await.expect("it hangs").unwrap();
        ended.and(read)
    }

    /// Each reader gets the newest version, or an error, as often as it asks. `told` of the change
    /// of the first object, whose version before may have stayed then. Returns which are errors.
    async fn read_all(&self, fault: Fault, told: bool) -> Vec<bool> {
        let what = &self.what;
        let mut errors = Vec::new();
        for (nth, handle) in self.handles.iter().enumerate() {
            let read = tokio::time::timeout(HANGS, self.vmem.read(handle)).await.expect(what);
            match &read {
                Ok(read) => {
                    let version = version_of(nth, read);
                    let before = told || fault == Fault::Panic;
                    let is_newest = match nth {
                        0 => version == CHANGED && fault != Fault::Panic || version == 2 && before,
                        _ => version == NEWEST[nth],
                    };
                    assert!(is_newest, "{what}: {}: version {version} unasked", NAMES[nth]);
                }
                Err(error) => assert!(
                    matches!(error, VirtualMemoryError::Device { .. }),
                    "{what}: {}: {error:?}",
                    NAMES[nth]
                ),
            }
            let mut part = [0; 16];
            let again = self.vmem.read_into(handle, 0..16, &mut part).await;
            let is_once = fault == Fault::RefusedOnce;
            let read = read.map(drop);
            assert!(again.is_ok() == read.is_ok() || is_once, "{what}: {again:?} after {read:?}");
            errors.push(again.is_err());
        }
        assert!(!errors[2], "{what}: what was flushed");
        errors
    }
}

/// What is found when the store is opened again.
async fn assert_durable(folder: &Path, least: [u8; 3], most: [u8; 3], what: &str) {
    let vmem = open(folder, WriteBack::Eager).await;
    for (nth, name) in NAMES.into_iter().enumerate() {
        let handle = vmem.open_named(name).await.unwrap();
        let version = version_of(nth, &vmem.read(&handle).await.unwrap());
        let allowed = least[nth]..=most[nth];
        assert!(allowed.contains(&version), "{what}: {name}: version {version} of {allowed:?}");
    }
    vmem.close().await.unwrap();
}

const FAULTS: [Fault; 6] = [
    Fault::Lost,
    Fault::LostUnderAKernel,
    Fault::LostUnderACopy,
    Fault::RefusedOnce,
    Fault::RefusedForEver,
    Fault::Panic,
];

fn write_backs() -> [WriteBack; 4] {
    let soon = WriteBack::After(Duration::from_millis(1));
    [WriteBack::Eager, soon, WriteBack::After(Duration::from_secs(600)), WriteBack::OnEvict]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_47_a_fault_under_what_a_device_alone_has_is_told() {
    let emulator = Emulator::load().unwrap();
    for write_back in write_backs() {
        for fault in FAULTS {
            let folder = tempfile::tempdir().unwrap();
            let what = format!("{write_back:?}, {fault:?}");
            let bench = Bench::new(folder.path(), write_back, what.clone()).await;
            let told = bench.change(fault, &emulator, || {}).await.is_err();
            let errors = bench.read_all(fault, told).await;
            if write_back == WriteBack::Eager {
                assert!(!errors[1], "{what}: it was below before the lease ended");
            }
            refuse_copies_down(&emulator, 0);
            let mut newest = [CHANGED, NEWEST[1], NEWEST[2]];
            let is_for_a_while = matches!(fault, Fault::RefusedOnce | Fault::RefusedForEver);
            for (nth, handle) in bench.handles.iter().enumerate() {
                if errors[nth] && !is_for_a_while {
                    bench.vmem.revert(handle).await.unwrap();
                }
                let version = version_of(nth, &bench.vmem.read(handle).await.expect(&what));
                assert!(version >= FLUSHED, "{what}: {}: {version}", NAMES[nth]);
                assert!(!is_for_a_while || version == newest[nth], "{what}: {}", NAMES[nth]);
                newest[nth] = version;
            }
            let Bench { vmem, stream, handles, .. } = bench;
            drop((handles, stream));
            tokio::time::timeout(HANGS, vmem.close()).await.expect(&what).expect(&what);
            emulator.sticky(0);
            assert_durable(folder.path(), newest, newest, &what).await;
        }
    }
    assert_eq!(emulator.violations(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_47_a_flush_and_a_close_beside_a_fault_keep_what_was_flushed() {
    let emulator = Emulator::load().unwrap();
    for write_back in write_backs() {
        for fault in FAULTS {
            let folder = tempfile::tempdir().unwrap();
            let what = format!("{write_back:?}, {fault:?}, a flush and a close");
            let bench = Bench::new(folder.path(), write_back, what.clone()).await;
            let mut flushes = Vec::new();
            let mut closing = None;
            let meanwhile = || {
                for handle in &bench.handles {
                    let vmem = bench.vmem.clone();
                    let handle = handle.clone();
                    flushes.push(tokio::spawn(async move { vmem.flush(&handle).await }));
                }
                let vmem = bench.vmem.clone();
                closing = Some(tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(3)).await;
                    vmem.close().await
                }));
            };
            let changed = bench.change(fault, &emulator, meanwhile).await;
            let closing = closing.expect(&what);
            let mut least = [FLUSHED; 3];
            for (nth, flushed) in flushes.into_iter().enumerate() {
                let flushed = tokio::time::timeout(HANGS, flushed).await.expect(&what).unwrap();
                if flushed.is_ok() {
                    // It covered what was there when it was called.
                    least[nth] = NEWEST[nth];
                }
            }
            let closed = tokio::time::timeout(HANGS * 2, closing).await.expect(&what).unwrap();
            match &closed {
                Ok(()) => {
                    least = NEWEST;
                    if changed.is_ok() && fault != Fault::Panic {
                        least[0] = CHANGED;
                    }
                }
                Err(VirtualMemoryError::NotFlushed { names, .. }) => {
                    for (nth, name) in NAMES.into_iter().enumerate() {
                        if !names.iter().any(|one| &**one == name) {
                            least[nth] = NEWEST[nth];
                        }
                    }
                }
                Err(error) => panic!("{what}: {error:?}"),
            }
            drop(bench);
            refuse_copies_down(&emulator, 0);
            emulator.sticky(0);
            assert_durable(folder.path(), least, [CHANGED, 2, FLUSHED], &what).await;
        }
    }
}
