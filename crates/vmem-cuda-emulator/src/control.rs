//! The part that tests link: it puts the emulator in the place of the driver, and sends it
//! commands.
//!
//! Invariant: the library is loaded before any code asks for `libcuda.so`, and stays for the life
//! of the process. One test at a time has it. Called by tests.

#![allow(unsafe_code)]

use std::fmt;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};

const FILE: &str = "libvmem_cuda_emulator.so";
/// A context that is still retained after so long was leaked.
const LINGERS: Duration = Duration::from_secs(2);

type Command = unsafe extern "C" fn(*const u8, usize, *mut u8, usize) -> usize;

static LOADED: OnceLock<Result<Symbol<Command>, String>> = OnceLock::new();
/// Whether a test has it, and the bell for when it has not.
static TAKEN: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

/// What kind of operation is held or delayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A copy to the device.
    Up,
    /// A copy from the device.
    Down,
    /// A copy or a fill within the device.
    Within,
    /// A kernel.
    Kernel,
    /// A host function.
    Host,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Up => "up",
            Kind::Down => "down",
            Kind::Within => "within",
            Kind::Kernel => "kernel",
            Kind::Host => "host",
        })
    }
}

/// The emulated driver, for one test; it is as at first when a test gets it.
///
/// ```no_run
/// let emulator = vmem_cuda_emulator::Emulator::load().unwrap();
/// emulator.memory(64 << 20);
/// assert_eq!(emulator.counter("device_bytes"), 0);
/// ```
#[derive(Debug)]
pub struct Emulator {
    _turn: Turn,
}

/// The turn of one test.
#[derive(Debug)]
struct Turn;

impl Turn {
    fn wait() -> Self {
        let (taken, bell) = &TAKEN;
        let taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
        *bell.wait_while(taken, |taken| *taken).unwrap_or_else(PoisonError::into_inner) = true;
        Turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *TAKEN.0.lock().unwrap_or_else(PoisonError::into_inner) = false;
        TAKEN.1.notify_one();
    }
}

impl Emulator {
    /// Loads the library that lies beside this program, if that was not done before, and waits for
    /// its turn.
    ///
    /// # Errors
    ///
    /// Where it was looked for, or why it does not load; a real driver that was loaded before.
    pub fn load() -> Result<Self, String> {
        LOADED.get_or_init(load).as_ref().map_err(Clone::clone)?;
        let emulator = Emulator { _turn: Turn::wait() };
        emulator.see_off();
        emulator.command("reset");
        Ok(emulator)
    }

    /// Waits for the threads of the test before, which may let go of the device after it has ended:
    /// what they give back then would be counted against this one. What that test leaked stays.
    fn see_off(&self) {
        self.command("release-all");
        let began = Instant::now();
        while self.counter("contexts") > 0 && began.elapsed() < LINGERS {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn command(&self, line: &str) -> String {
        let Some(Ok(command)) = LOADED.get() else { return String::new() };
        let mut answer = vec![0; 1 << 16];
        // SAFETY: the text is readable and the answer writable for the lengths that are given.
        let len = unsafe { command(line.as_ptr(), line.len(), answer.as_mut_ptr(), answer.len()) };
        answer.truncate(len);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert_ne!(answer, "?", "the emulator does not understand: {line}");
        answer
    }

    /// How many devices there are.
    pub fn devices(&self, count: u32) {
        self.command(&format!("devices {count}"));
    }

    /// The memory of each device, in bytes: 256 MiB at first.
    pub fn memory(&self, bytes: u64) {
        self.command(&format!("memory {bytes}"));
    }

    /// What other processes have taken of it, in bytes.
    pub fn others(&self, bytes: u64) {
        self.command(&format!("others {bytes}"));
    }

    /// The most host memory that can be registered, in bytes.
    pub fn registered_max(&self, bytes: u64) {
        self.command(&format!("registered-max {bytes}"));
    }

    /// How many operations a stream takes before the caller blocks.
    pub fn queue_max(&self, operations: usize) {
        self.command(&format!("queue-max {operations}"));
    }

    /// Operations of this kind take this many microseconds longer.
    pub fn delay(&self, kind: Kind, microseconds: u64) {
        self.command(&format!("delay {kind} {microseconds}"));
    }

    /// Operations of this kind stand still until they are released.
    pub fn hold(&self, kind: Kind) {
        self.command(&format!("hold {kind}"));
    }

    /// Lets `n` of them go on.
    pub fn release(&self, kind: Kind, n: u64) {
        self.command(&format!("release {kind} {n}"));
    }

    /// Lets everything go on.
    pub fn release_all(&self) {
        self.command("release-all");
    }

    /// Whether registered memory has the same address for devices that are opened from now on.
    pub fn addressed_alike(&self, on: bool) {
        self.command(&format!("addressed-alike {}", u8::from(on)));
    }

    /// Whether devices support virtual memory management, as they do at first.
    pub fn paged(&self, on: bool) {
        self.command(&format!("paged {}", u8::from(on)));
    }

    /// Whether memory is unmapped only once its device has nothing in flight, as memory is freed;
    /// not so at first.
    pub fn unmap_waits(&self, on: bool) {
        self.command(&format!("unmap-waits {}", u8::from(on)));
    }

    /// From now on host functions are dropped silently.
    pub fn suppress_host_functions(&self, on: bool) {
        self.command(&format!("suppress {}", u8::from(on)));
    }

    /// From now on host functions are called twice.
    pub fn double_host_functions(&self, on: bool) {
        self.command(&format!("double {}", u8::from(on)));
    }

    /// The `nth` call of this function from now returns `code`, and does nothing.
    pub fn fail(&self, function: &str, nth: u64, code: i32) {
        self.command(&format!("fail {function} {nth} {code}"));
    }

    /// Each call of this function returns `code`, and does nothing, until `code` is 0.
    pub fn refuse(&self, function: &str, code: i32) {
        self.command(&format!("refuse {function} {code}"));
    }

    /// Breaks the captures that have begun: they can only be ended.
    pub fn invalidate_captures(&self) {
        self.command("invalidate");
    }

    /// The first device fails for good with this code; 0 heals all devices.
    pub fn sticky(&self, code: i32) {
        self.sticky_on(0, code);
    }

    /// This device fails for good with this code, and no other one does; 0 heals all devices.
    pub fn sticky_on(&self, device: u32, code: i32) {
        match code {
            0 => self.command("heal"),
            code => self.command(&format!("sticky {device} {code}")),
        };
    }

    /// How often this function was called.
    pub fn calls(&self, function: &str) -> u64 {
        self.command(&format!("calls {function}")).parse().unwrap_or(0)
    }

    /// A gauge (`device_bytes` with those of handles, `allocations`, `created` handles whose memory
    /// is not gone, `mapped_bytes`, `reserved_bytes` of addresses, `events`, `streams`,
    /// `registrations`, `pinned` of them by the system, `contexts`, `in_flight`, `queued_up`,
    /// `queued_within`) or a counter
    /// (`calls` of all functions, `copies_up`, `bytes_up`, `copies_down`, `bytes_down`, `kernels`,
    /// `host_functions`, `blocking_copies`, `implicit_synchronisations`,
    /// `context_synchronisations`, `captures_broken`, `captured_operations`, `graphs_launched`,
    /// `suppressed_host_functions`).
    pub fn counter(&self, name: &str) -> u64 {
        let counters = self.command("counters");
        let value = counters.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    /// What was done against the rules: races on device memory, host memory that was used, freed or
    /// unregistered under a copy, memory that was freed or released twice, or unmapped in flight.
    pub fn violations(&self) -> Vec<String> {
        self.command("violations").lines().map(str::to_owned).collect()
    }
}

/// The library that lies beside this program. A process that finds it under the name `libcuda.so`,
/// by `LD_LIBRARY_PATH` say, has the emulated driver without a word; `VMEM_EMULATED_MEMORY` is the
/// memory of its device then, in bytes.
///
/// # Errors
///
/// Where it was looked for.
pub fn library() -> Result<PathBuf, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let folders = program.ancestors().skip(1).take(2);
    let places: Vec<PathBuf> =
        folders.flat_map(|at| [at.join(FILE), at.join("deps").join(FILE)]).collect();
    let place = places.iter().find(|place| place.exists()).cloned();
    place.ok_or_else(|| format!("{FILE} is in none of {places:?}"))
}

fn load() -> Result<Symbol<Command>, String> {
    let place = library()?;
    // SAFETY: it is our own library, and its loading runs nothing.
    let library = unsafe { Library::open(Some(&place), RTLD_NOW | RTLD_GLOBAL) };
    let library = library.map_err(|error| error.to_string())?;
    // SAFETY: the symbol has this type in the library, which is built from these sources.
    let command = unsafe { library.get::<Command>(b"vmem_emulator_command") };
    let command =
        command.map_err(|error| format!("{} is not the emulator: {error}", place.display()))?;
    // It must never be unloaded: threads run in it.
    std::mem::forget(library);
    // SAFETY: nothing of it is called.
    let driver = unsafe { Library::open(Some("libcuda.so"), RTLD_NOW) };
    let driver = driver.map_err(|error| format!("it is not found as the driver: {error}"))?;
    // SAFETY: the symbol is looked up and never used.
    let ours = unsafe { driver.get::<Command>(b"vmem_emulator_command") }.is_ok();
    std::mem::forget(driver);
    if ours { Ok(command) } else { Err("a real CUDA driver was loaded before".into()) }
}
