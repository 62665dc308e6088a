//! Streams, captures, host functions and events.
//!
//! Invariant: an event says of its last record, and of no earlier one, whether it has passed.
//! Called as the driver's.

use super::{Guard, Handle, Needs, address, current_device, enter, handle, issue, stream_of};
use crate::codes::{
    CAPTURE_INVALIDATED, CAPTURE_UNSUPPORTED, Code, INVALID_HANDLE, INVALID_VALUE, NOT_READY, OK,
};
use crate::raw::{self, HostFunction};
use crate::stream::{self, Stream, Work};
use crate::world::{CHANGED, Capture, Event, World, current, wait};

fn new_stream(mut guard: Guard, place: *mut Handle, flags: u32, priority: i32) -> Code {
    let number = guard.handle();
    stream::create(&mut guard, number, current_device(), flags, priority);
    guard.count("live_streams", 1);
    raw::put(place, handle(number));
    OK
}

/// A stream that waits for an event of a capture takes part in it.
fn join_capture(world: &mut World, number: u64, id: u64) -> Code {
    let joined = world.streams.values().filter_map(|stream| stream.capturing);
    let Some(capture) = joined.into_iter().find(|capture| capture.id == id) else {
        return INVALID_VALUE;
    };
    match world.streams.get_mut(&number) {
        Some(stream) => {
            stream.capturing.get_or_insert(capture);
            OK
        }
        None => INVALID_HANDLE,
    }
}

driver! {
    Context fn cuStreamCreate(stream: *mut Handle, flags: u32) |guard| {
        new_stream(guard, stream, flags, 0)
    }
    Context fn cuStreamCreateWithPriority(stream: *mut Handle, flags: u32, priority: i32) |guard| {
        new_stream(guard, stream, flags, priority)
    }
    Context fn cuStreamDestroy_v2(stream: Handle) |guard| {
        let mut guard = guard;
        match guard.streams.get_mut(&address(stream)) {
            Some(stream) if !stream.destroyed => {
                stream.destroyed = true;
                CHANGED.notify_all();
                OK
            }
            _ => INVALID_HANDLE,
        }
    }
    Quiet fn cuStreamSynchronize(stream: Handle) |guard| {
        let mut guard = guard;
        let number = stream_of(&mut guard, stream);
        stream::synchronize(guard, number)
    }
    Quiet fn cuStreamQuery(stream: Handle) |guard| {
        let mut guard = guard;
        let number = stream_of(&mut guard, stream);
        let Some(stream) = guard.streams.get(&number) else { return INVALID_HANDLE };
        if let Some(code) = guard.sticky(stream.device) {
            return code;
        }
        if let Some(capture) = stream.capturing {
            guard.invalidate(|other| other.id == capture.id);
            return CAPTURE_UNSUPPORTED;
        }
        if stream.done < stream.submitted {
            return NOT_READY;
        }
        let clock = stream.clock.clone();
        guard.seen.join(&clock);
        OK
    }
    Context fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: u32) |guard| {
        let Some(event) = guard.events.get(&address(event)) else { return INVALID_HANDLE };
        if let Some(code) = guard.sticky(event.device) {
            return code;
        }
        let last = event.last;
        let clock = event.clock.clone();
        let captured = event.captured;
        let mut guard = guard;
        let number = stream_of(&mut guard, stream);
        if let Some(id) = captured {
            return join_capture(&mut guard, number, id);
        }
        let Some(until) = last else { return OK };
        if let Some(stream) = guard.streams.get_mut(&number)
            && stream.capturing.is_none()
        {
            stream.clock.join(&clock);
        }
        stream::submit(guard, number, Work::Wait { until }).map_or_else(|code| code, |_| OK)
    }
    Context fn cuStreamGetPriority(stream: Handle, priority: *mut i32) |guard| {
        let found = guard.streams.get(&address(stream)).map(|stream| stream.priority);
        found.map_or(INVALID_HANDLE, |found| { raw::put(priority, found); OK })
    }
    Context fn cuStreamGetFlags(stream: Handle, flags: *mut u32) |guard| {
        let found = guard.streams.get(&address(stream)).map(|stream| stream.flags);
        found.map_or(INVALID_HANDLE, |found| { raw::put(flags, found); OK })
    }
    Context fn cuStreamGetCtx(stream: Handle, context: *mut Handle) |guard| {
        // The first handles mean a stream of whichever context is current.
        let found = match address(stream) {
            0..=2 => Some(current()),
            number => guard.streams.get(&number).map(|stream| stream.context),
        };
        found.map_or(INVALID_HANDLE, |found| { raw::put(context, handle(found)); OK })
    }
    Context fn cuStreamIsCapturing(stream: Handle, status: *mut i32) |guard| {
        let capturing = guard.streams.get(&address(stream)).and_then(|stream| stream.capturing);
        raw::put(status, capturing.map_or(0, |capture| 1 + i32::from(capture.invalid)));
        OK
    }
    Context fn cuStreamBeginCapture_v2(stream: Handle, mode: i32) |guard| {
        let mut guard = guard;
        let capture = Capture { id: guard.handle(), mode, invalid: false };
        match guard.streams.get_mut(&address(stream)) {
            Some(stream) => {
                stream.capturing = Some(capture);
                OK
            }
            None => INVALID_HANDLE,
        }
    }
    Context fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) |guard| {
        let mut guard = guard;
        raw::put(graph, handle(0));
        let Some(stream) = guard.streams.get_mut(&address(stream)) else { return INVALID_HANDLE };
        let Some(ended) = stream.capturing else { return INVALID_VALUE };
        let takes_part = |stream: &&mut Stream| {
            stream.capturing.is_some_and(|capture| capture.id == ended.id)
        };
        guard.streams.values_mut().filter(takes_part).for_each(|stream| stream.capturing = None);
        if ended.invalid {
            guard.graphs.remove(&ended.id);
            return CAPTURE_INVALIDATED;
        }
        guard.graphs.entry(ended.id).or_default();
        raw::put(graph, handle(ended.id));
        OK
    }
    Context fn cuLaunchHostFunc(
        stream: Handle, function: Option<unsafe extern "C" fn(Handle)>, argument: Handle,
    ) |guard| {
        let Some(function) = function else { return INVALID_VALUE };
        let function = HostFunction { function, argument: argument.expose_provenance() };
        issue(guard, stream, Work::HostFunction(function))
    }

    Context fn cuEventCreate(event: *mut Handle, _flags: u32) |guard| {
        let mut guard = guard;
        let number = guard.handle();
        guard.events.insert(number, Event { device: current_device(), ..Event::default() });
        raw::put(event, handle(number));
        OK
    }
    Context fn cuEventDestroy_v2(event: Handle) |guard| {
        let mut guard = guard;
        guard.events.remove(&address(event)).map_or(INVALID_HANDLE, |_| OK)
    }
    Context fn cuEventRecord(event: Handle, stream: Handle) |guard| {
        let mut guard = guard;
        let number = stream_of(&mut guard, stream);
        let Some(recorded) = guard.events.get(&address(event)) else { return INVALID_HANDLE };
        // Both are of one context.
        if guard.streams.get(&number).is_none_or(|stream| stream.device != recorded.device) {
            return INVALID_HANDLE;
        }
        issue(guard, stream, Work::Record { event: address(event) })
    }
    Quiet fn cuEventQuery(event: Handle) |guard| {
        let mut guard = guard;
        let Some(event) = guard.events.get(&address(event)) else { return INVALID_HANDLE };
        if let Some(code) = guard.sticky(event.device) {
            return code;
        }
        let last = event.last;
        let clock = event.clock.clone();
        let captured = event.captured;
        if let Some(code) = guard.captured_event(captured) {
            return code;
        }
        if last.is_some_and(|last| !guard.has_ended(last)) {
            return NOT_READY;
        }
        guard.seen.join(&clock);
        OK
    }
    Quiet fn cuEventSynchronize(event: Handle) |guard| {
        let mut guard = guard;
        let Some(event) = guard.events.get(&address(event)) else { return INVALID_HANDLE };
        let device = event.device;
        let last = event.last;
        let clock = event.clock.clone();
        let captured = event.captured;
        if let Some(code) = guard.captured_event(captured) {
            return code;
        }
        while last.is_some_and(|last| !guard.has_ended(last)) && guard.sticky(device).is_none() {
            guard = wait(guard);
        }
        guard.seen.join(&clock);
        guard.sticky(device).unwrap_or(OK)
    }
    Context fn cuEventElapsedTime(milliseconds: *mut f32, from: Handle, to: Handle) |guard| {
        let at = |event: Handle| guard.events.get(&address(event)).and_then(|event| event.at);
        let (Some(from), Some(to)) = (at(from), at(to)) else { return NOT_READY };
        raw::put(milliseconds, to.duration_since(from).as_secs_f32() * 1000.0);
        OK
    }

}
