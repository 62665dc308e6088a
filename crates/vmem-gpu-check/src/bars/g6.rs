//! G6: many small pieces, scattered over objects in host memory, into one device buffer.
//!
//! Invariant: every contender brings the same pieces to the same places; all of the buffer is
//! compared after each round, and cleared. Called by `bars`.

use std::cell::RefCell;
use std::time::Instant;

use anyhow::{Context, Result};
use rand::Rng;
use serde_json::json;
use vmem::VMemHandle;
use vmem::gpu::{Gathered, VramExt};

use super::raw::{self, Link, Piece};
use super::report::{Limit, OURS, Report};
use super::timing::{Contender, in_turn};
use super::{Bench, Data, HOST, KIB, MIB};
use crate::parts::Outcome;
use crate::user::Env;

/// Pieces begin at multiples of this, which any of the contenders can do with.
const ALIGNED: usize = 64;

/// Rounds, and others before them: memory of the host is registered over time, as copies pass
/// through it.
const ROUNDS: (usize, usize) = (15, 12);

pub(super) fn run(env: &Env) -> Result<Outcome> {
    let mut report = Report::default();
    for (len, count) in [(4 * KIB, 8192), (16 * KIB, 4096), (64 * KIB, 1024)] {
        let len = env.scaled(len, len / 8);
        let count = env.scaled(count, 256);
        one_length(env, &mut report, len, count)
            .with_context(|| format!("{count} pieces of {len} bytes"))?;
    }
    report.end(env)
}

fn one_length(env: &Env, report: &mut Report, len: usize, count: usize) -> Result<()> {
    let objects = env.scaled(1024, 32);
    let object_len = env.scaled(256 * KIB, 32 * KIB);
    let all = count * len;
    let set_len = objects * object_len;
    let user = env.user()?;
    let data = Data::new(env, objects, object_len);
    let mut rng = env.rng();
    let scattered: Vec<(usize, usize)> = (0..count)
        .map(|_| {
            let at = rng.random_range(0..=(object_len - len) / ALIGNED) * ALIGNED;
            (rng.random_range(0..objects), at)
        })
        .collect();
    let expected: Vec<u8> = scattered
        .iter()
        .flat_map(|&(object, at)| &data.of(object, object_len)[at..at + len])
        .copied()
        .collect();

    let set = |set: vmem::VirtualMemoryConfigBuilder| set.disk_capacity(256 * MIB as u64);
    let bench = Bench::open(env, 8 * MIB, 2 * set_len + 64 * MIB, set)?;
    let vmem = &bench.vmem;
    let handles: Vec<VMemHandle> = bench.run(async {
        let mut handles = Vec::new();
        for object in 0..objects {
            handles.push(vmem.put(data.of(object, object_len), HOST).await?);
        }
        Ok(handles)
    })?;
    let pieces: Vec<Gathered<'_>> = scattered
        .iter()
        .enumerate()
        .map(|(nth, &(object, at))| (&handles[object], at..at + len, nth * len))
        .collect();
    let mut buffer = user.allocate(all)?;

    // The same objects in pinned memory, and behind them space to pack pieces in.
    let mut link = Link::new(&user, set_len + all, all, 1)?;
    for (object, bytes) in link.host()?[..set_len].chunks_mut(object_len).enumerate() {
        bytes.copy_from_slice(data.of(object, object_len));
    }
    let rows: Vec<Piece> = scattered
        .iter()
        .enumerate()
        .map(|(nth, &(object, at))| Piece {
            host: object * object_len + at,
            device: nth * len,
            len,
        })
        .collect();
    link.set_rows(&user, &rows)?;
    let no_batch = link.no_batch().map(str::to_owned);

    let report_cell = RefCell::new(&mut *report);
    let seen = |what: &str, found: &[u8]| report_cell.borrow_mut().same(what, found, &expected);
    let link = RefCell::new(link);
    let mut gather = || {
        buffer.write(&vec![0; all], &user.stream)?;
        let begun = Instant::now();
        let target = raw::target(&mut buffer, &user.stream);
        bench.run(async { Ok(vmem.gather(&pieces, &target).await?) })?;
        let took = begun.elapsed();
        drop(target);
        seen("gathered", &buffer.read(&user.stream)?)?;
        anyhow::Ok(rate(all, took))
    };
    for _ in 0..env.scaled(ROUNDS.1, 1) {
        gather()?;
    }
    let by_hand = |what: &str, work: &dyn Fn(&mut Link) -> Result<()>| {
        let mut link = link.borrow_mut();
        link.clear_device()?;
        let begun = Instant::now();
        work(&mut link)?;
        link.wait()?;
        let took = begun.elapsed();
        seen(what, &link.device()?).map(|()| rate(all, took))
    };
    let pack = |link: &mut Link| {
        let (from, to) = link.host()?.split_at_mut(set_len);
        for (piece, space) in rows.iter().zip(to.chunks_mut(len)) {
            space.copy_from_slice(&from[piece.host..piece.host + len]);
        }
        link.up(0, Piece { host: set_len, device: 0, len: all })
    };
    let mut contenders: Vec<Contender<'_>> =
        vec![(OURS, Box::new(gather)), ("pack", Box::new(|| by_hand("packed", &pack)))];
    if no_batch.is_none() {
        contenders
            .push(("batch", Box::new(|| by_hand("batch", &|link| link.batch(0, true, &rows)))));
    }
    if env.emulator.is_none() {
        contenders.push(("kernel", Box::new(|| by_hand("kernel", &|link| link.rows(&user, 0)))));
    }
    let figures = in_turn(env.scaled(ROUNDS.0, 2), &mut contenders)?;
    drop(contenders);
    let what = format!("gather of {count} pieces of {} KiB", len / KIB);
    let others = ["batch", "kernel", "pack"];
    report.judge(&what, "GiB/s", &figures, &others, Limit::AtLeast(0.9));
    if let Some(why) = no_batch {
        report.tell("no_batch", why);
    }
    let registered = vmem.stats().registered_bytes;
    report.tell(
        format!("set of {} KiB", len / KIB),
        json!({"objects": objects, "bytes": set_len, "registered_bytes": registered}),
    );
    drop(pieces);
    drop(handles);
    bench.close().context("the store")
}

fn rate(bytes: usize, took: std::time::Duration) -> f64 {
    bytes as f64 / took.as_secs_f64() / (1 << 30) as f64
}
