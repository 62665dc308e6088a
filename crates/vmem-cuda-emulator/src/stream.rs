//! The operations of a stream, and the thread that carries them out.
//!
//! Invariant: operations of one stream run one after the other, in order; each counts as done only
//! after its effects. After a sticky error of its device none has effects any more, and host
//! functions are not called. Called by the symbols.

mod work;

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(crate) use work::{Op, Work};

use crate::codes::{
    CAPTURE_INVALIDATED, CAPTURE_ISOLATION, CAPTURE_UNSUPPORTED, Code, ILLEGAL_ADDRESS,
    INVALID_HANDLE, INVALID_VALUE, OK,
};
use crate::races::{Access, Clock};
use crate::raw::HostMemory;
use crate::world::{
    CHANGED, Capture, Device, IN_HOST_FUNCTION, OpKind, Reach, World, current, wait, world,
};

/// One host function runs at a time, whatever its stream, as on a card: a slow one delays all
/// others.
static HOST_FUNCTIONS: Mutex<()> = Mutex::new(());

#[derive(Debug, Default)]
pub(crate) struct Stream {
    /// In whose context it was made.
    pub(crate) device: Device,
    queue: VecDeque<Op>,
    /// The host memory of the operation that runs.
    running: Vec<HostMemory>,
    /// What that operation does to device memory.
    accesses: Vec<Access>,
    pub(crate) submitted: u64,
    pub(crate) done: u64,
    pub(crate) clock: Clock,
    pub(crate) priority: i32,
    pub(crate) flags: u32,
    /// Its context.
    pub(crate) context: u64,
    /// The capture that it takes part in.
    pub(crate) capturing: Option<Capture>,
    /// Whether its handle was destroyed.
    pub(crate) destroyed: bool,
}

impl Stream {
    /// Operations of this kind that have not begun.
    pub(crate) fn queued(&self, kind: OpKind) -> u64 {
        self.queue.iter().filter(|op| op.work.kind() == kind).count() as u64
    }

    /// Forgets what has not begun.
    pub(crate) fn clear(&mut self) {
        self.done += self.queue.len() as u64;
        self.queue.clear();
    }

    pub(crate) fn host_memory(&self) -> impl Iterator<Item = HostMemory> + '_ {
        self.queue.iter().flat_map(|op| op.work.host()).chain(self.running.iter().copied())
    }

    /// What operations in flight do to device memory.
    pub(crate) fn device_memory(&self) -> impl Iterator<Item = &Access> {
        self.queue.iter().flat_map(|op| &op.accesses).chain(&self.accesses)
    }
}

/// Puts a stream into the world and starts its thread.
pub(crate) fn create(world: &mut World, handle: u64, device: Device, flags: u32, priority: i32) {
    let stream = Stream { device, flags, priority, context: current(), ..Stream::default() };
    world.streams.insert(handle, stream);
    std::thread::spawn(move || run(handle));
}

/// Hands an operation to a stream; where the driver would block, so does this. Returns its count.
pub(crate) fn submit(
    mut guard: MutexGuard<'static, World>,
    handle: u64,
    work: Work,
) -> Result<u64, Code> {
    let device = guard.streams.get(&handle).ok_or(INVALID_HANDLE)?.device;
    if let Some(code) = guard.sticky(device) {
        return Err(code);
    }
    // What a kernel reads is looked at when it runs.
    let is_kernel = matches!(work, Work::Pieces { .. });
    let memory = work.host().first().copied().filter(|_| !is_kernel);
    let reach = memory.map_or(Reach::Pinned, |memory| guard.reach(memory));
    if reach == Reach::Broken {
        return Err(INVALID_VALUE);
    }
    loop {
        let max = guard.queue_max;
        let stream = guard.streams.get(&handle).ok_or(INVALID_HANDLE)?;
        if let Some(capture) = stream.capturing {
            return capture_work(&mut guard, capture, work);
        }
        if stream.queue.len() < max {
            break;
        }
        guard = wait(guard);
    }
    let accesses = work.accesses(&guard);
    let failures = guard.failures(device);
    let name = work.name();
    let waited_for = match &work {
        Work::Wait { until } => Some(*until),
        _ => None,
    };
    let world = &mut *guard;
    let Some(stream) = world.streams.get_mut(&handle) else { return Err(INVALID_HANDLE) };
    stream.submitted += 1;
    let count = stream.submitted;
    stream.clock.join(&world.seen);
    if let Some((other, count)) = waited_for {
        let mut before = Clock::default();
        before.set(other, count);
        stream.clock.join(&before);
    }
    stream.clock.set(handle, count);
    let clock = stream.clock.clone();
    if let Work::Record { event } = &work
        && let Some(event) = world.events.get_mut(event)
    {
        event.last = Some((handle, count));
        event.clock = clock.clone();
        event.at = None;
        event.captured = None;
    }
    let found = world.races.submit(handle, count, name, &accesses, &clock, &world.seen);
    stream.queue.push_back(Op { accesses, failures, ..Op::issued(work, reach) });
    world.violations.extend(found);
    CHANGED.notify_all();
    if reach == Reach::Pageable {
        guard.count("blocking_copies", 1);
        while !guard.has_ended((handle, count)) {
            guard = wait(guard);
        }
        let mut seen = Clock::default();
        seen.set(handle, count);
        guard.seen.join(&seen);
        if let Some(code) = guard.sticky(device) {
            return Err(code);
        }
    }
    Ok(count)
}

/// Work that is given to a stream in a capture becomes part of a graph, and is not carried out.
fn capture_work(world: &mut World, capture: Capture, work: Work) -> Result<u64, Code> {
    if capture.invalid {
        return Err(CAPTURE_INVALIDATED);
    }
    match work {
        Work::Record { event } => {
            if let Some(event) = world.events.get_mut(&event) {
                event.captured = Some(capture.id);
            }
        }
        Work::Wait { .. } => {
            world.invalidate(|other| other.id == capture.id);
            return Err(CAPTURE_ISOLATION);
        }
        _ => {
            world.count("captured_operations", 1);
            world.graphs.entry(capture.id).or_default().push(work);
        }
    }
    Ok(0)
}

/// Waits until a stream has done all that it was given. In a capture that breaks it.
pub(crate) fn synchronize(mut guard: MutexGuard<'static, World>, handle: u64) -> Code {
    let Some(stream) = guard.streams.get(&handle) else { return INVALID_HANDLE };
    if let Some(capture) = stream.capturing {
        guard.invalidate(|other| other.id == capture.id);
        return CAPTURE_UNSUPPORTED;
    }
    let device = stream.device;
    let last = stream.submitted;
    let clock = stream.clock.clone();
    while !guard.has_ended((handle, last)) {
        if let Some(code) = guard.sticky(device) {
            return code;
        }
        guard = wait(guard);
    }
    guard.seen.join(&clock);
    guard.sticky(device).unwrap_or(OK)
}

/// The thread of a stream.
fn run(handle: u64) {
    let mut guard = world();
    loop {
        let Some(stream) = guard.streams.get(&handle) else { return };
        let Some(op) = stream.queue.front() else {
            if stream.destroyed {
                guard.streams.remove(&handle);
                CHANGED.notify_all();
                return;
            }
            guard = wait(guard);
            continue;
        };
        let kind = op.work.kind();
        let blocked = match &op.work {
            Work::Wait { until } => !guard.has_ended(*until),
            _ => guard.gates.get(&kind) == Some(&0),
        };
        let device = stream.device;
        if blocked && guard.sticky(device).is_none() {
            guard = wait(guard);
            continue;
        }
        if let Some(gate) = guard.gates.get_mut(&kind) {
            *gate = gate.saturating_sub(1);
        }
        let delay = guard.delays_us.get(&kind).copied().unwrap_or(0);
        let Some(stream) = guard.streams.get_mut(&handle) else { return };
        let Some(mut op) = stream.queue.pop_front() else { continue };
        stream.running = op.work.host();
        stream.accesses = std::mem::take(&mut op.accesses);
        drop(guard);
        if delay > 0 {
            std::thread::sleep(Duration::from_micros(delay * op.work.count()));
        }
        let failures = op.failures;
        let outcome = execute(handle, op, failures);
        guard = world();
        if let Err(code) = outcome
            && guard.failures(device) == failures
        {
            guard.fail(device, code);
        }
        if let Some(stream) = guard.streams.get_mut(&handle) {
            stream.running.clear();
            stream.accesses.clear();
            stream.done += 1;
        }
        CHANGED.notify_all();
    }
}

/// Carries out an operation of a device that had failed so often when it was submitted.
fn execute(handle: u64, op: Op, failures: u64) -> Result<(), Code> {
    let mut guard = world();
    let Some(device) = guard.streams.get(&handle).map(|stream| stream.device) else {
        return Ok(());
    };
    // What it uses may be gone since, also if the device works again.
    if guard.sticky(device).is_some() || guard.failures(device) != failures {
        return Ok(());
    }
    match op.work {
        Work::Up { to, from } => {
            let target = guard.writable(None, to, from.len as u64)?;
            guard.count("copies_up", 1);
            guard.count("bytes_up", from.len as u64);
            drop(guard);
            if op.watched.is_some_and(|before| before != from.checksum()) {
                world().violation("the source of a copy to the device changed in flight".into());
            }
            target.write(&from_host(from)?);
        }
        Work::Down { to, from } => {
            let source = guard.readable(None, from, to.len as u64)?;
            guard.count("copies_down", 1);
            guard.count("bytes_down", to.len as u64);
            drop(guard);
            if op.watched.is_some() && !to.is_scribbled() {
                let text = "the destination of a copy from the device was used in flight";
                world().violation(text.into());
            }
            let bytes = source.read();
            let pages = world().pages(to);
            match pages {
                Some(pages) => pages.write(to, &bytes).map_err(|_| ILLEGAL_ADDRESS)?,
                None => to.write(&bytes),
            }
        }
        Work::Copy { to, from, len } => {
            let source = guard.readable(None, from, len)?;
            let target = guard.writable(None, to, len)?;
            drop(guard);
            target.write(&source.read());
        }
        Work::Fill { to, pattern, len } => {
            let target = guard.writable(None, to, len)?;
            drop(guard);
            let mut bytes = pattern.repeat((len as usize).div_ceil(pattern.len()));
            bytes.truncate(len as usize);
            target.write(&bytes);
        }
        Work::Kernel { name, arguments: [a, b, c, _] } => {
            guard.count("kernels", 1);
            match name {
                "vmem_copy" | "vmem_slow_copy" => {
                    let source = guard.readable(Some(device), b, c)?;
                    let target = guard.writable(Some(device), a, c)?;
                    drop(guard);
                    target.write(&source.read());
                }
                "vmem_spin" => {
                    drop(guard);
                    std::thread::sleep(Duration::from_nanos(a));
                }
                _ => {
                    let target = guard.writable(Some(device), a, b)?;
                    drop(guard);
                    let mut bytes = target.read();
                    for byte in &mut bytes {
                        *byte =
                            if name == "vmem_fill" { c as u8 } else { byte.wrapping_add(c as u8) };
                    }
                    target.write(&bytes);
                }
            }
        }
        Work::Pieces { table, copies } => {
            guard.count("piece_kernels", 1);
            guard.count("pieces", copies.len() as u64);
            let mut used = copies.iter().flat_map(|copy| copy.work.host()).chain([table]);
            if used.any(|memory| guard.reach(memory) != Reach::Pinned) {
                return Err(ILLEGAL_ADDRESS);
            }
            drop(used);
            let mut ranges = copies.iter().flat_map(|copy| copy.work.accesses(&guard));
            ranges.try_for_each(|Access { range, writes }| {
                let find = if writes { World::writable } else { World::readable };
                find(&guard, Some(device), range.start, range.end - range.start).map(drop)
            })?;
            drop(ranges);
            drop(guard);
            if op.watched.is_some_and(|before| before != table.checksum()) {
                world().violation("the table of a kernel changed in flight".into());
            }
            copies.into_iter().try_for_each(|copy| execute(handle, copy, failures))?;
        }
        Work::HostFunction(function) => {
            if guard.suppress_host_functions {
                guard.count("suppressed_host_functions", 1);
                return Ok(());
            }
            guard.count("host_functions", 1);
            let times = 1 + u32::from(guard.double_host_functions);
            drop(guard);
            let _alone = HOST_FUNCTIONS.lock().unwrap_or_else(PoisonError::into_inner);
            IN_HOST_FUNCTION.set(true);
            (0..times).for_each(|_| function.call());
            IN_HOST_FUNCTION.set(false);
        }
        Work::Record { event } => {
            let count = guard.streams.get(&handle).map_or(0, |stream| stream.done + 1);
            if let Some(event) = guard.events.get_mut(&event)
                && event.last == Some((handle, count))
            {
                event.at = Some(Instant::now());
            }
        }
        Work::Wait { .. } => {}
        Work::Free { address } => {
            guard.free(address).ok();
        }
    }
    Ok(())
}

/// The bytes that the device finds in host memory.
fn from_host(memory: HostMemory) -> Result<Vec<u8>, Code> {
    let pages = world().pages(memory);
    match pages {
        Some(pages) => pages.read(memory).map_err(|_| ILLEGAL_ADDRESS),
        None => Ok(memory.read()),
    }
}
