//! Everything that the driver knows.
//!
//! Invariant: one lock over all of it; what takes long (copies, host functions, delays) happens
//! without it, on the threads of the streams, and `CHANGED` is rung after every change. Called by
//! the symbols and the streams.

mod mapped;
mod memory;
mod segments;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};

pub(crate) use mapped::GRANULARITY;
use mapped::Mapped;
pub(crate) use memory::{Allocation, Pinned, Reach};

use crate::codes::{CAPTURED_EVENT, Code, INVALID_VALUE};
use crate::races::{Clock, Races};
use crate::stream::{Stream, Work};

/// A device, as the driver counts them.
pub(crate) type Device = i32;

/// Streams that were created, and all else that has a handle, are numbered from here; below are the
/// streams that exist without being created, one for each device.
const HANDLES: u64 = 0x5000;
/// The threads' own streams are numbered from here.
pub(crate) const PER_THREAD: u64 = 1 << 40;
/// Where device memory begins: addresses of it lead nowhere on the host.
const DEVICE_BASE: u64 = 0x0dea_0000_0000;
/// Where it ends: addresses are used once, so that what is gone is never taken for what is new.
const DEVICE_END: u64 = DEVICE_BASE + (1 << 44);

pub(crate) static CHANGED: Condvar = Condvar::new();
static WORLD: LazyLock<Mutex<World>> = LazyLock::new(|| Mutex::new(World::new()));

thread_local! {
    /// The stack of current contexts of this thread.
    pub(crate) static CURRENT: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    /// Whether a host function runs on this thread: it may not call the driver.
    pub(crate) static IN_HOST_FUNCTION: Cell<bool> = const { Cell::new(false) };
    /// The capture mode of this thread: 0 global, 1 thread-local, 2 relaxed.
    pub(crate) static CAPTURE_MODE: Cell<i32> = const { Cell::new(0) };
}

/// The current context of this thread; 0 if it has none.
pub(crate) fn current() -> u64 {
    CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0))
}

/// The world, locked.
pub(crate) fn world() -> MutexGuard<'static, World> {
    WORLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until something has changed.
pub(crate) fn wait(world: MutexGuard<'static, World>) -> MutexGuard<'static, World> {
    CHANGED.wait(world).unwrap_or_else(PoisonError::into_inner)
}

/// What kind of operation it is, for delays and gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum OpKind {
    Up,
    Down,
    /// Copies within the device, and fills.
    Within,
    Kernel,
    HostFunction,
    /// Events: never held.
    Order,
}

impl OpKind {
    pub(crate) fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "up" => OpKind::Up,
            "down" => OpKind::Down,
            "within" => OpKind::Within,
            "kernel" => OpKind::Kernel,
            "host" => OpKind::HostFunction,
            _ => return None,
        })
    }
}

#[derive(Debug, Default)]
pub(crate) struct Event {
    /// In whose context it was made.
    pub(crate) device: Device,
    /// The stream and the count of the last record.
    pub(crate) last: Option<(u64, u64)>,
    pub(crate) clock: Clock,
    pub(crate) at: Option<std::time::Instant>,
    /// The capture in which it was last recorded.
    pub(crate) captured: Option<u64>,
}

/// The capture that a stream takes part in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capture {
    pub(crate) id: u64,
    /// 0 global, 1 thread-local, 2 relaxed.
    pub(crate) mode: i32,
    /// It was broken, and can only be ended.
    pub(crate) invalid: bool,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) initialized: bool,
    pub(crate) devices: Device,
    /// The memory of each device.
    pub(crate) total: u64,
    /// What other processes have taken of each.
    pub(crate) others: u64,
    pub(crate) registered_max: u64,
    pub(crate) queue_max: usize,
    /// Whether registered memory has the same address for the device.
    pub(crate) addressed_alike: bool,
    /// Whether devices support virtual memory management.
    pub(crate) paged: bool,
    /// Whether memory is unmapped only once the device has nothing in flight.
    pub(crate) unmap_waits: bool,
    pub(crate) suppress_host_functions: bool,
    pub(crate) double_host_functions: bool,
    pub(crate) delays_us: HashMap<OpKind, u64>,
    /// How many operations of a kind may still run, where they are held.
    pub(crate) gates: HashMap<OpKind, u64>,
    /// Function, how many calls from now, result.
    pub(crate) injected: Vec<(String, u64, Code)>,
    /// Functions that fail until further notice.
    pub(crate) refused: HashMap<String, Code>,
    /// The devices that have failed for good, and of what.
    sticky: HashMap<Device, Code>,
    /// How often each device has failed.
    failures: HashMap<Device, u64>,
    pub(crate) retained: HashMap<u64, i64>,
    pub(crate) allocations: BTreeMap<u64, Allocation>,
    pub(crate) mapped: Mapped,
    pub(crate) pinned: BTreeMap<usize, Pinned>,
    pub(crate) streams: HashMap<u64, Stream>,
    pub(crate) events: HashMap<u64, Event>,
    /// The entries of each module, and what a function is called; with the device of each.
    pub(crate) modules: HashMap<u64, (Device, Vec<String>)>,
    pub(crate) functions: HashMap<u64, (Device, String)>,
    /// The work of each capture, and of each graph that was made of one.
    pub(crate) graphs: HashMap<u64, Vec<Work>>,
    pub(crate) races: Races,
    /// What the host saw end.
    pub(crate) seen: Clock,
    pub(crate) violations: Vec<String>,
    pub(crate) calls: HashMap<&'static str, u64>,
    pub(crate) counters: BTreeMap<&'static str, u64>,
    next_address: u64,
    /// Addresses below are of before the last reset.
    begins_at: u64,
    resets: u64,
    next_handle: u64,
}

/// The memory of a device that a test has, in bytes.
const MEMORY: u64 = 256 << 20;

/// The memory of the device before any is allocated, in bytes.
fn memory() -> u64 {
    let given = std::env::var("VMEM_EMULATED_MEMORY").ok();
    given.and_then(|given| given.parse().ok()).unwrap_or(MEMORY)
}

/// Whether a caller created this stream, unlike the null stream and those of the threads.
pub(crate) fn has_owner(stream: u64) -> bool {
    (HANDLES..PER_THREAD).contains(&stream)
}

impl World {
    fn new() -> Self {
        World {
            initialized: false,
            devices: 1,
            total: memory(),
            others: 0,
            registered_max: u64::MAX,
            queue_max: 1024,
            addressed_alike: true,
            paged: true,
            unmap_waits: false,
            suppress_host_functions: false,
            double_host_functions: false,
            delays_us: HashMap::new(),
            gates: HashMap::new(),
            injected: Vec::new(),
            refused: HashMap::new(),
            sticky: HashMap::new(),
            failures: HashMap::new(),
            retained: HashMap::new(),
            allocations: BTreeMap::new(),
            mapped: Mapped::default(),
            pinned: BTreeMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            graphs: HashMap::new(),
            races: Races::default(),
            seen: Clock::default(),
            violations: Vec::new(),
            calls: HashMap::new(),
            counters: BTreeMap::new(),
            next_address: DEVICE_BASE,
            begins_at: DEVICE_BASE,
            resets: 0,
            next_handle: HANDLES,
        }
    }

    /// As it was at first: what an owner could not give up, after an error that sticks, is
    /// forgotten.
    pub(crate) fn reset(&mut self) {
        self.begins_at = self.next_address;
        self.resets += 1;
        self.allocations.clear();
        self.mapped = Mapped::default();
        self.events.clear();
        self.graphs.clear();
        self.retained.clear();
        self.pinned.retain(|_, pinned| pinned.allocated);
        for (&handle, stream) in &mut self.streams {
            stream.destroyed |= has_owner(handle);
            stream.capturing = None;
            stream.clear();
        }
        let fresh = World::new();
        self.devices = fresh.devices;
        self.total = MEMORY;
        self.others = fresh.others;
        self.registered_max = fresh.registered_max;
        self.queue_max = fresh.queue_max;
        self.paged = fresh.paged;
        self.unmap_waits = fresh.unmap_waits;
        self.suppress_host_functions = false;
        self.double_host_functions = false;
        self.delays_us.clear();
        self.gates.clear();
        self.injected.clear();
        self.refused.clear();
        self.sticky.clear();
        self.violations.clear();
        self.calls.clear();
        self.counters.clear();
        CHANGED.notify_all();
    }

    pub(crate) fn handle(&mut self) -> u64 {
        self.next_handle += 1;
        self.next_handle
    }

    pub(crate) fn count(&mut self, what: &'static str, n: u64) {
        *self.counters.entry(what).or_default() += n;
    }

    pub(crate) fn violation(&mut self, text: String) {
        self.violations.push(text);
    }

    // ---- Errors that stick -------------------------------------------------------------------

    /// The error of which a device has failed for good.
    pub(crate) fn sticky(&self, device: Device) -> Option<Code> {
        self.sticky.get(&device).copied()
    }

    /// A device fails for good; it keeps the first error.
    pub(crate) fn fail(&mut self, device: Device, code: Code) {
        if self.sticky.contains_key(&device) {
            return;
        }
        self.sticky.insert(device, code);
        *self.failures.entry(device).or_default() += 1;
    }

    /// How often a device has failed, or was reset: what it was given before the last time has no
    /// effects.
    pub(crate) fn failures(&self, device: Device) -> u64 {
        self.resets + self.failures.get(&device).copied().unwrap_or(0)
    }

    /// All devices work again.
    pub(crate) fn heal(&mut self) {
        self.sticky.clear();
    }

    // ---- Captures ----------------------------------------------------------------------------

    /// Breaks the captures that `broken` selects: from now on they can only be ended.
    pub(crate) fn invalidate(&mut self, broken: impl Fn(&Capture) -> bool) {
        let mut ids: Vec<u64> = Vec::new();
        for capture in self.streams.values_mut().filter_map(|stream| stream.capturing.as_mut()) {
            if broken(capture) && !capture.invalid {
                capture.invalid = true;
                ids.push(capture.id);
            }
        }
        ids.sort_unstable();
        ids.dedup();
        self.count("captures_broken", ids.len() as u64);
    }

    /// Whether a capture has not been ended.
    fn is_captured(&self, id: u64) -> bool {
        self.streams.values().any(|stream| stream.capturing.is_some_and(|other| other.id == id))
    }

    /// What a look at an event comes to that was last recorded in a capture; none for others.
    pub(crate) fn captured_event(&mut self, id: Option<u64>) -> Option<Code> {
        let id = id?;
        if !self.is_captured(id) {
            return Some(INVALID_VALUE);
        }
        // As on a real device: the query breaks the capture.
        self.invalidate(|capture| capture.id == id);
        Some(CAPTURED_EVENT)
    }

    // ---- Order -------------------------------------------------------------------------------

    /// Whether operation `count` of a stream has ended; those of streams that are gone have.
    pub(crate) fn has_ended(&self, (stream, count): (u64, u64)) -> bool {
        self.streams.get(&stream).is_none_or(|stream| stream.done >= count)
    }

    /// Whether nothing is in flight on any device, or on one; a device that has failed has nothing
    /// in flight.
    pub(crate) fn is_idle(&self, device: Option<Device>) -> bool {
        let counts = |stream: &&Stream| device.is_none_or(|device| stream.device == device);
        let mut busy = self.streams.values().filter(|stream| stream.done < stream.submitted);
        busy.all(|stream| !counts(&stream) || self.sticky(stream.device).is_some())
    }
}

/// Waits until nothing is in flight on any device, or on one, and says so if something was.
pub(crate) fn drain(
    mut guard: MutexGuard<'static, World>,
    device: Option<Device>,
) -> MutexGuard<'static, World> {
    if !guard.is_idle(device) {
        guard.count("implicit_synchronisations", 1);
    }
    while !guard.is_idle(device) {
        guard = wait(guard);
    }
    guard
}
