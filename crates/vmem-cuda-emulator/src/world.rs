//! Everything that the driver knows.
//!
//! Invariant: one lock over all of it; what takes long (copies, host functions, delays) happens
//! without it, on the threads of the streams, and `CHANGED` is rung after every change. Called by
//! the symbols and the streams.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};

use crate::codes::{ALREADY_REGISTERED, CAPTURED_EVENT, Code, INVALID_VALUE, OK, OUT_OF_MEMORY};
use crate::pages::Pages;
use crate::races::{Clock, Races};
use crate::raw::HostMemory;
use crate::stream::Stream;

/// The stream that exists without being created.
pub(crate) const DEFAULT_STREAM: u64 = 0;
/// The threads' own streams are numbered from here.
pub(crate) const PER_THREAD: u64 = 1 << 40;
/// Where device memory begins: addresses of it lead nowhere on the host.
const DEVICE_BASE: u64 = 0x0dea_0000_0000;
/// The gap between two allocations, so that an access past the end of one hits no other.
const GUARD: u64 = 4096;
const GARBAGE: u8 = 0xC7;

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

/// Device memory.
#[derive(Clone, Debug)]
pub(crate) struct Allocation {
    pub(crate) len: u64,
    pub(crate) bytes: Arc<Mutex<Vec<u8>>>,
}

/// Host memory that the device reaches directly.
#[derive(Clone, Debug)]
pub(crate) struct Pinned {
    pub(crate) memory: HostMemory,
    /// None where the system pins nothing.
    pub(crate) pages: Option<Arc<Pages>>,
    /// Allocated by the driver, not registered.
    pub(crate) allocated: bool,
}

/// How some host memory lies to what is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    Pinned,
    Pageable,
    /// Across a border.
    Broken,
}

#[derive(Debug, Default)]
pub(crate) struct Event {
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
    pub(crate) devices: i32,
    pub(crate) total: u64,
    /// What other processes have taken.
    pub(crate) others: u64,
    pub(crate) registered_max: u64,
    pub(crate) queue_max: usize,
    /// Whether registered memory has the same address for the device.
    pub(crate) addressed_alike: bool,
    pub(crate) suppress_host_functions: bool,
    pub(crate) double_host_functions: bool,
    pub(crate) delays_us: HashMap<OpKind, u64>,
    /// How many operations of a kind may still run, where they are held.
    pub(crate) gates: HashMap<OpKind, u64>,
    /// Function, how many calls from now, result.
    pub(crate) injected: Vec<(String, u64, Code)>,
    /// Functions that fail until further notice.
    pub(crate) refused: HashMap<String, Code>,
    pub(crate) sticky: Option<Code>,
    pub(crate) retained: HashMap<u64, i64>,
    pub(crate) allocations: BTreeMap<u64, Allocation>,
    pub(crate) pinned: BTreeMap<usize, Pinned>,
    pub(crate) streams: HashMap<u64, Stream>,
    pub(crate) events: HashMap<u64, Event>,
    /// The entries of each module, and what a function is called.
    pub(crate) modules: HashMap<u64, Vec<String>>,
    pub(crate) functions: HashMap<u64, String>,
    pub(crate) races: Races,
    /// What the host saw end.
    pub(crate) seen: Clock,
    pub(crate) violations: Vec<String>,
    pub(crate) calls: HashMap<&'static str, u64>,
    pub(crate) counters: BTreeMap<&'static str, u64>,
    next_address: u64,
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
    stream != DEFAULT_STREAM && stream < PER_THREAD
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
            suppress_host_functions: false,
            double_host_functions: false,
            delays_us: HashMap::new(),
            gates: HashMap::new(),
            injected: Vec::new(),
            refused: HashMap::new(),
            sticky: None,
            retained: HashMap::new(),
            allocations: BTreeMap::new(),
            pinned: BTreeMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            races: Races::default(),
            seen: Clock::default(),
            violations: Vec::new(),
            calls: HashMap::new(),
            counters: BTreeMap::new(),
            next_address: DEVICE_BASE,
            next_handle: 0x5000,
        }
    }

    /// As it was at first: what an owner could not give up, after an error that sticks, is
    /// forgotten.
    pub(crate) fn reset(&mut self) {
        self.allocations.clear();
        self.events.clear();
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
        self.suppress_host_functions = false;
        self.double_host_functions = false;
        self.delays_us.clear();
        self.gates.clear();
        self.injected.clear();
        self.refused.clear();
        self.sticky = None;
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

    // ---- Memory ------------------------------------------------------------------------------

    pub(crate) fn used(&self) -> u64 {
        self.allocations.values().map(|allocation| allocation.len).sum()
    }

    pub(crate) fn free_bytes(&self) -> u64 {
        self.total.saturating_sub(self.used()).saturating_sub(self.others)
    }

    pub(crate) fn allocate(&mut self, len: u64) -> Result<u64, Code> {
        if len == 0 {
            return Err(INVALID_VALUE);
        }
        if len > self.free_bytes() {
            return Err(OUT_OF_MEMORY);
        }
        let address = self.next_address;
        self.next_address += len.next_multiple_of(512) + GUARD;
        let bytes = Arc::new(Mutex::new(vec![GARBAGE; len as usize]));
        self.allocations.insert(address, Allocation { len, bytes });
        Ok(address)
    }

    /// The allocation that holds all of this range, and where in it the range begins.
    pub(crate) fn find(&self, address: u64, len: u64) -> Option<(Allocation, usize)> {
        let (&start, allocation) = self.allocations.range(..=address).next_back()?;
        let offset = address - start;
        (offset.checked_add(len)? <= allocation.len).then(|| (allocation.clone(), offset as usize))
    }

    /// Whether an address is one of device memory, live or not.
    pub(crate) fn is_of_device(&self, address: u64) -> bool {
        (DEVICE_BASE..DEVICE_BASE + (1 << 40)).contains(&address)
    }

    pub(crate) fn reach(&self, memory: HostMemory) -> Reach {
        let end = memory.address + memory.len;
        let mut touched = self.pinned.values().filter(|pinned| {
            let other = pinned.memory;
            other.address < end && memory.address < other.address + other.len
        });
        match (touched.next(), touched.next()) {
            (None, _) => Reach::Pageable,
            (Some(one), None)
                if one.memory.address <= memory.address
                    && end <= one.memory.address + one.memory.len =>
            {
                Reach::Pinned
            }
            _ => Reach::Broken,
        }
    }

    /// The pages behind host memory, if it is pinned.
    pub(crate) fn pages(&self, memory: HostMemory) -> Option<Arc<Pages>> {
        let (_, pinned) = self.pinned.range(..=memory.address).next_back()?;
        let end = pinned.memory.address + pinned.memory.len;
        if memory.address + memory.len <= end { pinned.pages.clone() } else { None }
    }

    /// Makes host memory pinned.
    pub(crate) fn pin(&mut self, memory: HostMemory, allocated: bool) -> Code {
        if memory.len == 0 || memory.address == 0 {
            return INVALID_VALUE;
        }
        if self.reach(memory) != Reach::Pageable {
            return ALREADY_REGISTERED;
        }
        let registered: u64 = self.pinned.values().map(|pinned| pinned.memory.len as u64).sum();
        if registered + memory.len as u64 > self.registered_max {
            return OUT_OF_MEMORY;
        }
        let pages = Pages::pin(memory).map(Arc::new);
        self.pinned.insert(memory.address, Pinned { memory, pages, allocated });
        OK
    }

    /// Whether an operation that has not ended uses this host memory.
    pub(crate) fn is_in_flight(&self, memory: HostMemory) -> bool {
        let end = memory.address + memory.len;
        self.streams
            .values()
            .flat_map(Stream::host_memory)
            .any(|used| used.address < end && memory.address < used.address + used.len)
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

    pub(crate) fn is_idle(&self) -> bool {
        self.streams.values().all(|stream| stream.done == stream.submitted)
    }
}

/// Waits until nothing is in flight, and says so if something was.
pub(crate) fn drain(mut guard: MutexGuard<'static, World>) -> MutexGuard<'static, World> {
    if !guard.is_idle() {
        guard.count("implicit_synchronisations", 1);
    }
    while !guard.is_idle() && guard.sticky.is_none() {
        guard = wait(guard);
    }
    guard
}
