//! What it costs to copy down what kernels wrote, by each time of writing back.
//!
//! Invariant: kernels write each object several times, over a device that holds all of them; then
//! all of it is written back, by a flush or because other objects take its place, and is compared.
//! On eviction each object is copied once. The rates are beside that of copies by hand of the same
//! length. Called by `bars`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vmem::gpu::VramExt;
use vmem::{VMemHandle, WriteBack};

use super::raw::{Link, Piece, add};
use super::report::{Limit, Report};
use super::timing::{Contender, in_turn, median};
use super::{Bench, Data, HOST, KIB, MIB, VRAM};
use crate::parts::Outcome;
use crate::user::{Env, User};

/// How often each object is written.
const STEPS: u8 = 8;

pub(super) fn run(env: &Env) -> Result<Outcome> {
    let mut report = Report::default();
    let user = env.user()?;
    for (len, count) in [(64 * KIB, 1024), (4 * MIB, 64)] {
        let len = env.scaled(len, len / 16);
        let count = env.scaled(count, 16);
        let all = len * count;
        let link = by_hand(env, &user, len, count)?;
        let after = WriteBack::After(Duration::from_millis(5));
        let ways = [
            ("eager", WriteBack::Eager, false),
            ("after 5 ms", after, false),
            ("flushed", WriteBack::OnEvict, false),
            ("evicted", WriteBack::OnEvict, true),
        ];
        for (name, write_back, is_evicted) in ways {
            let cost = one_way(env, &user, &mut report, (len, count), write_back, is_evicted)
                .with_context(|| format!("{name}, {count} of {len} bytes"))?;
            let moved = cost.bytes_down as f64 / all as f64;
            let what = format!("{name}, {count} of {} KiB", len / KIB);
            let rate = cost.bytes_down as f64 / cost.down.as_secs_f64() / (1 << 30) as f64;
            let mut figure = json!({
                "steps": STEPS,
                "bytes_down": cost.bytes_down,
                "times_the_objects": moved,
                "us_a_step_and_object":
                    cost.steps.as_secs_f64() * 1e6 / (count * usize::from(STEPS)) as f64,
                "seconds_down_at_the_end": cost.down.as_secs_f64(),
            });
            if write_back == WriteBack::OnEvict {
                figure["GiB_a_second_down"] = rate.into();
                figure["of_copies_by_hand"] = (rate / link).into();
                figure["bar"] = report.hold(&what, moved, Limit::AtMost(1.0));
            }
            report.tell(what, figure);
        }
        report.tell(format!("by hand, {} KiB", len / KIB), json!({"GiB_a_second_down": link}));
    }
    report.end(env)
}

/// The rate of copies down by hand, all of them queued at once, in GiB/s.
fn by_hand(env: &Env, user: &User, len: usize, count: usize) -> Result<f64> {
    let link = Link::registered(user, len * count, len * count, 1)?;
    let pieces = Piece::row(count, len);
    let copy = || {
        let begun = Instant::now();
        pieces.iter().try_for_each(|&piece| link.down(0, piece))?;
        link.wait()?;
        Ok((len * count) as f64 / begun.elapsed().as_secs_f64() / (1 << 30) as f64)
    };
    let mut contenders: [Contender<'_>; 1] = [("by hand", Box::new(copy))];
    let figures = in_turn(env.scaled(9, 1), &mut contenders)?;
    Ok(median(&figures["by hand"]))
}

struct Cost {
    /// While kernels were launched and leases ended.
    steps: Duration,
    /// From then until everything was below.
    down: Duration,
    bytes_down: u64,
}

fn one_way(
    env: &Env,
    user: &User,
    report: &mut Report,
    (len, count): (usize, usize),
    write_back: WriteBack,
    is_evicted: bool,
) -> Result<Cost> {
    let all = len * count;
    let data = Data::new(env, count, len);
    let set = |set: vmem::VirtualMemoryConfigBuilder| {
        set.disk_capacity(256 * MIB as u64).max_pinned(1.0).write_back(write_back)
    };
    let vram = all.next_multiple_of(4 * MIB);
    let bench = Bench::open(env, vram, 3 * all + vram + 64 * MIB, set)?;
    let vmem = &bench.vmem;
    let stream = user.context.new_stream()?;
    let mut handles = Vec::new();
    let mut others = Vec::new();
    bench.run(async {
        for object in 0..count {
            let handle = vmem.put(data.of(object, len), HOST).await?;
            vmem.promote(&handle, VRAM).await?;
            handles.push(handle);
        }
        // What takes all of the device.
        for _ in 0..vram / len {
            others.push(vmem.put(vec![0; len], HOST).await?);
        }
        anyhow::Ok(())
    })?;
    let before = vmem.stats().vram_to_host_bytes;
    let begun = Instant::now();
    let mut ended = begun;
    bench.run(async {
        for _ in 0..STEPS {
            for handle in &handles {
                let mut lease = vmem.device_mut_on(handle, &stream).await?;
                add(user, &mut lease, 1)?;
                // Its end is not waited for, as by a thread that launches.
                drop(lease);
            }
        }
        stream.synchronize()?;
        ended = Instant::now();
        if is_evicted {
            for handle in &others {
                vmem.promote(handle, VRAM).await?;
            }
        }
        vmem.flush_all().await?;
        until_below(vmem, &handles).await
    })?;
    let down = ended.elapsed();
    let bytes_down = vmem.stats().vram_to_host_bytes - before;
    if is_evicted {
        let left = handles.iter().map(|handle| vmem.residency(handle));
        let left = left.collect::<Result<Vec<_>, _>>()?;
        ensure!(left.iter().all(|residency| !residency.vram), "they left the device");
    }
    bench.run(async {
        for (object, handle) in handles.iter().enumerate() {
            let expected: Vec<u8> =
                data.of(object, len).iter().map(|byte| byte.wrapping_add(STEPS)).collect();
            report.same("what kernels wrote", &vmem.read(handle).await?, &expected)?;
        }
        anyhow::Ok(())
    })?;
    drop((handles, others));
    bench.close()?;
    Ok(Cost { steps: ended - begun, down, bytes_down })
}

/// Waits until no device alone has any of these.
async fn until_below(vmem: &vmem::VirtualMemory, handles: &[VMemHandle]) -> Result<()> {
    let begun = Instant::now();
    for handle in handles {
        vmem.flush(handle).await?;
    }
    while vmem.stats().vram_dirty_bytes > 0 {
        ensure!(begun.elapsed() < Duration::from_secs(60), "they are never written back");
        tokio::task::yield_now().await;
    }
    Ok(())
}
