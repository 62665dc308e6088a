//! G1: host to device memory, device memory to host, and both at once, against copies by hand.
//!
//! Invariant: objects are distinct, lie at random places of the arena, and what arrived is compared
//! after each round; the copies by hand are of distinct pinned memory too, with as many bytes in
//! flight. Called by `bars`.
//!
//! Up is `promote`, device memory for it included. Down is the end of a lease in which a kernel
//! changed the object: what vmem has in device memory it has below as well, so that only changed
//! bytes are ever copied down.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use serde_json::json;
use vmem::VMemHandle;
use vmem::gpu::{DeviceLeaseMut, VramExt};

use super::pump::{By, pump};
use super::raw::{self, Link, Piece, Reader};
use super::report::{Limit, OURS, Report};
use super::timing::{Contender, in_turn};
use super::{Bench, Data, HOST, KIB, MIB, VRAM, each, shuffle};
use crate::parts::Outcome;
use crate::user::{Env, User};

/// Bytes in flight, of pieces that are not very long.
const IN_FLIGHT: usize = 64 * MIB;
/// One object in this many is compared after a round on a card: each, after some rounds.
const COMPARED: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Up,
    Down,
    Both,
}

pub(super) fn run(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let mut report = Report::default();
    report.tell(
        "how",
        "up: promote of objects in host memory; down: finish of device_mut_on leases over objects \
         that a kernel changed, from when the kernels have ended, since a copy in device memory is \
         one in host memory too",
    );
    let smaller = |len: usize| env.scaled(len, len / 16);
    for (len, all, least) in [
        (64 * KIB, 512 * MIB, 0.8),
        (MIB, 1024 * MIB, 0.95),
        (16 * MIB, 1024 * MIB, 0.95),
        (64 * MIB, 1024 * MIB, 0.95),
    ] {
        let objects = env.scaled(all / len, 8.max(64 * KIB / len));
        one_length(env, &user, &mut report, smaller(len), objects, least)
            .with_context(|| format!("objects of {} bytes", smaller(len)))?;
    }
    report.end(env)
}

fn one_length(
    env: &Env,
    user: &User,
    report: &mut Report,
    len: usize,
    count: usize,
    least: f64,
) -> Result<()> {
    let all = len * count;
    let in_flight = (IN_FLIGHT / len).clamp(4, 512).min(count);
    let data = Data::new(env, 2 * count, len);
    // Space for twice the objects at first, and then for new versions beside the old.
    let set =
        |set: vmem::VirtualMemoryConfigBuilder| set.max_pinned(1.0).disk_capacity(256 * MIB as u64);
    let bench = Bench::open(env, all + all / 8 + 4 * MIB, 3 * all + 64 * MIB, set)?;
    let mut ours = Ours::new(env, &bench, user, &data, count, len, in_flight)?;
    let mut link = Link::new(user, all, all, 2)?;
    // What the kind of memory alone costs.
    let mut registered = Link::registered(user, all, all, 2)?;
    for link in [&mut link, &mut registered] {
        for (object, bytes) in link.host()?.chunks_mut(len).enumerate() {
            bytes.copy_from_slice(data.of(object, len));
        }
    }
    let mut by_hand = vec![("copies", By::Piece)];
    match link.no_batch() {
        Some(why) => report.tell("no_batch", why),
        None => by_hand.push(("batches", By::Batch)),
    }
    let pieces = Piece::row(count, len);
    // Memory of the host is registered over time, as copies pass through it.
    for way in [Way::Up, Way::Down].repeat(env.scaled(4, 1)) {
        ours.round(way, report)?;
    }
    let ours = RefCell::new(ours);
    let by_link = &link;
    let by_registered = &registered;
    let compared = RefCell::new(std::mem::take(report));
    for way in [Way::Up, Way::Down, Way::Both] {
        let rate = |took: Duration| all as f64 / took.as_secs_f64() / (1 << 30) as f64;
        let mut contenders: Vec<Contender<'_>> = vec![(
            OURS,
            Box::new(|| {
                let took = ours.borrow_mut().round(way, &mut compared.borrow_mut())?;
                Ok(rate(took))
            }),
        )];
        let half = pieces.len() / 2;
        let share: [&[Piece]; 2] = match way {
            Way::Up => [&pieces, &[]],
            Way::Down => [&[], &pieces],
            Way::Both => [&pieces[..half], &pieces[half..]],
        };
        for &(name, by) in &by_hand {
            contenders
                .push((name, Box::new(move || Ok(rate(pump(by_link, share, in_flight, by)?)))));
        }
        let copies = move || Ok(rate(pump(by_registered, share, in_flight, By::Piece)?));
        contenders.push(("copies_registered", Box::new(copies)));
        let figures = in_turn(env.scaled(9, 1), &mut contenders)?;
        drop(contenders);
        let what = format!("{way:?} of {} KiB", len / KIB).to_lowercase();
        let others = ["copies", "batches"];
        compared.borrow_mut().judge(&what, "GiB/s", &figures, &others, Limit::AtLeast(least));
    }
    *report = compared.into_inner();
    let registered = bench.vmem.stats().registered_bytes;
    report.tell(
        format!("of {} KiB", len / KIB),
        json!({"in_flight": in_flight, "objects": count, "registered_bytes": registered}),
    );
    // The first copies up were of all of it, and nothing changed it since.
    link.host()?.fill(0);
    for &(_, by) in &by_hand {
        pump(&link, [&[], &pieces], in_flight, by)?;
        for (object, bytes) in link.host()?.chunks_mut(len).enumerate() {
            report.same("by hand", bytes, data.of(object, len))?;
            bytes.fill(0);
        }
    }
    drop(ours);
    bench.close()
}

/// The store's side.
struct Ours<'a> {
    bench: &'a Bench,
    user: &'a User,
    data: &'a Data,
    reader: Reader,
    /// In an order that says nothing about where they are.
    objects: Vec<(usize, VMemHandle)>,
    /// What was added to each by kernels.
    added: BTreeMap<usize, u8>,
    in_flight: usize,
    rounds: usize,
    step: usize,
}

impl<'a> Ours<'a> {
    fn new(
        env: &Env,
        bench: &'a Bench,
        user: &'a User,
        data: &'a Data,
        count: usize,
        len: usize,
        in_flight: usize,
    ) -> Result<Self> {
        let objects = bench.run(async {
            let mut objects = Vec::new();
            for object in 0..2 * count {
                objects.push((object, bench.vmem.put(data.of(object, len), HOST).await?));
            }
            // Every other one goes, at random: those that stay lie scattered, and so will their new
            // versions.
            shuffle(env, &mut objects);
            objects.truncate(count);
            Ok(objects)
        })?;
        let reader = Reader::new(user, len)?;
        let step = env.scaled(COMPARED, 1);
        Ok(Ours {
            bench,
            user,
            data,
            reader,
            objects,
            added: BTreeMap::new(),
            in_flight,
            rounds: 0,
            step,
        })
    }

    /// Times one round, and compares what arrived.
    fn round(&mut self, way: Way, report: &mut Report) -> Result<Duration> {
        let half = self.objects.len() / 2;
        let user = self.user;
        let (up, down) = match way {
            Way::Up => (&self.objects[..], &self.objects[..0]),
            Way::Down => (&self.objects[..0], &self.objects[..]),
            Way::Both => self.objects.split_at(half),
        };
        let at_once = if way == Way::Both { (self.in_flight / 2).max(1) } else { self.in_flight };
        let vmem = &self.bench.vmem;
        let added = &mut self.added;
        let took = self.bench.run(async {
            for (_, handle) in &self.objects {
                vmem.demote(handle, HOST).await.context("demoting")?;
            }
            let mut leases: Vec<DeviceLeaseMut> = Vec::new();
            for (object, handle) in down {
                let mut lease = vmem.device_mut_on(handle, &user.stream).await?;
                raw::add(user, &mut lease, 1)?;
                let value = added.entry(*object).or_default();
                *value = value.wrapping_add(1);
                leases.push(lease);
            }
            user.stream.synchronize()?;
            let up: Vec<VMemHandle> = up.iter().map(|(_, handle)| handle.clone()).collect();
            let store = vmem.clone();
            let begun = Instant::now();
            let up = each(up, at_once, move |handle| {
                let vmem = store.clone();
                async move { Ok(vmem.promote(&handle, VRAM).await?) }
            });
            let down = each(leases, at_once, |lease| async move { Ok(lease.finish().await?) });
            let (up, down) = futures::future::join(up, down).await;
            let took = begun.elapsed();
            up.context("promoting")?;
            down.context("ending leases")?;
            Ok(took)
        })?;
        self.compare(report)?;
        self.rounds += 1;
        Ok(took)
    }

    /// In device memory, and below it.
    fn compare(&mut self, report: &mut Report) -> Result<()> {
        let vmem = &self.bench.vmem;
        let chosen = self.objects.iter().skip(self.rounds % self.step).step_by(self.step);
        for (object, handle) in chosen {
            let plus = self.added.get(object).copied().unwrap_or(0);
            let expected = self.data.of(*object, handle.len()).iter();
            let expected: Vec<u8> = expected.map(|byte| byte.wrapping_add(plus)).collect();
            let below: Bytes = self.bench.run(async { Ok(vmem.read(handle).await?) })?;
            report.same("in host memory", &below, &expected)?;
            let above = self.bench.run(self.reader.object(vmem, handle))?;
            report.same("in device memory", above, &expected)?;
        }
        Ok(())
    }
}
