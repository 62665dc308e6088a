//! G5: kernels that read objects at random out of a set half as large again as the VRAM budget.
//!
//! Invariant: every contender reads the same objects in the same order with the same kernels and as
//! much device memory; a part of each object, as its kernel found it in the timed pass, is compared
//! after each, and all of every object after the last one. Called by `bars`.
//!
//! The cache by hand is an LRU of device buffers with one stream of copies, which knows what comes
//! next and copies that early: what a user who needs no more than this one loop would write.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cudarc::driver::CudaEvent;
use futures::StreamExt;
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use serde_json::json;
use vmem::VMemHandle;
use vmem::gpu::VramExt;

use super::raw::{Link, Piece, Sink, Source};
use super::report::{Limit, OURS, Report};
use super::timing::{Contender, in_turn};
use super::{Bench, Data, HOST, KIB, MIB, VRAM};
use crate::parts::Outcome;
use crate::user::{Env, User};

/// Leases that are asked for, and copies by hand that are under way, before their turn.
const EARLY: usize = 16;
/// Objects that are announced together, and such groups that are announced before their turn.
const GROUP: usize = 16;
const GROUPS: usize = 4;
/// How skewed the skewed order is.
const SKEW: f64 = 0.99;

pub(super) fn run(env: &Env) -> Result<Outcome> {
    let len = env.scaled(MIB, 64 * KIB);
    let held = env.scaled(512, 96);
    let count = held * 3 / 2;
    let reads = env.scaled(4096, 300);
    let user = env.user()?;
    let mut report = Report::default();
    let data = Data::new(env, count, len);
    let set = |set: vmem::VirtualMemoryConfigBuilder| set.disk_capacity(256 * MIB as u64);
    let bench = Bench::open(env, held * len, count * len * 2 + 64 * MIB, set)?;
    let handles = bench.run(async {
        let mut handles = Vec::new();
        for object in 0..count {
            handles.push(bench.vmem.put(data.of(object, len), HOST).await?);
        }
        Ok(handles)
    })?;
    let sink = Sink::new(&user, len, reads, &user.stream)?;
    let ours = Ours { bench: &bench, user: &user, handles: &handles, sink: &sink };
    let lru = RefCell::new(Lru::new(&user, &data, len, held, count)?);
    for (order, trace) in
        [("uniform", uniform(env.rng(), count, reads)), ("skewed", skewed(env.rng(), count, reads))]
    {
        for announced in [false, true] {
            let compared = RefCell::new(&mut report);
            let timed = |read: &dyn Fn() -> Result<()>| {
                let begun = Instant::now();
                read()?;
                sink.stream().synchronize()?;
                let rate = reads as f64 / begun.elapsed().as_secs_f64();
                let samples = sink.samples(reads, len)?;
                for ((part, found), &object) in samples.into_iter().zip(&trace) {
                    let expected = &data.of(object, len)[part];
                    compared.borrow_mut().same("what a kernel read", &found, expected)?;
                }
                sink.forget()?;
                anyhow::Ok(rate)
            };
            let copy_each = || timed(&|| lru.borrow_mut().copy_each(&user, &sink, &trace));
            let mut contenders: [Contender<'_>; 3] = [
                (OURS, Box::new(|| timed(&|| ours.read(&trace, announced)))),
                ("lru", Box::new(|| timed(&|| lru.borrow_mut().read(&user, &sink, &trace)))),
                ("copies", Box::new(copy_each)),
            ];
            let figures = in_turn(env.scaled(7, 1), &mut contenders)?;
            drop(contenders);
            let limit = Limit::AtLeast(if announced { 1.2 } else { 1.0 });
            let what = if announced { format!("{order}, announced") } else { order.to_owned() };
            report.judge(&what, "objects/s", &figures, &["lru", "copies"], limit);
        }
    }
    let stats = bench.vmem.stats();
    report.tell(
        "set",
        json!({
            "bytes_each": len, "objects": count, "budget_objects": held, "reads": reads,
            "skew": SKEW, "early": EARLY, "announced": GROUP * GROUPS,
            "registered_bytes": stats.registered_bytes, "evictions": stats.evictions,
        }),
    );
    bench.compare_whole(&user, &handles, &data, &mut report)?;
    lru.borrow().compare_whole(&data, &mut report)?;
    bench.close()?;
    report.end(env)
}

fn uniform(mut rng: SmallRng, count: usize, reads: usize) -> Vec<usize> {
    (0..reads).map(|_| rng.random_range(0..count)).collect()
}

/// The nth most read object is read in proportion to n to the minus `SKEW`.
fn skewed(mut rng: SmallRng, count: usize, reads: usize) -> Vec<usize> {
    let mut sums = Vec::with_capacity(count);
    let mut sum = 0.0;
    for nth in 1..=count {
        sum += (nth as f64).powf(-SKEW);
        sums.push(sum);
    }
    let mut objects: Vec<usize> = (0..count).collect();
    objects.shuffle(&mut rng);
    let mut read = |_| {
        let at = rng.random_range(0.0..sum);
        objects[sums.partition_point(|&sum| sum <= at).min(count - 1)]
    };
    (0..reads).map(&mut read).collect()
}

struct Ours<'a> {
    bench: &'a Bench,
    user: &'a User,
    handles: &'a [VMemHandle],
    sink: &'a Sink,
}

impl Ours<'_> {
    /// Reads these objects in order, with some leases asked for before their turn.
    fn read(&self, trace: &[usize], announced: bool) -> Result<()> {
        let vmem = &self.bench.vmem;
        let announce = |group: usize| {
            if let Some(group) = trace.chunks(GROUP).nth(group).filter(|_| announced) {
                let handles: Vec<VMemHandle> =
                    group.iter().map(|&object| self.handles[object].clone()).collect();
                vmem.prefetch_many(&handles, VRAM).detach();
            }
        };
        (0..GROUPS).for_each(announce);
        self.bench.run(async {
            let lease = |&object: &usize| vmem.device_on(&self.handles[object], self.sink.stream());
            let mut leases = futures::stream::iter(trace).map(lease).buffered(EARLY).enumerate();
            while let Some((slot, lease)) = leases.next().await {
                if slot % GROUP == 0 {
                    announce(slot / GROUP + GROUPS);
                }
                let lease = lease?;
                self.sink.read(self.user, &Source::Lease(&lease), slot, Duration::ZERO)?;
            }
            Ok(())
        })
    }
}

/// Device buffers for the objects that were read last.
struct Lru {
    /// The set in pinned memory; a buffer for each slot, and some for copies each time, in device
    /// memory.
    link: Link,
    len: usize,
    slots: Vec<Slot>,
    /// Which slot has an object.
    found: HashMap<usize, usize>,
    /// Slots by when they were used.
    order: BTreeMap<u64, usize>,
    clock: u64,
}

struct Slot {
    object: Option<usize>,
    used: u64,
    /// Its copy has ended.
    ready: CudaEvent,
    /// The last kernel that reads it has ended.
    read: CudaEvent,
}

impl Lru {
    fn new(user: &User, data: &Data, len: usize, held: usize, count: usize) -> Result<Self> {
        ensure!(held > 2 * EARLY, "what is copied early would evict what is to be read");
        let mut link = Link::new(user, count * len, (held + EARLY) * len, 1)?;
        for (object, bytes) in link.host()?.chunks_mut(len).enumerate() {
            bytes.copy_from_slice(data.of(object, len));
        }
        let mut slots = Vec::new();
        let mut order = BTreeMap::new();
        for at in 0..held + EARLY {
            let ready = user.context.new_event(None)?;
            let read = user.context.new_event(None)?;
            slots.push(Slot { object: None, used: at as u64, ready, read });
            if at < held {
                order.insert(at as u64, at);
            }
        }
        let clock = held as u64;
        Ok(Lru { link, len, slots, found: HashMap::new(), order, clock })
    }

    /// Reads these objects in order.
    fn read(&mut self, user: &User, sink: &Sink, trace: &[usize]) -> Result<()> {
        user.context.bind_to_thread()?;
        for &object in &trace[..EARLY.min(trace.len())] {
            self.fetch(object)?;
        }
        for (at, &object) in trace.iter().enumerate() {
            if let Some(&next) = trace.get(at + EARLY) {
                self.fetch(next)?;
            }
            let slot = *self.found.get(&object).context("it was copied early")?;
            self.consume(user, sink, slot, at)?;
        }
        Ok(())
    }

    /// All of what is in the buffers.
    fn compare_whole(&self, data: &Data, report: &mut Report) -> Result<()> {
        let all = self.link.device()?;
        for (slot, found) in self.slots.iter().zip(all.chunks(self.len)) {
            if let Some(object) = slot.object {
                report.same("an object in a buffer", found, data.of(object, self.len))?;
            }
        }
        Ok(())
    }

    /// Copies an object to the device, unless it is there already.
    fn fetch(&mut self, object: usize) -> Result<()> {
        let slot = match self.found.get(&object) {
            Some(&slot) => slot,
            None => {
                let (_, &slot) = self.order.first_key_value().context("there are slots")?;
                if let Some(old) = self.slots[slot].object.replace(object) {
                    self.found.remove(&old);
                }
                self.found.insert(object, slot);
                self.copy(object, slot)?;
                slot
            }
        };
        self.order.remove(&self.slots[slot].used);
        self.clock += 1;
        self.slots[slot].used = self.clock;
        self.order.insert(self.clock, slot);
        Ok(())
    }

    fn copy(&self, object: usize, slot: usize) -> Result<()> {
        let host = object * self.len;
        let device = slot * self.len;
        let len = self.len;
        let copies = self.link.stream(0);
        let slot = &self.slots[slot];
        copies.wait(&slot.read)?;
        self.link.up(0, Piece { host, device, len })?;
        Ok(slot.ready.record(copies)?)
    }

    fn consume(&self, user: &User, sink: &Sink, slot: usize, at: usize) -> Result<()> {
        let from = self.link.part(slot * self.len, self.len);
        let slot = &self.slots[slot];
        sink.stream().wait(&slot.ready)?;
        sink.read(user, &from, at, Duration::ZERO)?;
        Ok(slot.read.record(sink.stream())?)
    }

    /// Reads these objects in order, each copied to the device for that, before its turn.
    fn copy_each(&mut self, user: &User, sink: &Sink, trace: &[usize]) -> Result<()> {
        user.context.bind_to_thread()?;
        let first = self.slots.len() - EARLY;
        for (at, &object) in trace.iter().enumerate() {
            let slot = first + at % EARLY;
            self.copy(object, slot)?;
            self.consume(user, sink, slot, at)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn the_skewed_order_is() {
        let trace = skewed(SmallRng::seed_from_u64(3), 100, 20_000);
        let mut counts = [0_usize; 100];
        trace.iter().for_each(|&object| counts[object] += 1);
        counts.sort_unstable();
        let share = counts[99] as f64 / trace.len() as f64;
        // One divided by the sum of n to the minus `SKEW`, for n to 100.
        assert!((share - 0.19).abs() < 0.02, "{share}");
        assert!(counts[99] > counts[90] && counts[90] > counts[50], "{counts:?}");
    }
}
