//! One seed, one run.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use rand::Rng;
use vmem_io::driver::Driver;
use vmem_testkit::decorate::TraceEvent;
use vmem_testkit::{
    DelayDriver, Errno, Fault, FaultDriver, FaultPlan, OpKind, Seed, TraceDriver, When,
};

use crate::{Plain, message_of, piece, run, slow_disk, zeros};

async fn workload(seed: Seed) -> Vec<TraceEvent> {
    let faulty = FaultDriver::new(slow_disk(), seed.fork("faults"));
    let fault = Fault::Error(Errno::IO);
    faulty.set(FaultPlan::new().on(OpKind::Write, When::Chance(0.1), fault));
    let delays = Duration::ZERO..Duration::from_millis(20);
    let delayed = DelayDriver::new(faulty, seed.fork("delays"), delays);
    let trace = TraceDriver::new(delayed);
    let tasks = (0..16).map(|n| {
        let trace = trace.clone();
        let seed = seed.fork_nth("task", n);
        tokio::spawn(task(trace, seed))
    });
    join_all(tasks).await;
    trace.close().await.expect("a simulated disk closes");
    trace.events()
}

async fn task(driver: Arc<TraceDriver>, seed: Seed) {
    let mut rng = seed.rng();
    for _ in 0..20 {
        let offset = rng.random_range(0..1 << 20);
        let len = rng.random_range(1..100_000);
        if rng.random() {
            let _may_fail = driver.start_write(run(offset, &vec![1; len])).await;
        } else {
            drop(driver.start_read(zeros(len), piece(offset, len)));
        }
    }
}

#[test]
fn a_seed_replays_to_the_tick() {
    let once = |seed| Seed::simulate("a_seed_replays_to_the_tick", |_| workload(seed));
    let first = once(Seed::new(11));
    assert!(first.len() > 600);
    assert_eq!(first, once(Seed::new(11)));
    assert_ne!(first, once(Seed::new(12)));
}

#[test]
fn a_seed_that_is_no_number_is_refused() {
    // The variable is that of a child, since tests of one process share theirs.
    if std::env::var_os("VMEM_SELFTEST_CHILD").is_some() {
        println!("seed {}", Seed::from_env_or(|| 1).value());
        Seed::run("a_child", |_| panic!("as it should"));
    }
    let child = |seed: &str| {
        let program = std::env::current_exe().expect("a test has a program");
        std::process::Command::new(program)
            .args(["--exact", "replay::a_seed_that_is_no_number_is_refused", "--nocapture"])
            .env("VMEM_SELFTEST_CHILD", "1")
            .env("VMEM_SEED", seed)
            .output()
            .map(|output| {
                let both = [output.stdout, output.stderr].concat();
                String::from_utf8_lossy(&both).into_owned()
            })
            .expect("a test can run its program")
    };
    let said = child("0x10");
    assert!(said.contains("seed 16"), "{said}");
    assert!(said.contains("VMEM_SEED=16 cargo test a_child"), "{said}");
    assert!(child("ten").contains("is not a u64"), "a bad seed was taken");
}

#[test]
fn panic_in_a_simulation_reaches_the_caller() {
    let message = message_of(|| Seed::simulate("panics", |_| async { panic!("here") }));
    assert_eq!(message, "here");
}
