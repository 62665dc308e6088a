//! What leases cost the thread that launches kernels: a step of 2,000 over resident objects.
//!
//! Invariant: the objects are resident and the stream is busy all the time, as in a service that
//! decodes; what is timed is the thread's own time. There is no bar: it is a cost. Called by
//! `bars`.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyhow::Result;
use vmem::VMemHandle;
use vmem::gpu::VramExt;

use super::raw::{Reader, Small};
use super::report::Report;
use super::timing::{Contender, in_turn, spread};
use super::{Bench, Data, HOST, KIB, MIB, VRAM};
use crate::parts::Outcome;
use crate::user::Env;

/// Leases of a set.
const SET: usize = 64;
/// A kernel is launched for this many leases, as a layer has many blocks.
const BLOCKS: usize = 32;

pub(super) fn run(env: &Env) -> Result<Outcome> {
    let count = env.scaled(2000, 256);
    let len = 16 * KIB;
    let user = env.user()?;
    let data = Data::new(env, count, len);
    let mut report = Report::default();
    let set =
        |set: vmem::VirtualMemoryConfigBuilder| set.disk_capacity(256 * MIB as u64).max_pinned(1.0);
    let bench = Bench::open(env, 2 * count * len + 8 * MIB, 4 * count * len + 64 * MIB, set)?;
    let vmem = &bench.vmem;
    let handles: Vec<VMemHandle> = bench.run(async {
        let mut handles = Vec::new();
        for object in 0..count {
            let handle = vmem.put(data.of(object, len), HOST).await?;
            vmem.promote(&handle, VRAM).await?;
            handles.push(handle);
        }
        Ok(handles)
    })?;
    let stream = user.context.new_stream()?;
    let small = Small::new(&user, KIB)?;
    // Each step ends before the next begins, so none is slowed by a full launch queue.
    let step = |leases: &dyn Fn() -> Result<()>| {
        user.spin(Duration::from_millis(env.scaled(20, 2) as u64), &stream)?;
        let begun = Instant::now();
        leases()?;
        let took = begun.elapsed();
        stream.synchronize()?;
        anyhow::Ok(took.as_secs_f64() * 1e6 / count as f64)
    };
    let launch = |nth: usize| if nth.is_multiple_of(BLOCKS) { small.copy(&stream) } else { Ok(()) };
    let singly = || {
        bench.run(async {
            for (nth, handle) in handles.iter().enumerate() {
                let lease = vmem.device_on(handle, &stream).await?;
                launch(nth)?;
                drop(lease);
            }
            Ok(())
        })
    };
    let in_sets = || {
        bench.run(async {
            for (nth, handles) in handles.chunks(SET).enumerate() {
                let set = vmem.device_set(&stream);
                let set = handles.iter().fold(set, |set, handle| set.read(handle));
                let leases = set.acquire().await?;
                (0..handles.len()).try_for_each(|at| launch(nth * SET + at))?;
                drop(leases);
            }
            Ok(())
        })
    };
    // The least that keeps memory from being reused too early: an event behind each use.
    let events = RefCell::new(Vec::new());
    for _ in 0..count {
        events.borrow_mut().push(user.context.new_event(None)?);
    }
    let by_hand = || {
        user.context.bind_to_thread()?;
        for (nth, event) in events.borrow().iter().enumerate() {
            launch(nth)?;
            event.record(&stream)?;
        }
        Ok(())
    };
    let mut contenders: [Contender<'_>; 3] = [
        ("single", Box::new(|| step(&singly))),
        ("sets of 64", Box::new(|| step(&in_sets))),
        ("an event each", Box::new(|| step(&by_hand))),
    ];
    let figures = in_turn(env.scaled(15, 2), &mut contenders)?;
    drop(contenders);
    for (way, values) in &figures {
        report.tell(format!("us a lease, {way}"), spread(values));
    }
    report.tell("leases", count);
    let mut reader = Reader::new(&user, len)?;
    bench.run(async {
        for (object, handle) in handles.iter().enumerate() {
            let found = reader.object(vmem, handle).await?;
            report.same("an object in device memory", found, data.of(object, len))?;
        }
        Ok(())
    })?;
    drop(handles);
    bench.close()?;
    report.end(env)
}
