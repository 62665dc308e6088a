//! G3: the time from the end of work on the device until the task that waits for it runs again, and
//! its cost.
//!
//! Invariant: each way waits for the same work, a kernel of known length and a small copy within
//! device memory, on a task of a runtime of several threads; and is measured in the same way.
//! Called by `bars`.
//!
//! The figure is T = (the task runs again) - (the launch returned) - (the length of the kernel,
//! by events around it). It includes the time from the launch to the start of the kernel, and the
//! copy: both are the same for all ways. vmem is measured by `gather`, which waits for work of the
//! user and then does no more than a small copy. It is called while the kernel runs, but hands its
//! copy to the driver only once the kernel's event has passed: that is two completions one after
//! the other, each with a notice and a wake, where the others have one. `finish` of a lease that
//! changed a small object is reported beside it: it copies to the host after the kernel, too.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::CudaEvent;
use serde_json::json;
use vmem::gpu::VramExt;
use vmem::{VMemHandle, VirtualMemory};

use super::raw::{self, Signal, Small};
use super::report::{Limit, OURS, Report};
use super::timing::{Contender, Figures, in_turn, percentile, spread};
use super::{Bench, Data, HOST, MIB, VRAM};
use crate::parts::Outcome;
use crate::user::{Env, User, processor_time};

/// The length of the kernel: longer than it takes to ask for a notice.
const KERNEL: Duration = Duration::from_micros(200);
/// Bytes that are copied behind the kernel.
const LEN: usize = 256;
/// The interval between two looks of a poll.
const POLL: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, Debug)]
enum How {
    Gather,
    Finish,
    HostFunction,
    EventThread,
    Poll,
}

const WAYS: [(&str, How); 5] = [
    (OURS, How::Gather),
    ("vmem_finish", How::Finish),
    ("host_function", How::HostFunction),
    ("event_thread", How::EventThread),
    ("poll_1ms", How::Poll),
];

pub(super) fn run(env: &Env) -> Result<Outcome> {
    let blocks = env.scaled(25, 1);
    let block = env.scaled(100, 10);
    let data = Data::new(env, 2, LEN);
    let bench = Bench::open(env, 8 * MIB, 64 * MIB, |set| set.disk_capacity(64 * MIB as u64))?;
    let rig = Rig::new(env, &bench, &data)?;
    let rig = RefCell::new(Some(rig));
    let seen: RefCell<BTreeMap<&str, Vec<Vec<f64>>>> = RefCell::default();
    let mut report = Report::default();
    let compared = RefCell::new(&mut report);
    let mut contenders: Vec<Contender<'_>> = Vec::new();
    for (name, how) in WAYS {
        let bench = &bench;
        let rig = &rig;
        let seen = &seen;
        let compared = &compared;
        let data = &data;
        let round = move || {
            let mut taken = rig.borrow_mut().take().context("a block failed")?;
            let before = processor_time()?;
            let (rest, late) = bench.run(async {
                let task = tokio::spawn(async move {
                    let late = taken.block(how, block).await;
                    (taken, late)
                });
                task.await.map_err(|_| anyhow!("a block panicked"))
            })?;
            let used = processor_time()?.saturating_sub(before);
            rest.compare(how, data, &mut compared.borrow_mut())?;
            rig.replace(Some(rest));
            seen.borrow_mut().entry(name).or_default().push(late?);
            Ok(used.as_secs_f64() * 1e6 / block as f64)
        };
        contenders.push((name, Box::new(round)));
    }
    let costs = in_turn(blocks, &mut contenders)?;
    drop(contenders);
    tell(&mut report, &costs, &seen.into_inner())?;
    drop(rig);
    bench.close()?;
    report.end(env)
}

fn tell(
    report: &mut Report,
    costs: &Figures,
    seen: &BTreeMap<&'static str, Vec<Vec<f64>>>,
) -> Result<()> {
    // The first block does not count.
    let each = |share: f64| -> Figures {
        let shares = |blocks: &Vec<Vec<f64>>| {
            blocks.iter().skip(1).map(|block| percentile(block, share)).collect::<Vec<_>>()
        };
        seen.iter().map(|(&name, blocks)| (name, shares(blocks))).collect()
    };
    let others = ["host_function", "event_thread"];
    let middle = each(0.5);
    report.judge("p50 by blocks", "us", &middle, &others, Limit::AtMost(1.3));
    report.judge("p50 against a poll", "us", &middle, &["poll_1ms"], Limit::AtMost(0.1));
    let mut ways = serde_json::Map::new();
    for (name, blocks) in seen {
        let all: Vec<f64> = blocks.iter().skip(1).flatten().copied().collect();
        let cost = costs.get(name).context("each has a cost")?;
        let value = json!({
            "p50_us": percentile(&all, 0.5), "p99_us": percentile(&all, 0.99), "times": all.len(),
            "processor_us_each": spread(cost),
        });
        ways.insert((*name).to_owned(), value);
        if *name == OURS {
            let bar = report.hold("p99", percentile(&all, 0.99), Limit::AtMost(100.0));
            report.tell("p99 in us", bar);
        }
    }
    report.tell("ways", ways);
    report.tell("kernel_us", KERNEL.as_micros() as u64);
    report.tell(
        "how",
        "vmem: gather of 256 bytes, which waits for the kernel and then for its copy; the others \
         queue the same copy behind the kernel and wait once; a flag in pinned memory wakes \
         nothing without polling and takes no part",
    );
    Ok(())
}

/// All that a block needs; it moves to the task.
struct Rig {
    user: User,
    vmem: VirtualMemory,
    /// In device memory.
    handle: VMemHandle,
    /// Kernels change it.
    changed: VMemHandle,
    /// How often a kernel has changed it.
    changes: u8,
    small: Small,
    begin: CudaEvent,
    end: CudaEvent,
    signal: &'static Signal,
    sleeper: Sleeper,
    _pin: vmem::PinGuard,
}

impl Rig {
    fn new(env: &Env, bench: &Bench, data: &Data) -> Result<Self> {
        let user = env.user()?;
        let vmem = bench.vmem.clone();
        let (handle, changed, pin) = bench.run(async {
            let handle = vmem.put(data.of(0, LEN), HOST).await?;
            let changed = vmem.put(data.of(1, LEN), HOST).await?;
            vmem.promote(&changed, VRAM).await?;
            let pin = vmem.pin(&handle, VRAM).await?;
            Ok((handle, changed, pin))
        })?;
        let small = Small::new(&user, LEN)?;
        small.from.write(data.of(0, LEN), &user.stream)?;
        let begin = raw::timed_event(&user)?;
        let end = raw::timed_event(&user)?;
        let signal = Signal::new();
        let sleeper = Sleeper::start(&user, signal)?;
        Ok(Rig {
            user,
            vmem,
            handle,
            changed,
            changes: 0,
            small,
            begin,
            end,
            signal,
            sleeper,
            _pin: pin,
        })
    }

    /// Works and waits this many times; returns how late the task was each time, in microseconds.
    async fn block(&mut self, how: How, times: usize) -> Result<Vec<f64>> {
        let mut late = Vec::with_capacity(times);
        for _ in 0..times {
            late.push(self.once(how).await.with_context(|| format!("{how:?}"))?);
        }
        Ok(late)
    }

    async fn once(&mut self, how: How) -> Result<f64> {
        let stream = self.user.stream.clone();
        let mut lease = match how {
            How::Finish => Some(self.vmem.device_mut_on(&self.changed, &stream).await?),
            _ => None,
        };
        self.begin.record(&stream)?;
        self.user.spin(KERNEL, &stream)?;
        let launched = Instant::now();
        self.end.record(&stream)?;
        match how {
            How::Gather => {
                let target = raw::target(&mut self.small.to, &stream);
                self.vmem.gather(&[(&self.handle, 0..LEN, 0)], &target).await?;
            }
            How::Finish => {
                let mut lease = lease.take().context("a lease")?;
                raw::add(&self.user, &mut lease, 1)?;
                self.changes = self.changes.wrapping_add(1);
                lease.finish().await?;
            }
            How::HostFunction => {
                self.small.copy(&stream)?;
                self.signal.fire_behind(&stream)?;
                self.signal.wait().await;
            }
            How::EventThread => {
                self.small.copy(&stream)?;
                self.sleeper.record(&stream)?;
                self.signal.wait().await;
            }
            How::Poll => {
                self.small.copy(&stream)?;
                let event = stream.record_event(None)?;
                while !event.try_is_complete()? {
                    tokio::time::sleep(POLL).await;
                    // The task may run on another thread now.
                    self.user.context.bind_to_thread()?;
                }
            }
        }
        let took = launched.elapsed();
        let kernel = f64::from(self.begin.elapsed_ms(&self.end)?) * 1e3;
        Ok(took.as_secs_f64() * 1e6 - kernel)
    }

    /// What was copied, and what was changed.
    fn compare(&self, how: How, data: &Data, report: &mut Report) -> Result<()> {
        match how {
            How::Finish => {
                let runtime = tokio::runtime::Builder::new_current_thread().build()?;
                let found = runtime.block_on(self.vmem.read(&self.changed))?;
                let plus = |byte: &u8| byte.wrapping_add(self.changes);
                let expected: Vec<u8> = data.of(1, LEN).iter().map(plus).collect();
                report.same("what kernels changed", &found, &expected)
            }
            _ => {
                let found = self.small.to.read(&self.user.stream)?;
                report.same("what was copied", &found, data.of(0, LEN))?;
                // So that the next block has to copy it.
                self.small.to.write(&[0; LEN], &self.user.stream)
            }
        }
    }
}

/// A thread that sleeps in the driver until an event has passed.
struct Sleeper {
    events: mpsc::Sender<CudaEvent>,
    back: mpsc::Receiver<CudaEvent>,
}

impl Sleeper {
    fn start(user: &User, signal: &'static Signal) -> Result<Self> {
        let (events, inbox) = mpsc::channel::<CudaEvent>();
        let (give_back, back) = mpsc::channel();
        give_back.send(raw::sleeping_event(user)?)?;
        let run = move || {
            while let Ok(event) = inbox.recv() {
                let passed = event.synchronize();
                // Before the signal: the waiter that it wakes finds the event here.
                let given = give_back.send(event);
                // After an error too, which the waiter finds itself.
                signal.fire();
                if passed.is_err() || given.is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("sleeper".into()).spawn(run).context("a thread")?;
        Ok(Sleeper { events, back })
    }

    /// Has the thread fire its signal behind what is queued.
    fn record(&self, stream: &cudarc::driver::CudaStream) -> Result<()> {
        let event = self.back.try_recv().context("the event is under way")?;
        event.record(stream)?;
        let sent = self.events.send(event);
        ensure!(sent.is_ok(), "the thread that sleeps has gone");
        Ok(())
    }
}
