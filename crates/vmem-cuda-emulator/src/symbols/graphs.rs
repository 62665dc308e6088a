//! Graphs of captured work.
//!
//! Invariant: a launch carries out what was captured, in the order in which it was captured, with
//! the addresses that it had then; whether these still mean something is the caller's matter.
//! Called as the driver's.

use super::{Guard, Handle, Needs, address, enter, handle, stream_of};
use crate::codes::{Code, INVALID_VALUE, OK};
use crate::raw;
use crate::stream;
use crate::world::world;

driver! {
    Context fn cuGraphInstantiateWithFlags(
        instance: *mut Handle, graph: Handle, _flags: u64,
    ) |guard| {
        let mut guard = guard;
        let Some(captured) = guard.graphs.get(&address(graph)).cloned() else {
            return INVALID_VALUE;
        };
        let number = guard.handle();
        guard.graphs.insert(number, captured);
        raw::put(instance, handle(number));
        OK
    }
    Context fn cuGraphUpload(instance: Handle, _stream: Handle) |guard| {
        if guard.graphs.contains_key(&address(instance)) { OK } else { INVALID_VALUE }
    }
    Context fn cuGraphLaunch(instance: Handle, stream: Handle) |guard| {
        let mut guard = guard;
        let number = stream_of(&mut guard, stream);
        let Some(captured) = guard.graphs.get(&address(instance)).cloned() else {
            return INVALID_VALUE;
        };
        guard.count("graphs_launched", 1);
        for work in captured {
            if let Err(code) = stream::submit(guard, number, work) {
                return code;
            }
            guard = world();
        }
        OK
    }
    Context fn cuGraphExecDestroy(instance: Handle) |guard| {
        let mut guard = guard;
        guard.graphs.remove(&address(instance)).map_or(INVALID_VALUE, |_| OK)
    }
    Context fn cuGraphDestroy(graph: Handle) |guard| {
        let mut guard = guard;
        guard.graphs.remove(&address(graph)).map_or(INVALID_VALUE, |_| OK)
    }
}
