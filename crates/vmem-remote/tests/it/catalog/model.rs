//! Two writers, a reader and a collector over two names, at times that a seed chooses, with faults,
//! stale listings and crashes at any step.
//!
//! Invariant, checked over the log of what was created: generations of a name follow each other and
//! each is created once; no version that was acknowledged is lost, or replaced by one that did not
//! know it; what a reader finds is never older than what it found before, or than what was
//! acknowledged before it asked.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use tokio::time::sleep;
use vmem_core::VirtualMemoryError;
use vmem_core::backend::{Catalog, CatalogChange};
use vmem_remote::{BucketCatalog, RemoteOptions};
use vmem_testkit::Seed;

use super::super::seed;
use super::bucket::{Bucket, Created, Desk, Intent, Weather};
use super::{Table, object, open_over, put, remove, rename};

const NAMES: [&str; 2] = ["a", "b"];
const SEEDS: u64 = 2500;
const COMMITS: usize = 6;

/// Short times, in the proportions that are needed of them.
fn options() -> RemoteOptions {
    RemoteOptions {
        request_timeout: Duration::from_millis(100),
        total_timeout: Duration::from_millis(200),
        grace: Duration::from_millis(1000),
        tries: 3,
        // No random pauses: the seed alone chooses.
        backoff: Duration::ZERO,
        circuit_failures: u32::MAX,
        ..RemoteOptions::default()
    }
}

fn weather(rng: &mut SmallRng) -> Weather {
    let share = |rng: &mut SmallRng, most| if rng.random_bool(0.5) { most } else { 0 };
    Weather {
        step: rng.random_range(0..8),
        failed: share(rng, 80),
        silent: share(rng, 40),
        late: 150,
        stale: share(rng, 300),
        past: 300,
        of_names: false,
    }
}

/// What all actors of a run share.
struct World {
    bucket: Arc<Bucket>,
    table: Arc<Table>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    commits: u64,
    /// Commits that succeeded, with the names that each has changed.
    acknowledged: BTreeSet<(u64, &'static str)>,
    /// Commits that failed since another had won.
    lost: BTreeSet<u64>,
    /// Commits that each writer made, since it may go on from those whose outcome is unknown.
    writers: BTreeMap<u64, usize>,
}

impl World {
    /// The number of the newest generation of a name that was acknowledged.
    fn floor(&self, name: &'static str) -> u64 {
        let state = self.state.lock();
        let is_known = |it: &&Created| state.acknowledged.contains(&(it.intent.commit, name));
        let created = self.bucket.created(name);
        created.iter().rev().find(is_known).map_or(0, |created| created.number)
    }

    /// Which generation this version is: the first that is not older than `floor`. None, unless
    /// the name never had it since.
    fn generation(&self, name: &str, version: Option<u64>, floor: u64) -> Option<u64> {
        if version.is_none() && floor == 0 {
            return Some(0);
        }
        let created = self.bucket.created(name);
        let mut later = created.iter().filter(|it| it.number >= floor);
        later.find(|it| it.intent.makes == version).map(|it| it.number)
    }

    async fn open(&self, rng: &mut SmallRng) -> (Arc<BucketCatalog>, Arc<Desk>) {
        loop {
            let calm = Weather { step: 3, ..Weather::default() };
            let calm = self.bucket.desk(seed_of(rng).rng(), calm);
            let storm = weather(rng);
            let opened = BucketCatalog::open(calm.clone(), options(), self.table.clone()).await;
            if let Ok(catalog) = opened {
                calm.change(storm);
                return (catalog, calm);
            }
        }
    }
}

fn seed_of(rng: &mut SmallRng) -> Seed {
    Seed::new(rng.random())
}

async fn pause(rng: &mut SmallRng) {
    // Mostly short, at times longer than half the grace, or than all of it.
    let longest = [5, 30, 30, 700, 1500][rng.random_range(0..5)];
    sleep(Duration::from_millis(rng.random_range(0..longest))).await;
}

/// An instance that commits, from what it was shown last.
struct Writer {
    nth: usize,
    world: Arc<World>,
    rng: SmallRng,
    catalog: Arc<BucketCatalog>,
    desk: Arc<Desk>,
    /// The version that each name has, as far as it was shown.
    shown: BTreeMap<&'static str, Option<u64>>,
}

impl Writer {
    async fn run(world: Arc<World>, nth: usize, mut rng: SmallRng) {
        let (catalog, desk) = world.open(&mut rng).await;
        let mut writer = Writer { nth, world, rng, catalog, desk, shown: BTreeMap::new() };
        for _ in 0..COMMITS {
            pause(&mut writer.rng).await;
            if writer.rng.random_bool(0.1) {
                let limit = Duration::from_millis(writer.rng.random_range(0..40));
                let _ = tokio::time::timeout(limit, writer.commit()).await;
                writer.crash().await;
            } else {
                writer.commit().await;
            }
        }
    }

    /// Whatever is under way ends, and another instance takes over.
    async fn crash(&mut self) {
        self.desk.crash();
        let (catalog, desk) = self.world.open(&mut self.rng).await;
        self.catalog = catalog;
        self.desk = desk;
        self.shown.clear();
    }

    /// The version of the name, looked up unless it was shown before.
    async fn shown(&mut self, name: &'static str) -> Option<Option<u64>> {
        if let Some(shown) = self.shown.get(name)
            && self.rng.random_bool(0.7)
        {
            return Some(*shown);
        }
        self.shown.remove(name);
        let floor = self.world.floor(name);
        let found = self.catalog.find(name.into()).await.ok()?;
        let version = found.map(|object| {
            assert_eq!(object, super::object(1, object.record.version, 1), "another body");
            object.record.version
        });
        let generation = self.world.generation(name, version, floor);
        assert!(generation.is_some(), "{name} is {version:?}, before generation {floor}");
        self.shown.insert(name, version);
        Some(version)
    }

    async fn commit(&mut self) {
        let at = self.rng.random_range(0..2);
        let name = NAMES[at];
        let to = NAMES[1 - at];
        let Some(knows) = self.shown(name).await else { return };
        let kind = self.rng.random_range(0..10);
        let commit = {
            let mut state = self.world.state.lock();
            state.commits += 1;
            let commit = state.commits;
            state.writers.insert(commit, self.nth);
            commit
        };
        let version = 100 + commit;
        match (kind, knows) {
            (0..2, Some(_)) => {
                let plan = [(name, Intent { commit, knows, makes: None })];
                self.make(&plan, remove(name)).await;
            }
            (2..4, Some(_)) => {
                let Some(replaced) = self.shown(to).await else { return };
                let plan = [
                    (to, Intent { commit, knows: replaced, makes: knows }),
                    (name, Intent { commit, knows, makes: None }),
                ];
                self.make(&plan, rename(name, to)).await;
            }
            _ => {
                let plan = [(name, Intent { commit, knows, makes: Some(version) })];
                self.make(&plan, put(name, &object(1, version, 1))).await;
            }
        }
    }

    async fn make(&mut self, plan: &[(&'static str, Intent)], changes: Vec<CatalogChange>) {
        for (name, intent) in plan {
            self.desk.intend(name, *intent);
        }
        let outcome = self.catalog.commit(changes).await;
        let commit = plan[0].1.commit;
        match outcome {
            Ok(()) => {
                let mut state = self.world.state.lock();
                for (name, intent) in plan {
                    self.shown.insert(name, intent.makes);
                    state.acknowledged.insert((commit, name));
                }
            }
            Err(error) => {
                self.shown.retain(|name, _| plan.iter().all(|(changed, _)| changed != name));
                let is_lost = matches!(
                    error,
                    VirtualMemoryError::NameExists { .. }
                        | VirtualMemoryError::NameNotFound { .. }
                        | VirtualMemoryError::VersionChanged { .. }
                );
                assert!(is_lost || matches!(error, VirtualMemoryError::Io { .. }), "{error:?}");
                if is_lost && plan.len() == 1 {
                    self.world.state.lock().lost.insert(commit);
                }
            }
        }
    }
}

async fn read(world: Arc<World>, mut rng: SmallRng) {
    let (catalog, _desk) = world.open(&mut rng).await;
    let mut seen = BTreeMap::from(NAMES.map(|name| (name, 0)));
    for _ in 0..4 * COMMITS {
        pause(&mut rng).await;
        let name = NAMES[rng.random_range(0..2)];
        let floor = world.floor(name).max(seen[name]);
        if rng.random_bool(0.2) {
            let Ok(page) = catalog.names("".into(), Bound::Unbounded, 9).await else { continue };
            for (name, record) in page {
                let (name, floor) = seen.get_key_value(&*name).unwrap();
                let generation = world.generation(name, Some(record.version), *floor);
                assert!(generation.is_some(), "{name} went back to {}", record.version);
            }
            continue;
        }
        let Ok(found) = catalog.record(name.into()).await else { continue };
        let version = found.map(|record| record.version);
        let generation = world.generation(name, version, floor);
        let Some(generation) = generation else {
            panic!("{name} is {version:?}, which is before generation {floor}");
        };
        seen.insert(name, generation);
    }
}

async fn collect(world: Arc<World>, mut rng: SmallRng) {
    let (catalog, _desk) = world.open(&mut rng).await;
    for _ in 0..4 * COMMITS {
        pause(&mut rng).await;
        let _ = catalog.collect().await;
    }
}

/// What the log of a name says once all have ended.
async fn check(world: &World, name: &'static str) {
    let created = world.bucket.created(name);
    let numbers: Vec<_> = created.iter().map(|it| it.number).collect();
    assert_eq!(numbers, (1..=created.len() as u64).collect::<Vec<_>>(), "{name}: each once");
    let state = world.state.lock();
    let is_acknowledged = |it: &Created| state.acknowledged.contains(&(it.intent.commit, name));
    let is_lost = |it: &Created| state.lost.contains(&it.intent.commit);
    for (at, it) in created.iter().enumerate() {
        assert!(!is_lost(it), "{name}: {it:?} was reported as lost");
        // A writer goes on from what its own commits have made that were not acknowledged.
        let mut before = created[..at].iter().rev();
        let is_own = |before: &&Created| {
            let writer = |it: &Created| state.writers[&it.intent.commit];
            before.intent.makes != it.intent.knows
                && !is_acknowledged(before)
                && writer(before) == writer(it)
        };
        let base = before.find(|before| !is_own(before));
        let makes = base.and_then(|base| base.intent.makes);
        assert_eq!(makes, it.intent.knows, "{name}: {it:?} replaced {base:?}");
    }
    for (commit, of) in state.acknowledged.iter().filter(|(_, of)| *of == name) {
        let made = created.iter().filter(|it| it.intent.commit == *commit).count();
        assert_eq!(made, 1, "{of}: commit {commit} was acknowledged");
    }
}

async fn run(seed: Seed) -> (usize, usize) {
    let world =
        Arc::new(World { bucket: Bucket::new(), table: Arc::default(), state: Mutex::default() });
    let rng = |label| seed.fork(label).rng();
    let tasks = [
        tokio::spawn(Writer::run(world.clone(), 1, rng("one"))),
        tokio::spawn(Writer::run(world.clone(), 2, rng("other"))),
        tokio::spawn(read(world.clone(), rng("reader"))),
        tokio::spawn(collect(world.clone(), rng("collector"))),
    ];
    for task in tasks {
        task.await.unwrap();
    }
    // What is still on its way arrives.
    sleep(Duration::from_secs(10)).await;
    let calm = world.bucket.desk(rng("end"), Weather::default());
    let last = open_over(calm, options(), &world.table).await;
    for name in NAMES {
        check(&world, name).await;
        let expected = world.bucket.created(name).last().and_then(|it| it.intent.makes);
        assert_eq!(super::version(&last, name).await, expected, "{name}");
    }
    let state = world.state.lock();
    (state.acknowledged.len(), state.lost.len())
}

#[test]
fn interleavings_of_writers_lose_no_version() {
    let first = seed();
    let is_replay = std::env::var_os("VMEM_SEED").is_some();
    let mut acknowledged = 0;
    let mut lost = 0;
    for nth in 0..if is_replay { 1 } else { SEEDS } {
        let seed = Seed::new(first.value() + nth);
        let _guard = seed.guard("interleavings");
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_time().start_paused(true).build().unwrap();
        let outcome = runtime.block_on(run(seed));
        acknowledged += outcome.0;
        lost += outcome.1;
    }
    println!("{acknowledged} commits acknowledged, {lost} lost");
    assert!(is_replay || (acknowledged > 10_000 && lost > 500), "{acknowledged}, {lost}");
}
