//! The store under test, the model beside it, and the judgement of what a call returned.
//!
//! Invariant: an error passes only if it says what pressure may cause at any time, or what was
//! injected in this run. Called by the tasks.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use tokio::time::{Instant, sleep};
use vmem::backend::{Backends, DeviceBackend, Remote};
use vmem::{
    Capabilities, VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError,
    VirtualMemoryStats,
};
use vmem_io::DiskTier;
use vmem_testkit::model::Settles;
use vmem_testkit::{Errno, FaultDriver, Model, Seed, SimConfig, SimDevice, SimDriver, Violation};

use super::{STAGING, Trouble};

/// How long, on tokio's clock, what dropped futures left behind may take to end.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

/// What happened in one run.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    pub(crate) steps: Vec<Step>,
    /// How often each call ended in each way.
    pub(crate) counts: BTreeMap<String, u64>,
}

/// The end of one call.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Step {
    objects: Vec<u64>,
    /// When, what, how and with which bytes.
    text: String,
}

pub(crate) struct World {
    pub(crate) vmem: VirtualMemory,
    pub(crate) model: Model,
    pub(crate) objects: Mutex<Vec<VMemHandle>>,
    pub(crate) sim: Option<Arc<SimDriver>>,
    /// Whether there is a tier above host memory.
    pub(crate) has_vram: bool,
    /// Whether there is one below the disk.
    pub(crate) has_remote: bool,
    pub(crate) trouble: Trouble,
    faults: Vec<Arc<FaultDriver>>,
    trace: Mutex<Trace>,
    start: Instant,
}

impl World {
    pub(crate) fn open(
        seed: Seed,
        trouble: Trouble,
        config: &VirtualMemoryConfig,
        rng: &mut SmallRng,
        faults: Arc<FaultDriver>,
        sim: Option<Arc<SimDriver>>,
    ) -> Self {
        let device =
            rng.random_bool(0.7).then(|| SimDevice::new(rng.random_range(256 << 10..1 << 20)));
        if let Some(device) = &device {
            let slowest = Duration::from_millis(rng.random_range(0..5));
            let fails = if trouble.has(Trouble::Errors) { 0.03 } else { 0.0 };
            device.misbehave(seed.fork("device").rng(), slowest, fails);
        }
        // It fails as the disk does, and has a file of its own.
        let remote = rng.random_bool(0.5).then(|| {
            let medium = SimDriver::new(SimConfig::default());
            let faults = FaultDriver::new(medium, seed.fork("remote"));
            let tier = DiskTier::new(faults.clone(), rng.random_range(1 << 20..4 << 20));
            (faults, tier)
        });
        let (remote_faults, remote) = remote.unzip();
        let backends = Backends {
            remote: remote.map(|tier| Remote::Unnamed(tier)),
            host_capacity_bytes: STAGING + rng.random_range(512 << 10..1536 << 10),
            disk: DiskTier::new(faults.clone(), rng.random_range(2 << 20..6 << 20)),
            catalog: None,
            devices: device
                .iter()
                .map(|device| Arc::new(device.clone()) as Arc<dyn DeviceBackend>)
                .collect(),
            capabilities: Capabilities::new("sim".into(), "no gpu".into()),
        };
        let vmem = VirtualMemory::with_backends(config, backends).unwrap();
        let has_remote = remote_faults.is_some();
        let faults: Vec<_> = std::iter::once(faults).chain(remote_faults).collect();
        faults.iter().for_each(|faults| faults.set(trouble.plan()));
        World {
            vmem,
            // A write runs in the future that is dropped: it was done by then or never will be.
            model: Model::with_settles(seed, Settles::AtDrop),
            objects: Mutex::default(),
            sim,
            has_vram: device.is_some(),
            has_remote,
            trouble,
            faults,
            trace: Mutex::default(),
            start: Instant::now(),
        }
    }

    /// Notes how a call ended (`None`: its future was dropped) and judges errors; what it returned.
    pub(crate) fn judge<T>(
        &self,
        call: &Call,
        ended: Option<Result<T, VirtualMemoryError>>,
        tell: impl FnOnce(&T) -> u64,
    ) -> Option<T> {
        let stats = self.vmem.stats();
        assert_within_budget(&stats);
        let (way, told, value) = match ended {
            None => ("dropped".into(), String::new(), None),
            Some(Ok(value)) => ("ok".into(), format!("{:016x}", tell(&value)), Some(value)),
            Some(Err(error)) => {
                assert!(self.explains(call, &error), "{call} in {:?}: {error:?}", self.trouble);
                (variant(&error), error.to_string(), None)
            }
        };
        self.note(call, &way, &told);
        value
    }

    /// Fails with what happened to the objects, if the model cannot explain what a call returned.
    #[track_caller]
    pub(crate) fn check(&self, call: &Call, verdict: Result<(), Violation>) {
        let Err(violation) = verdict else { return };
        let trace = self.trace.lock();
        let of_these = |step: &&Step| step.objects.iter().any(|id| call.objects.contains(id));
        for step in trace.steps.iter().filter(of_these) {
            eprintln!("{}", step.text);
        }
        panic!("{call} in {:?}: {violation}", self.trouble);
    }

    /// Adds a step to the trace.
    pub(crate) fn note(&self, call: &Call, way: &str, told: &str) {
        let mut trace = self.trace.lock();
        *trace.counts.entry(format!("{}: {way}", call.name)).or_default() += 1;
        let at = self.start.elapsed();
        let text = format!("{at:?} {call}: {way} {told}");
        trace.steps.push(Step { objects: call.objects.clone(), text });
    }

    fn explains(&self, call: &Call, error: &VirtualMemoryError) -> bool {
        use VirtualMemoryError as E;
        match error {
            E::TierFull { .. }
            | E::AllPinned { .. }
            | E::TimedOut { .. }
            | E::Pinned { .. }
            | E::ExceedsCapacity { .. } => true,
            E::HandleNotFound { handle } => {
                call.objects.contains(handle) && !self.model.ledger().live.contains(handle)
            }
            E::Corrupt { handle, .. } => {
                self.trouble.has(Trouble::Damage)
                    && (call.objects.is_empty() || call.objects.contains(handle))
            }
            E::Device { code: 719, .. } => self.trouble.has(Trouble::Errors),
            E::Io { source, .. } => match source.raw_os_error() {
                Some(errno) => {
                    errno == Errno::IO.raw_os_error() && self.trouble.has(Trouble::Errors)
                }
                // Writes that a failed sync took with it; or a write that went astray left the
                // file shorter than it should be.
                None => self.trouble.has(Trouble::Errors) || self.trouble.has(Trouble::Damage),
            },
            _ => false,
        }
    }

    /// Nothing goes wrong any more: every object is right or known to be damaged. Then all goes,
    /// and nothing is left.
    pub(crate) async fn finish(&self) -> Trace {
        self.faults.iter().for_each(|faults| faults.clear());
        let objects = std::mem::take(&mut *self.objects.lock());
        for handle in &objects {
            let call = Call::new(99, "the last look", &[handle.id()], &"");
            let token = self.model.begin_read(handle.id());
            let mut bytes = vec![0xEE; handle.len()];
            let read = self.vmem.read_into(handle, 0..handle.len(), &mut bytes).await;
            if let Err(error) = &read {
                let damaged = matches!(error, VirtualMemoryError::Corrupt { .. });
                let gone = matches!(error, VirtualMemoryError::HandleNotFound { .. });
                let astray = matches!(error, VirtualMemoryError::Io { .. })
                    && self.trouble.has(Trouble::Damage);
                assert!(damaged || gone || astray, "{call}: {error:?}");
            }
            if self.judge(&call, Some(read), |()| digest(&bytes)).is_some() {
                self.check(&call, token.check(&bytes));
            }
        }
        let alive = (1..10_000).filter(|&id| self.vmem.handle(id).is_some());
        self.model.ledger().check(alive).unwrap();
        drop(objects);
        self.nothing_is_left().await;
        self.vmem.clone().close().await.unwrap();
        if let Some(sim) = &self.sim {
            assert_eq!(sim.stats().in_flight, 0, "close left an operation in flight");
        }
        std::mem::take(&mut self.trace.lock())
    }

    async fn nothing_is_left(&self) {
        let began = Instant::now();
        loop {
            let stats = self.vmem.stats();
            let left = [
                stats.host.used_bytes,
                stats.disk.used_bytes,
                stats.remote.used_bytes,
                stats.remote.objects,
                stats.vram.used_bytes,
                stats.host.objects,
                stats.disk.objects,
                stats.objects,
                stats.held_bytes,
                stats.pinned_bytes,
                stats.dirty_bytes,
                stats.waiters,
                stats.migrations_in_flight,
            ];
            if left.iter().all(|&left| left == 0) {
                return;
            }
            assert!(began.elapsed() < SETTLE_LIMIT, "left behind: {stats:#?}");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

fn assert_within_budget(stats: &VirtualMemoryStats) {
    for tier in [stats.host, stats.disk, stats.vram, stats.remote] {
        assert!(tier.used_bytes <= tier.capacity_bytes, "above the budget: {stats:#?}");
        assert!(tier.peak_bytes <= tier.capacity_bytes, "was above the budget: {stats:#?}");
    }
}

/// One call of the store: the task that made it, its kind and the objects that it names.
pub(crate) struct Call {
    task: u64,
    pub(crate) name: &'static str,
    pub(crate) objects: Vec<u64>,
    details: String,
}

impl Call {
    pub(crate) fn new(
        task: u64,
        name: &'static str,
        objects: &[u64],
        details: &dyn fmt::Debug,
    ) -> Self {
        Call { task, name, objects: objects.to_vec(), details: format!("{details:?}") }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "task {} {} {:?} {}", self.task, self.name, self.objects, self.details)
    }
}

/// The name of the variant.
fn variant(error: &VirtualMemoryError) -> String {
    let text = format!("{error:?}");
    text.chars().take_while(char::is_ascii_alphanumeric).collect()
}

/// A short stand-in for the bytes, for comparing them later.
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}
