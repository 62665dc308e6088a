//! The library's end of the remote control: lines of text in, text out.
//!
//! Invariant: a line that is not understood is answered with `?`, and changes nothing. Called by
//! `control` through one symbol.

#![allow(unsafe_code)]

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::codes::Code;
use crate::world::{CHANGED, Device, OpKind, World, has_owner, world};

/// Carries out the line at `text`, and writes the answer to `answer`. Returns its whole length.
///
/// # Safety
///
/// `text` is readable for `len` bytes, `answer` writable for `space`.
#[unsafe(no_mangle)]
#[allow(unreachable_pub, reason = "it is exported from the library, not from the crate")]
pub unsafe extern "C" fn vmem_emulator_command(
    text: *const u8,
    len: usize,
    answer: *mut u8,
    space: usize,
) -> usize {
    // SAFETY: the caller promises it.
    let text = unsafe { std::slice::from_raw_parts(text, len) };
    let line = String::from_utf8_lossy(text).into_owned();
    let reply = catch_unwind(AssertUnwindSafe(|| command(&line))).unwrap_or_else(|_| "?".into());
    let part = reply.len().min(space);
    // SAFETY: the caller promises `space` bytes there.
    unsafe { std::ptr::copy_nonoverlapping(reply.as_ptr(), answer, part) };
    reply.len()
}

fn command(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let mut world = world();
    let done = obey(&mut world, &words);
    CHANGED.notify_all();
    done.unwrap_or_else(|| "?".into())
}

fn obey(world: &mut World, words: &[&str]) -> Option<String> {
    let number = |nth: usize| words.get(nth)?.parse::<u64>().ok();
    let kind = |nth: usize| OpKind::parse(words.get(nth)?);
    match *words.first()? {
        "reset" => world.reset(),
        "devices" => {
            world.devices = number(1)? as Device;
            world.initialized = false;
        }
        "memory" => world.total = number(1)?,
        "others" => world.others = number(1)?,
        "registered-max" => world.registered_max = number(1)?,
        "queue-max" => world.queue_max = number(1)? as usize,
        "delay" => drop(world.delays_us.insert(kind(1)?, number(2)?)),
        "hold" => drop(world.gates.insert(kind(1)?, 0)),
        "release" => *world.gates.get_mut(&kind(1)?)? += number(2)?,
        "release-all" => world.gates.clear(),
        "addressed-alike" => world.addressed_alike = number(1)? != 0,
        "paged" => world.paged = number(1)? != 0,
        "unmap-waits" => world.unmap_waits = number(1)? != 0,
        "suppress" => world.suppress_host_functions = number(1)? != 0,
        "double" => world.double_host_functions = number(1)? != 0,
        "fail" => {
            let function = words.get(1)?.to_string();
            let nth = number(2)?.max(1);
            world.injected.push((function, nth, number(3)? as Code));
        }
        "refuse" => match number(2)? as Code {
            0 => drop(world.refused.remove(*words.get(1)?)),
            code => drop(world.refused.insert(words.get(1)?.to_string(), code)),
        },
        "invalidate" => world.invalidate(|_| true),
        "sticky" => world.fail(number(1)? as Device, number(2)? as Code),
        "heal" => world.heal(),
        "calls" => return Some(world.calls.get(words.get(1)?).copied().unwrap_or(0).to_string()),
        "violations" => return Some(world.violations.join("\n")),
        "counters" => return Some(counters(world)),
        _ => return None,
    }
    Some("ok".into())
}

fn counters(world: &World) -> String {
    let registered = world.pinned.values().filter(|pinned| !pinned.allocated);
    let in_flight: u64 = world.streams.values().map(|stream| stream.submitted - stream.done).sum();
    let streams = world.streams.iter();
    let owned = streams.filter(|&(&handle, stream)| has_owner(handle) && !stream.destroyed);
    let live = [
        ("device_bytes", world.used(None)),
        ("allocations", world.allocations.len() as u64),
        ("created", world.mapped.created()),
        ("mapped_bytes", world.mapped.mapped_bytes()),
        ("reserved_bytes", world.mapped.reserved_bytes()),
        ("events", world.events.len() as u64),
        ("streams", owned.count() as u64),
        ("registrations", registered.count() as u64),
        ("pinned", world.pinned.values().filter(|pinned| pinned.pages.is_some()).count() as u64),
        ("contexts", world.retained.values().sum::<i64>() as u64),
        ("in_flight", in_flight),
        ("calls", world.calls.values().sum()),
        ("queued_within", world.streams.values().map(|stream| stream.queued(OpKind::Within)).sum()),
        ("queued_up", world.streams.values().map(|stream| stream.queued(OpKind::Up)).sum()),
    ];
    let mut text = String::new();
    let counted = world.counters.iter().map(|(name, count)| (*name, *count));
    for (name, count) in live.into_iter().chain(counted) {
        let _ = writeln!(text, "{name} {count}");
    }
    text
}
