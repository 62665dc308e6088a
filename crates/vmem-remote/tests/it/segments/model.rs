//! Three instances and two collectors over three names, at times that a seed chooses, with faults,
//! stale listings, crashes, and pauses that end a lease.
//!
//! Invariant: what a name leads to can be read by each instance that finds it; what an instance has
//! in its hands can be read until its lease has ended; and once all have ended nothing is left but
//! what names lead to.

use std::sync::atomic::{AtomicU64, Ordering};

use rand::Rng;
use vmem_remote::RequestError;
use vmem_testkit::Seed;

use super::super::seed;
use super::*;

const NAMES: [&str; 3] = ["a", "b", "c"];
const SEEDS: u64 = 400;
const STEPS: usize = 60;

struct World {
    bucket: Arc<Bucket>,
    versions: AtomicU64,
    checked: AtomicU64,
    deleted: AtomicU64,
    ended: AtomicU64,
}

fn weather(rng: &mut SmallRng) -> Weather {
    let share = |rng: &mut SmallRng, most| if rng.random_bool(0.5) { most } else { 0 };
    Weather {
        step: rng.random_range(0..8),
        failed: share(rng, 60),
        silent: share(rng, 30),
        late: 150,
        stale: share(rng, 300),
        past: 400,
        of_names: false,
    }
}

/// An instance, and what it has.
struct Actor {
    world: Arc<World>,
    rng: SmallRng,
    instance: Instance,
    held: Vec<Object>,
}

async fn open(world: &World, rng: &mut SmallRng, storm: bool) -> Instance {
    loop {
        let calm = Weather { step: 3, ..Weather::default() };
        let desk = world.bucket.desk(SmallRng::seed_from_u64(rng.random()), calm);
        let storm = if storm { weather(rng) } else { Weather { step: 3, ..Weather::default() } };
        if let Ok(instance) = Instance::open_over(desk.clone()).await {
            desk.change(storm);
            return instance;
        }
    }
}

impl Actor {
    async fn run(world: Arc<World>, mut rng: SmallRng) {
        let instance = open(&world, &mut rng, true).await;
        let mut actor = Actor { world, rng, instance, held: Vec::new() };
        for _ in 0..STEPS {
            let longest = [5, 30, 300, 1500, 3000][actor.rng.random_range(0..5)];
            let pause = actor.rng.random_range(0..longest);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            actor.step().await;
        }
        actor.reopen(false).await;
        actor.instance.desk.change(Weather::default());
        actor.instance.close().await;
    }

    async fn step(&mut self) {
        let name = NAMES[self.rng.random_range(0..3)];
        match self.rng.random_range(0..100) {
            0..25 => {
                let version = self.world.versions.fetch_add(1, Ordering::Relaxed);
                let Ok(object) = self.instance.upload(version).await else { return };
                self.commit(name, object.named(name, version)).await;
                self.keep(object);
            }
            25..33 => {
                let to = NAMES[self.rng.random_range(0..3)];
                let rename = CatalogChange::Rename { from: name.into(), to: to.into() };
                if to != name {
                    let _ = self.instance.names.record(to.into()).await;
                    self.commit(name, vec![rename]).await;
                }
            }
            33..40 => self.commit(name, vec![CatalogChange::Remove { name: name.into() }]).await,
            40..58 => {
                if let Ok(Some(found)) = self.instance.find(name).await {
                    self.check(&found).await;
                    self.keep(found);
                }
            }
            58..70 if !self.held.is_empty() => {
                let nth = self.rng.random_range(0..self.held.len());
                let held = self.held[nth].clone();
                self.check(&held).await;
            }
            70..80 if !self.held.is_empty() => {
                let nth = self.rng.random_range(0..self.held.len());
                let held = self.held.swap_remove(nth);
                let version = self.world.versions.fetch_add(1, Ordering::Relaxed);
                self.commit(name, held.named(name, version)).await;
            }
            80..92 if !self.held.is_empty() => {
                let nth = self.rng.random_range(0..self.held.len());
                self.held.swap_remove(nth);
            }
            92..95 => self.reopen(true).await,
            95..98 => self.reopen(false).await,
            98..100 => self.stall().await,
            _ => {}
        }
    }

    fn keep(&mut self, object: Object) {
        self.held.push(object);
        if self.held.len() > 4 {
            self.held.remove(0);
        }
    }

    /// A commit over what the name is now, which may be lost.
    async fn commit(&mut self, name: &str, changes: Vec<CatalogChange>) {
        if self.instance.names.record(name.into()).await.is_ok() {
            let commit = self.instance.names.commit(changes);
            if self.rng.random_bool(0.05) {
                // Nobody awaits it.
                let limit = Duration::from_millis(self.rng.random_range(0..20));
                let _ = tokio::time::timeout(limit, commit).await;
            } else {
                let _ = commit.await;
            }
        }
    }

    /// What is in hand can be read, unless the bucket does not answer, or the lease has ended.
    async fn check(&mut self, object: &Object) {
        self.world.checked.fetch_add(1, Ordering::Relaxed);
        let Err(error) = self.instance.check(object).await else { return };
        let TierError::Io { source, .. } = &error else { panic!("{error:?}") };
        let cause = source.get_ref().and_then(|it| it.downcast_ref::<RequestError>());
        if !matches!(cause, Some(RequestError::NotFound { .. })) {
            return;
        }
        // It may not have found out yet.
        tokio::time::sleep(4 * GRACE).await;
        assert!(self.instance.tier.stats().is_lease_ended, "{object:?} has gone");
        self.world.ended.fetch_add(1, Ordering::Relaxed);
        self.reopen(true).await;
    }

    /// Another instance takes over from this one, which is killed or closed.
    async fn reopen(&mut self, is_killed: bool) {
        let next = open(&self.world, &mut self.rng, true).await;
        self.held.clear();
        let last = std::mem::replace(&mut self.instance, next);
        if is_killed {
            last.desk.crash();
        } else {
            let _ = last.names.close().await;
            let _ = last.tier.close().await;
        }
    }

    /// The bucket does not answer for longer than a lease lasts.
    async fn stall(&mut self) {
        self.instance.desk.change(Weather { failed: 1000, ..Weather::default() });
        let graces = self.rng.random_range(1..9);
        tokio::time::sleep(GRACE * graces).await;
        let weather = weather(&mut self.rng);
        self.instance.desk.change(weather);
    }
}

async fn collect(world: Arc<World>, mut rng: SmallRng) {
    loop {
        let instance = open(&world, &mut rng, false).await;
        for _ in 0..rng.random_range(1..6) {
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..1500))).await;
            let _ = instance.names.collect().await;
            if let Ok(collected) = instance.names.collect_segments().await {
                world.deleted.fetch_add(collected.deleted, Ordering::Relaxed);
            }
        }
        if rng.random_bool(0.3) {
            instance.desk.crash();
        } else {
            instance.close().await;
        }
    }
}

/// What is left once all instances have ended.
async fn check(world: &World) {
    let last = Instance::open(&world.bucket).await;
    for name in NAMES {
        if let Some(found) = last.find(name).await.unwrap() {
            last.check(&found).await.unwrap();
        }
    }
    // Leases run out, then what nobody uses any more goes.
    tokio::time::sleep(GRACE * 20).await;
    last.names.collect().await.unwrap();
    last.names.collect_segments().await.unwrap();
    let mut named = std::collections::BTreeSet::new();
    for name in NAMES {
        if let Some(found) = last.find(name).await.unwrap() {
            last.check(&found).await.unwrap();
            named.insert(found.version);
        }
    }
    assert!(segments(&world.bucket) <= named.len(), "{:?}", world.bucket.paths());
    assert_eq!(count(&world.bucket, |path| path.contains("/probe")), 0);
    assert!(count(&world.bucket, |path| path.contains("/rounds/")) == 0);
    last.close().await;
}

async fn run(seed: Seed) -> [u64; 3] {
    let zero = || AtomicU64::new(0);
    let world = World {
        bucket: Bucket::new(),
        versions: AtomicU64::new(100),
        checked: zero(),
        deleted: zero(),
        ended: zero(),
    };
    let world = Arc::new(world);
    let rng = |label| seed.fork(label).rng();
    let collectors =
        ["first", "second"].map(|label| tokio::spawn(collect(world.clone(), rng(label))));
    let actors =
        ["one", "other", "third"].map(|label| tokio::spawn(Actor::run(world.clone(), rng(label))));
    for actor in actors {
        actor.await.unwrap();
    }
    collectors.iter().for_each(|collector| collector.abort());
    // What is still on its way arrives.
    tokio::time::sleep(GRACE).await;
    check(&world).await;
    [&world.checked, &world.deleted, &world.ended].map(|count| count.load(Ordering::Relaxed))
}

#[test]
fn segments_go_when_nobody_uses_them_and_no_sooner() {
    let first = seed();
    let is_replay = std::env::var_os("VMEM_SEED").is_some();
    let mut all = [0; 3];
    for nth in 0..if is_replay { 1 } else { SEEDS } {
        let seed = Seed::new(first.value() + nth);
        let _guard = seed.guard("segments");
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_time().start_paused(true).build().unwrap();
        let of_run = runtime.block_on(run(seed));
        all.iter_mut().zip(of_run).for_each(|(all, more)| *all += more);
    }
    let [checked, deleted, ended] = all;
    println!("{checked} objects read, {deleted} segments deleted, {ended} instances ended");
    assert!(is_replay || checked > 5_000 && deleted > 2_000 && ended > 0, "{all:?}");
}
