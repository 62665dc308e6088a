//! The reference model against the store: random operations from many tasks, over a simulated disk
//! that is slow, fails and lies, and over the real driver.
//!
//! Invariant: every read is explained by the model or is a typed error that something injected
//! explains; no ledger is ever above its capacity; nothing is left when all handles are gone. Over
//! the simulated disk one seed gives one trace, to the nanosecond of the paused clock.
//! `VMEM_SEED` replays one seed.

mod task;
mod world;

use std::collections::BTreeMap;
use std::env;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::SmallRng;
use task::Task;
use vmem::{PolicyKind, Promotion, VirtualMemoryConfig};
use vmem_testkit::seed::SEED_VARIABLE;
use vmem_testkit::sim::Speed;
use vmem_testkit::{
    DelayDriver, Errno, Fault, FaultDriver, FaultPlan, OpKind, Seed, SimConfig, SimDriver, When,
    driver_under_test, real_driver,
};
use world::{Trace, World};

/// Seeds of the simulated disk; each runs twice.
const SIMULATED: u64 = 40;
/// Seeds of the real driver.
const REAL: u64 = 6;
const TASKS: u64 = 8;
const OPERATIONS: usize = 50;
/// A run takes a fraction of a second; after this it hangs.
const HANGS: Duration = Duration::from_secs(60);
/// Host memory for staging, in bytes.
const STAGING: u64 = 256 << 10;

/// What goes wrong below the store in one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Nothing,
    /// Operations fail, with or without having been done.
    Errors,
    /// The file system is full before the budget is.
    Full,
    /// Bits flip, writes get lost or go astray, all with success reported.
    Damage,
    Everything,
}

impl Trouble {
    const ALL: [Trouble; 5] =
        [Trouble::Nothing, Trouble::Errors, Trouble::Full, Trouble::Damage, Trouble::Everything];

    fn has(self, other: Trouble) -> bool {
        self == other || self == Trouble::Everything
    }

    fn plan(self) -> FaultPlan {
        let chance = When::Chance;
        let mut plan = FaultPlan::new();
        if self.has(Trouble::Errors) {
            plan = plan
                .on(OpKind::Read, chance(0.03), Fault::Error(Errno::IO))
                .on(OpKind::Read, chance(0.03), Fault::Garbage(Errno::IO))
                .on(OpKind::Write, chance(0.03), Fault::Error(Errno::IO))
                .on(OpKind::Write, chance(0.03), Fault::ErrorAfter(Errno::IO))
                .on(OpKind::Punch, chance(0.10), Fault::Error(Errno::IO))
                .on(OpKind::Sync, chance(0.03), Fault::Error(Errno::IO));
        }
        if self.has(Trouble::Full) {
            plan = plan.on(OpKind::Write, chance(0.10), Fault::TornWrite(Errno::NOSPC));
        }
        if self.has(Trouble::Damage) {
            plan = plan
                .on(OpKind::Read, chance(0.02), Fault::BitFlip)
                .on(OpKind::Read, chance(0.01), Fault::ShortRead)
                .on(OpKind::Read, chance(0.01), Fault::MisdirectedRead)
                .on(OpKind::Write, chance(0.01), Fault::LostWrite)
                .on(OpKind::Write, chance(0.01), Fault::MisdirectedWrite);
        }
        plan
    }
}

fn config(rng: &mut SmallRng) -> VirtualMemoryConfig {
    let policies = [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo];
    let promotions = [Promotion::OnNthRead(1), Promotion::OnNthRead(2), Promotion::Never];
    VirtualMemoryConfig::builder()
        .staging_capacity(STAGING)
        .policy(policies[rng.random_range(0..policies.len())])
        .promotion(promotions[rng.random_range(0..promotions.len())])
        .wait_timeout(Duration::from_millis(rng.random_range(50..1000)))
        .build()
        .unwrap()
}

fn speed(rng: &mut SmallRng) -> Speed {
    let millis = Duration::from_millis;
    match rng.random_range(0..3) {
        0 => Speed::default(),
        1 => Speed {
            read_latency: Duration::from_micros(100),
            write_latency: Duration::from_micros(300),
            sync_latency: millis(2),
            bytes_per_second: Some(500_000_000),
            queue_depth: 16,
        },
        _ => Speed {
            read_latency: millis(8),
            write_latency: millis(12),
            sync_latency: millis(30),
            bytes_per_second: Some(20_000_000),
            queue_depth: 2,
        },
    }
}

/// One run over the simulated disk; what happened, in order.
fn simulated(seed: Seed, trouble: Trouble) -> Trace {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut rng = seed.fork("shape").rng();
        let sim = SimDriver::new(SimConfig {
            block_bytes: [512, 4096][rng.random_range(0..2)],
            buffers_writes: rng.random_bool(0.7),
            free_bytes: trouble.has(Trouble::Full).then(|| rng.random_range(1 << 20..3 << 20)),
            speed: speed(&mut rng),
            ..SimConfig::default()
        });
        let delays = Duration::ZERO..Duration::from_millis(rng.random_range(0..5));
        let delayed = DelayDriver::new(sim.clone(), seed.fork("delays"), delays);
        let faulty = FaultDriver::new(delayed, seed.fork("faults"));
        let world = World::open(seed, trouble, &config(&mut rng), &mut rng, faulty, Some(sim));
        run(seed, world).await
    })
}

/// One run over a real file, on two threads and the real clock.
fn real(seed: Seed, trouble: Trouble) -> Trace {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.unwrap().block_on(async {
        let mut rng = seed.fork("shape").rng();
        let driver = real_driver(driver_under_test(), &std::env::temp_dir()).unwrap();
        let faulty = FaultDriver::new(driver, seed.fork("faults"));
        let world = World::open(seed, trouble, &config(&mut rng), &mut rng, faulty, None);
        run(seed, world).await
    })
}

async fn run(seed: Seed, world: World) -> Trace {
    let world = Arc::new(world);
    let tasks = (0..TASKS).map(|number| {
        let mut task = Task::new(world.clone(), number, seed.fork_nth("task", number).rng());
        tokio::spawn(async move {
            for _ in 0..OPERATIONS {
                task.step().await;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        if let Err(panicked) = task.await {
            std::panic::resume_unwind(panicked.into_panic());
        }
    }
    world.finish().await
}

/// The seed of the environment, under every kind of trouble; or as many as asked for.
fn seeds(name: &str, count: u64) -> Vec<(Seed, Trouble)> {
    if env::var_os(SEED_VARIABLE).is_some() {
        let seed = Seed::from_env_or(|| 0);
        return Trouble::ALL.map(|trouble| (seed, trouble)).to_vec();
    }
    let seed = |n| Seed::new(0).fork_nth(name, n);
    (0..count).map(|n| (seed(n), Trouble::ALL[n as usize % Trouble::ALL.len()])).collect()
}

/// Runs every seed; then what has to have happened somewhere, so that the test tests something.
fn over_seeds(
    name: &str,
    count: u64,
    needed: &[&str],
    run: impl Fn(Seed, Trouble) -> Trace + Copy + Send + 'static,
) {
    let began = Instant::now();
    let mut happened: BTreeMap<String, u64> = BTreeMap::new();
    for (seed, trouble) in seeds(name, count) {
        let _guard = seed.guard(name);
        for (what, times) in ends(move || run(seed, trouble)).counts {
            *happened.entry(what).or_default() += times;
        }
    }
    println!("{count} seeds in {:?}: {happened:#?}", began.elapsed());
    if env::var_os(SEED_VARIABLE).is_none() {
        for &what in needed {
            assert!(happened.contains_key(what), "{what} never happened: {happened:#?}");
        }
    }
}

/// Runs it on a thread of its own: a task that spins stops the paused clock, and with it every
/// limit on that clock.
fn ends(run: impl FnOnce() -> Trace + Send + 'static) -> Trace {
    let (done, ended) = mpsc::channel();
    let thread = thread::spawn(move || {
        let trace = run();
        let _the_test_has_given_up = done.send(());
        trace
    });
    if ended.recv_timeout(HANGS) == Err(RecvTimeoutError::Timeout) {
        panic!("no end after {HANGS:?}");
    }
    thread.join().unwrap_or_else(|panicked| std::panic::resume_unwind(panicked))
}

#[test]
fn the_model_explains_every_read_over_a_simulated_disk() {
    let needed = [
        "write: ok",
        "write: dropped",
        "write: Io",
        "write: TierFull",
        "read: ok",
        "read: dropped",
        "read: Io",
        "read: Corrupt",
        "read: TimedOut",
        "read_many: ok",
        "read: AllPinned",
        "write_at: Corrupt",
        "write_with: ok",
        "write_with: panicked",
        "demote: ok",
        "demote: Pinned",
        "pin: ok",
        "free: ok",
        "a bit flips on the disk: ok",
        "the last look: ok",
        "the last look: Corrupt",
    ];
    over_seeds("the_model_explains_every_read", SIMULATED, &needed, |seed, trouble| {
        let first = simulated(seed, trouble);
        let second = simulated(seed, trouble);
        for (nth, (one, other)) in first.steps.iter().zip(&second.steps).enumerate() {
            assert_eq!(one, other, "step {nth} of the replay is another, {trouble:?}");
        }
        assert_eq!(first.steps.len(), second.steps.len(), "the replay has other steps");
        first
    });
}

#[test]
fn the_model_explains_every_read_over_a_real_file() {
    let needed = ["write: ok", "write: dropped", "read: ok", "read: dropped", "demote: ok"];
    over_seeds("the_model_explains_every_read", REAL, &needed, real);
}
