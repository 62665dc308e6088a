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
use crate::races::Clock;
use crate::raw::HostMemory;
use crate::world::{
    Allocation, CHANGED, Capture, Device, IN_HOST_FUNCTION, OpKind, Reach, World, current, wait,
    world,
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
    stream.queue.push_back(Op::issued(work, reach));
    let found = world.races.submit(handle, count, name, &accesses, &clock, &world.seen);
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
        let Some(op) = stream.queue.pop_front() else { continue };
        stream.running = op.work.host();
        drop(guard);
        if delay > 0 {
            std::thread::sleep(Duration::from_micros(delay * op.work.count()));
        }
        let outcome = execute(handle, op);
        guard = world();
        if let Err(code) = outcome {
            guard.fail(device, code);
        }
        if let Some(stream) = guard.streams.get_mut(&handle) {
            stream.running.clear();
            stream.done += 1;
        }
        CHANGED.notify_all();
    }
}

fn execute(handle: u64, op: Op) -> Result<(), Code> {
    let mut guard = world();
    let Some(device) = guard.streams.get(&handle).map(|stream| stream.device) else {
        return Ok(());
    };
    if guard.sticky(device).is_some() {
        return Ok(());
    }
    let place = |guard: &World, address, len| guard.find(address, len).ok_or(ILLEGAL_ADDRESS);
    // A copy finds the memory of any device; a kernel has no access to a peer's.
    let own = |guard: &World, address, len| {
        let found: (Allocation, usize) = place(guard, address, len)?;
        if found.0.device == device { Ok(found) } else { Err(ILLEGAL_ADDRESS) }
    };
    match op.work {
        Work::Up { to, from } => {
            let (allocation, at) = place(&guard, to, from.len as u64)?;
            guard.count("copies_up", 1);
            guard.count("bytes_up", from.len as u64);
            drop(guard);
            if op.watched.is_some_and(|before| before != from.checksum()) {
                world().violation("the source of a copy to the device changed in flight".into());
            }
            let bytes = from_host(from)?;
            lock(&allocation.bytes)[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        Work::Down { to, from } => {
            let (allocation, at) = place(&guard, from, to.len as u64)?;
            guard.count("copies_down", 1);
            guard.count("bytes_down", to.len as u64);
            drop(guard);
            if op.watched.is_some() && !to.is_scribbled() {
                let text = "the destination of a copy from the device was used in flight";
                world().violation(text.into());
            }
            let bytes = lock(&allocation.bytes)[at..at + to.len].to_vec();
            let pages = world().pages(to);
            match pages {
                Some(pages) => pages.write(to, &bytes).map_err(|_| ILLEGAL_ADDRESS)?,
                None => to.write(&bytes),
            }
        }
        Work::Copy { to, from, len } => {
            let (source, from) = place(&guard, from, len)?;
            let (target, to) = place(&guard, to, len)?;
            drop(guard);
            let bytes = lock(&source.bytes)[from..from + len as usize].to_vec();
            lock(&target.bytes)[to..to + bytes.len()].copy_from_slice(&bytes);
        }
        Work::Fill { to, pattern, len } => {
            let (target, to) = place(&guard, to, len)?;
            drop(guard);
            for part in lock(&target.bytes)[to..to + len as usize].chunks_mut(pattern.len()) {
                part.copy_from_slice(&pattern[..part.len()]);
            }
        }
        Work::Kernel { name, arguments: [a, b, c, _] } => {
            guard.count("kernels", 1);
            match name {
                "vmem_copy" | "vmem_slow_copy" => {
                    let (source, from) = own(&guard, b, c)?;
                    let (target, to) = own(&guard, a, c)?;
                    drop(guard);
                    let bytes = lock(&source.bytes)[from..from + c as usize].to_vec();
                    lock(&target.bytes)[to..to + bytes.len()].copy_from_slice(&bytes);
                }
                "vmem_spin" => {
                    drop(guard);
                    std::thread::sleep(Duration::from_nanos(a));
                }
                _ => {
                    let (target, to) = own(&guard, a, b)?;
                    drop(guard);
                    for byte in &mut lock(&target.bytes)[to..to + b as usize] {
                        *byte =
                            if name == "vmem_fill" { c as u8 } else { byte.wrapping_add(c as u8) };
                    }
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
            ranges.try_for_each(|access| {
                own(&guard, access.range.start, access.range.end - access.range.start).map(drop)
            })?;
            drop(ranges);
            drop(guard);
            if op.watched.is_some_and(|before| before != table.checksum()) {
                world().violation("the table of a kernel changed in flight".into());
            }
            copies.into_iter().try_for_each(|copy| execute(handle, copy))?;
        }
        Work::HostFunction(function) => {
            if guard.suppress_host_functions {
                guard.count("suppressed_host_functions", 1);
                return Ok(());
            }
            guard.count("host_functions", 1);
            let times = 1 + u32::from(guard.double_host_functions);
            drop(guard);
            let _alone = lock(&HOST_FUNCTIONS);
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
            if guard.allocations.remove(&address).is_none() {
                guard.violation(format!("device memory {address:x} was freed twice"));
            }
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
