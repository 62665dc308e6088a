//! G4: a model of three times the VRAM budget, whose layers are prefetched for the kernels that
//! read them.
//!
//! Invariant: every contender has the same kernels read the same layers in the same order; a part
//! of each layer, as a kernel found it in the timed pass, is compared after each, and all of every
//! layer after the last one. Called by `bars`.
//!
//! Load on demand is a copy of each layer and then its kernels, on one stream, by hand, without
//! overlap. vmem on demand already copies a layer while the kernels of the previous one run, so
//! that little may be left to hide: what vmem hides without prefetches, and what prefetches hide of
//! the rest, is reported, and has no bar.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use vmem::VMemHandle;
use vmem::gpu::VramExt;

use super::raw::{Link, Piece, Sink, Source};
use super::report::{Limit, OURS, Report};
use super::timing::{Contender, in_turn, median, spread};
use super::{Bench, Data, HOST, KIB, MIB, VRAM};
use crate::parts::Outcome;
use crate::user::{Env, User};

/// Layers that are prefetched before their turn.
const PREFETCHED: usize = 4;
/// Layers of the model for each that the budget holds.
const TIMES: usize = 3;
/// Of computing to copying, for each layer.
const RATIOS: [f64; 3] = [0.5, 1.0, 2.0];

pub(super) fn run(env: &Env) -> Result<Outcome> {
    let len = env.scaled(16 * MIB, 256 * KIB);
    let held = env.scaled(32, 20);
    let passes = env.scaled(2, 1);
    let rounds = env.scaled(7, 1);
    let mut report = Report::default();
    let model = Model::new(env, len, held)?;
    let copy = model.copy_time(env.scaled(5, 1))?;
    let kernels = model.kernel_time(env.scaled(5, 1))?;
    report.tell(
        "layer",
        json!({
            "bytes": len, "layers": model.count, "budget_layers": held, "prefetched": PREFETCHED,
            "copy_us": copy.as_secs_f64() * 1e6, "kernels_us": kernels.as_secs_f64() * 1e6,
        }),
    );
    for ratio in RATIOS {
        let work = copy.mul_f64(ratio).saturating_sub(kernels);
        let report = RefCell::new(&mut report);
        let timed = |pass: &dyn Fn() -> Result<()>| {
            let begun = Instant::now();
            (0..passes).try_for_each(|_| pass())?;
            let took = begun.elapsed().as_secs_f64() / passes as f64;
            model.compare(&mut report.borrow_mut())?;
            anyhow::Ok(took)
        };
        let timed = &timed;
        let model = &model;
        let mut contenders: [Contender<'_>; 5] = [
            (OURS, Box::new(|| timed(&|| model.ours(work, PREFETCHED)))),
            ("vmem_no_prefetch", Box::new(|| timed(&|| model.ours(work, 0)))),
            ("resident", Box::new(|| timed(&|| model.resident(work)))),
            ("on_demand", Box::new(|| timed(&|| model.on_demand(work)))),
            ("copies", Box::new(|| Ok(model.copies()?.as_secs_f64()))),
        ];
        let times = in_turn(rounds, &mut contenders)?;
        drop(contenders);
        let demand = median(&times["on_demand"]);
        let compute = median(&times["resident"]);
        let copy = median(&times["copies"]);
        let bound = compute.max(copy);
        let own_demand = median(&times["vmem_no_prefetch"]);
        let of_own = hidden(own_demand, median(&times[OURS]), bound);
        let hidden = |time: f64| hidden(demand, time, bound);
        let each: Vec<f64> = times[OURS].iter().map(|&time| hidden(time)).collect();
        let what = format!("hidden at {ratio}");
        let mut report = report.borrow_mut();
        let bar = report.hold(&what, hidden(median(&times[OURS])), Limit::AtLeast(0.8));
        let mut ways = serde_json::Map::new();
        for (name, times) in &times {
            ways.insert((*name).to_owned(), spread(times));
        }
        report.tell(
            what,
            json!({
                "unit": "s a pass", "figures": ways, "hidden": spread(&each), "bar": bar,
                "hidden_without_prefetch": hidden(own_demand),
                "hidden_of_own_demand": of_own,
                "compute_to_copy": compute / copy, "best_other": "resident",
                "against_resident": median(&times[OURS]) / compute,
            }),
        );
    }
    report.tell("registered_bytes", model.bench.vmem.stats().registered_bytes);
    model.compare_whole(&mut report)?;
    model.bench.close()?;
    report.end(env)
}

/// How much of what a pass could save it did save. Not a number where nothing can be saved, for two
/// negative times would make a good share.
fn hidden(demand: f64, time: f64, bound: f64) -> f64 {
    let could = demand - bound;
    if could > 0.0 { (demand - time) / could } else { f64::NAN }
}

/// The layers, in the store and by hand.
struct Model {
    bench: Bench,
    user: User,
    data: Data,
    handles: Vec<VMemHandle>,
    /// All layers in pinned and in device memory; the sink works on its first lane.
    link: Link,
    pieces: Vec<Piece>,
    sink: Sink,
    len: usize,
    count: usize,
}

impl Model {
    fn new(env: &Env, len: usize, held: usize) -> Result<Self> {
        let user = env.user()?;
        let count = held * TIMES;
        let data = Data::new(env, count, len);
        let all = count * len;
        let set = |set: vmem::VirtualMemoryConfigBuilder| set.disk_capacity(256 * MIB as u64);
        let bench = Bench::open(env, held * len, all + all / 2 + 64 * MIB, set)?;
        let handles = bench.run(async {
            let mut handles = Vec::new();
            for layer in 0..count {
                handles.push(bench.vmem.put(data.of(layer, len), HOST).await?);
            }
            Ok(handles)
        })?;
        let mut link = Link::new(&user, all, all, 1)?;
        for (layer, bytes) in link.host()?.chunks_mut(len).enumerate() {
            bytes.copy_from_slice(data.of(layer, len));
        }
        let sink = Sink::new(&user, len, count, link.stream(0))?;
        let pieces = Piece::row(count, len);
        Ok(Model { bench, user, data, handles, link, pieces, sink, len, count })
    }

    /// One pass over the layers in the store.
    fn ours(&self, work: Duration, early: usize) -> Result<()> {
        let vmem = &self.bench.vmem;
        self.bench.run(async {
            for handle in self.handles.iter().take(early) {
                vmem.prefetch(handle, VRAM).detach();
            }
            for (layer, handle) in self.handles.iter().enumerate() {
                if early > 0 {
                    // Passes follow each other.
                    vmem.prefetch(&self.handles[(layer + early) % self.count], VRAM).detach();
                }
                let lease = vmem.device_on(handle, self.sink.stream()).await?;
                self.sink.read(&self.user, &Source::Lease(&lease), layer, work)?;
            }
            Ok(())
        })?;
        self.sink.stream().synchronize().context("a pass")
    }

    /// One pass over layers that are all in device memory.
    fn resident(&self, work: Duration) -> Result<()> {
        for (layer, piece) in self.pieces.iter().enumerate() {
            self.sink.read(&self.user, &self.link.part(piece.device, self.len), layer, work)?;
        }
        self.sink.stream().synchronize().context("a pass")
    }

    /// One pass in which each layer is copied and then read.
    fn on_demand(&self, work: Duration) -> Result<()> {
        for (layer, &piece) in self.pieces.iter().enumerate() {
            self.link.up(0, piece)?;
            self.sink.read(&self.user, &self.link.part(piece.device, self.len), layer, work)?;
        }
        self.sink.stream().synchronize().context("a pass")
    }

    /// The copies of one pass.
    fn copies(&self) -> Result<Duration> {
        self.user.context.bind_to_thread()?;
        let begun = Instant::now();
        self.pieces.iter().try_for_each(|&piece| self.link.up(0, piece))?;
        self.link.wait()?;
        Ok(begun.elapsed())
    }

    /// How long a layer takes to copy.
    fn copy_time(&self, times: usize) -> Result<Duration> {
        let took = (0..=times).map(|_| Ok(self.copies()?.as_secs_f64()));
        let took = took.collect::<Result<Vec<f64>>>()?;
        Ok(Duration::from_secs_f64(median(&took) / self.count as f64))
    }

    /// How long the kernels of a layer take that do no more than read it.
    fn kernel_time(&self, times: usize) -> Result<Duration> {
        let pass = |_| {
            let begun = Instant::now();
            self.resident(Duration::ZERO)?;
            Ok(begun.elapsed().as_secs_f64())
        };
        let took = (0..=times).map(pass).collect::<Result<Vec<f64>>>()?;
        Ok(Duration::from_secs_f64(median(&took) / self.count as f64))
    }

    /// What kernels found in the last pass.
    fn compare(&self, report: &mut Report) -> Result<()> {
        for (layer, (part, found)) in self.sink.samples(self.count, self.len)?.iter().enumerate() {
            report.same(
                "what a kernel read",
                found,
                &self.data.of(layer, self.len)[part.clone()],
            )?;
        }
        self.sink.forget()
    }

    /// All layers, as the copies of the last passes left them.
    fn compare_whole(&self, report: &mut Report) -> Result<()> {
        self.bench.compare_whole(&self.user, &self.handles, &self.data, report)?;
        for (layer, found) in self.link.device()?.chunks(self.len).enumerate() {
            report.same("a layer by hand", found, self.data.of(layer, self.len))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_share_follows_the_definition() {
        assert_eq!(hidden(2.0, 1.0, 1.0), 1.0);
        assert_eq!(hidden(2.0, 1.5, 1.0), 0.5);
        assert!(
            hidden(1.0, 2.0, 1.5).is_nan(),
            "slower than on demand, which was faster than it can be"
        );
        assert!(hidden(1.0, 1.0, 1.0).is_nan());
    }
}
