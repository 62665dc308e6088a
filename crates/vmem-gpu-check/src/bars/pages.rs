//! Device memory as pages, as the tier takes it: what it costs to map them and to open a tier, and
//! whether copies are as fast as into a block.
//!
//! Invariant: pages and block take turns, and hold the same bytes. The only bar is a ratio: a copy
//! into pages reaches 0.95 of one into a block; times are costs. A tier is opened in processes of
//! their own, since the way in which it takes memory is that of a process. Called by `bars`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cudarc::driver::result;
use serde_json::{Map, Value, json};
use vmem::GpuSelection;
use vmem::backend::DeviceBackend;

use super::raw::{Link, Piece};
use super::report::{Limit, Report};
use super::timing::{Contender, in_turn, median, spread};
use super::{Data, MIB};
use crate::parts::Outcome;
use crate::run;
use crate::user::{DeviceMemory, Env, Paging, User};

const PAGES: &str = "pages";
const BLOCK: &str = "block";
/// How the tier takes its memory.
const WAY: &str = "VMEM_GPU_ALLOCATIONS";
/// Memory that a tier had is free by then.
const GONE_MAX: Duration = Duration::from_secs(5);

pub(super) fn run(env: &Env) -> Result<Outcome> {
    let mut report = Report::default();
    let user = env.user()?;
    let paging = match Paging::find(&user)? {
        Ok(paging) => paging,
        Err(why) => return Ok(Outcome::Skipped(why)),
    };
    let page = paging.page_bytes()?;
    for (page, count) in [(page, 1), (page, 16), (page, 256), (4 * page, 16), (4 * page, 256)] {
        // The emulated device has less.
        if page * count <= env.scaled(usize::MAX, 64 * MIB) {
            let what = format!("us a page, {count} of {} MiB", page / MIB);
            report.tell(what, mapping(env, &paging, page, count).context("mapping pages")?);
        }
    }
    copies(env, &user, &paging, page, &mut report)?;
    drop((paging, user));
    opening(env, &mut report)?;
    report.end(env)
}

/// What each page costs, in microseconds: mapped in a call of its own and given access in one for
/// all, as by the tier, or in other ways.
fn mapping(env: &Env, paging: &Paging, page: usize, count: usize) -> Result<Value> {
    let pages = paging.pages(page, count, count)?;
    pages.bind()?;
    let mut figures: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for round in 0..=env.scaled(9, 1) {
        let mut timed = |what: &'static str, call: &dyn Fn() -> Result<()>| {
            let begun = Instant::now();
            call().context(what)?;
            if round > 0 {
                let us = begun.elapsed().as_secs_f64() * 1e6 / count as f64;
                figures.entry(what).or_default().push(us);
            }
            anyhow::Ok(())
        };
        let map = || (0..count).try_for_each(|n| Ok(pages.map(n, n)?));
        timed("map and access, as the tier", &|| {
            map()?;
            Ok(pages.allow(0..count)?)
        })?;
        timed("unmap, as the tier", &|| (0..count).try_for_each(|n| Ok(pages.unmap(n..n + 1)?)))?;
        timed("map", &map)?;
        timed("access, a call a page", &|| {
            (0..count).try_for_each(|n| Ok(pages.allow(n..n + 1)?))
        })?;
        timed("unmap, in one call", &|| Ok(pages.unmap(0..count)?))?;
    }
    let spreads = figures.iter().map(|(what, times)| ((*what).to_owned(), spread(times)));
    Ok(spreads.collect::<Map<_, _>>().into())
}

/// One long copy into pages, against one into a block; and back, without a bar.
fn copies(env: &Env, user: &User, paging: &Paging, page: usize, report: &mut Report) -> Result<()> {
    let count = env.scaled(512 * MIB, 16 * MIB).div_ceil(page);
    let len = count * page;
    let data = Data::new(env, 1, len);
    let expected = data.of(0, len);
    let link = |memory: DeviceMemory| {
        let mut link = Link::over(user, user.registered(len)?, memory, 1)?;
        link.host()?.copy_from_slice(expected);
        anyhow::Ok(RefCell::new(link))
    };
    let links = [link(paging.memory(page, count)?)?, link(user.allocate(len)?)?];
    let piece = Piece { host: 0, device: 0, len };
    let cell = RefCell::new(&mut *report);
    let timed = |link: &RefCell<Link>, up: bool| {
        let mut link = link.borrow_mut();
        if up {
            link.clear_device()?
        } else {
            link.host()?.fill(0)
        }
        let begun = Instant::now();
        if up {
            link.up(0, piece)?
        } else {
            link.down(0, piece)?
        }
        link.wait()?;
        let took = begun.elapsed();
        if up {
            cell.borrow_mut().same("what was copied up", &link.device()?, expected)?;
        } else {
            cell.borrow_mut().same("what was copied down", link.host()?, expected)?;
        }
        anyhow::Ok(len as f64 / took.as_secs_f64() / (1 << 30) as f64)
    };
    let mut figures = Vec::new();
    for up in [true, false] {
        let mut contenders: [Contender<'_>; 2] = [
            (PAGES, Box::new(|| timed(&links[0], up))),
            (BLOCK, Box::new(|| timed(&links[1], up))),
        ];
        figures.push(in_turn(env.scaled(15, 1), &mut contenders)?);
    }
    for (figures, way) in figures.into_iter().zip(["up", "down"]) {
        let what = format!("a copy {way} of {} MiB", len / MIB);
        let ratio = median(&figures[PAGES]) / median(&figures[BLOCK]);
        let mut told = json!({
            "unit": "GiB/s", PAGES: spread(&figures[PAGES]), BLOCK: spread(&figures[BLOCK]),
            "ratio": ratio,
        });
        if way == "up" {
            let bar = "a copy into pages against one into a block";
            told["bar"] = report.hold(bar, ratio, Limit::AtLeast(0.95));
        }
        report.tell(what, told);
    }
    Ok(())
}

/// What it takes to open a tier, in a process for each way.
fn opening(env: &Env, report: &mut Report) -> Result<()> {
    let mut told = Map::new();
    for way in [PAGES, BLOCK] {
        let figures = child(env, way).with_context(|| format!("a tier with {way}"))?;
        for (len, figure) in figures.as_object().into_iter().flatten() {
            // None where the driver cannot tell.
            if way == PAGES && figure["is_pages"] == false {
                let what = format!("a tier of {len} has pages, where the device has them");
                report.hold(&what, 0.0, Limit::AtLeast(1.0));
            }
        }
        told.insert(way.into(), figures);
    }
    let open = |way: &str, len: &str| told[way][len]["open_ms"]["median"].as_f64();
    let lens = told[PAGES].as_object().into_iter().flat_map(Map::keys);
    let ratio = |len: &String| Some((len.clone(), json!(open(PAGES, len)? / open(BLOCK, len)?)));
    let ratios: Map<_, _> = lens.filter_map(ratio).collect();
    told.insert("pages_to_block".into(), ratios.into());
    report.tell("opening a tier", told);
    Ok(())
}

/// Runs `opened_tier` in a process that takes device memory in this way.
fn child(env: &Env, way: &str) -> Result<Value> {
    let mut command = Command::new(std::env::current_exe().context("finding this program")?);
    command.args(["--part", "opened-tier", "--seed", &env.seed.to_string()]);
    command.args(["--device", &env.device.to_string()]);
    if env.emulator.is_some() {
        command.arg("--emulated");
    }
    // The way of pages is that of a process that says nothing.
    command.env_remove(WAY);
    if way == BLOCK {
        command.env(WAY, BLOCK);
    }
    let output = command.output().context("running this program")?;
    let found = run::found(&String::from_utf8_lossy(&output.stdout));
    let mut found = found.with_context(|| format!("it ended with {}", output.status))?;
    ensure!(found["outcome"] == "passed", "{found}");
    Ok(found["figures"].take())
}

/// Opens tiers of several lengths, and says how long that takes and whether they have pages.
pub(super) fn opened_tier(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let paging = Paging::find(&user)?;
    user.context.bind_to_thread()?;
    let (free, _) = result::mem_get_info()?;
    // As much as an example has, and on a card also what a store takes by itself.
    let len = env.scaled(1024 * MIB, 64 * MIB);
    let mut lens = vec![(format!("{} MiB", len / MIB), len, env.scaled(5, 1))];
    if env.emulator.is_none() {
        lens.push(("three quarters of the card".into(), free / 4 * 3 / MIB * MIB, 2));
    }
    let mut figures = Map::new();
    for (name, len, rounds) in lens {
        let mut times = [const { Vec::new() }; 2];
        let mut is_pages = None;
        let mut capacity = 0;
        for _ in 0..rounds {
            let (before, _) = result::mem_get_info()?;
            let begun = Instant::now();
            let opened =
                vmem_gpu::open_device(&GpuSelection::Device(env.device), Some(len as u64))?;
            let tier = opened.device.with_context(|| opened.reason.to_string())?;
            times[0].push(begun.elapsed().as_secs_f64() * 1e3);
            capacity = tier.usage().capacity_bytes;
            is_pages = has_pages(env, &*tier, paging.as_ref().ok())?;
            let begun = Instant::now();
            env.block_on(async { tier.close().await.context("closing a tier") })?;
            drop(tier);
            // The last of its streams gives its memory back.
            while result::mem_get_info()?.0 < before && begun.elapsed() < GONE_MAX {
                std::thread::sleep(Duration::from_micros(100));
            }
            times[1].push(begun.elapsed().as_secs_f64() * 1e3);
        }
        let [open, close] = times;
        figures.insert(
            name,
            json!({
                "open_ms": spread(&open), "close_ms": spread(&close), "is_pages": is_pages,
                "capacity_bytes": capacity,
            }),
        );
    }
    Ok(Outcome::Passed(figures.into()))
}

/// Whether the memory of a tier is pages; none if the driver cannot tell.
fn has_pages(env: &Env, tier: &dyn DeviceBackend, paging: Option<&Paging>) -> Result<Option<bool>> {
    if let Some(emulator) = &env.emulator {
        return Ok(Some(emulator.counter("created") > 0));
    }
    let range = tier.reserve(MIB).context("a tier has memory")?;
    Ok(paging.and_then(|paging| paging.is_mapped(range.address())))
}
