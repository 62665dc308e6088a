//! Where one way to make small copies overtakes another: the tier's own kernel, a batch of the
//! driver, a call for each.
//!
//! Invariant: all ways make the same copies, from pinned memory in no order, and what each made is
//! compared. What it says the switch points would be on this card is for `switch_points` in the
//! configuration of a store. There is no bar. Called by `bars`.

use std::cell::RefCell;
use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};

use super::raw::{Link, Piece};
use super::report::Report;
use super::timing::{Contender, in_turn, median};
use super::{Data, KIB, MIB, SHIFT, shuffle};
use crate::parts::Outcome;
use crate::user::{Env, User};

const KERNEL: &str = "kernel";
const BATCH: &str = "batch";
const SINGLE: &str = "memcpy";
/// No list has more, in bytes.
const LIST_MAX: usize = 512 * MIB;
/// The lengths at which the least counts are looked for, in bytes: one for the kernel, one for a
/// batch.
const OF_SMALL_MIN: usize = 4 * KIB;
const OF_BATCH_MIN: usize = 64 * KIB;

/// The rates of all ways with this many copies of this length, in GiB/s.
#[derive(Clone, Debug, PartialEq)]
struct Cell {
    len: usize,
    count: usize,
    kernel: f64,
    /// None without batches.
    batch: Option<f64>,
    single: f64,
}

/// What the configuration is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SwitchPoints {
    small_max: Option<usize>,
    small_min: Option<usize>,
    batch_min: Option<usize>,
}

pub(super) fn run(env: &Env) -> Result<Outcome> {
    let mut report = Report::default();
    let lens: Vec<usize> = match env.emulator {
        Some(_) => vec![512, 4 * KIB, 64 * KIB],
        None => (0..10).map(|power| 512 << power).collect(),
    };
    let counts: Vec<usize> = match env.emulator {
        Some(_) => vec![32, 600],
        None => (0..6).map(|power| 256 << power).collect(),
    };
    let few: Vec<usize> = (0..env.scaled(8, 3)).map(|power| 1 << power).collect();
    let fits = |&(len, count): &(usize, usize)| len * count <= LIST_MAX;
    let many = lens.iter().flat_map(|&len| counts.iter().map(move |&count| (len, count)));
    let few = [OF_SMALL_MIN, OF_BATCH_MIN].into_iter().flat_map(|len| {
        let few = few.clone();
        few.into_iter().map(move |count| (len, count))
    });
    let lists: Vec<(usize, usize)> = many.chain(few).filter(fits).collect();
    let user = env.user()?;
    let mut cells = Vec::new();
    for (len, count) in lists {
        cells.push(cell(env, &user, &mut report, len, count)?);
    }
    report.tell("table", cells.iter().map(Cell::line).collect::<Vec<String>>());
    report.tell("switch_points", switch_points(&cells).value());
    report.end(env)
}

fn cell(env: &Env, user: &User, report: &mut Report, len: usize, count: usize) -> Result<Cell> {
    let all = len * count;
    let data = Data::new(env, 1, all - SHIFT.min(all));
    let mut link = Link::registered(user, all, all, 1)?;
    link.host()?.copy_from_slice(&data.0[..all]);
    let mut places: Vec<usize> = (0..count).collect();
    shuffle(env, &mut places);
    let piece = |(to, &from): (usize, &usize)| Piece { host: from * len, device: to * len, len };
    let pieces: Vec<Piece> = places.iter().enumerate().map(piece).collect();
    let expected: Vec<u8> =
        pieces.iter().flat_map(|piece| &data.0[piece.host..piece.host + len]).copied().collect();
    link.set_tables(user, &pieces)?;
    let has_batch = link.no_batch().is_none();
    let report = RefCell::new(report);
    let link = &link;
    let pieces = &pieces;
    let timed = |what: &str, work: &dyn Fn() -> Result<()>| {
        link.clear_device()?;
        let begun = Instant::now();
        work()?;
        link.wait()?;
        let took = begun.elapsed();
        report.borrow_mut().same(what, &link.device()?, &expected)?;
        anyhow::Ok(all as f64 / took.as_secs_f64() / (1 << 30) as f64)
    };
    let by_kernel = || link.tables(0);
    let by_batch = || link.batch(0, true, pieces);
    let singly = || pieces.iter().try_for_each(|&piece| link.up(0, piece));
    let mut contenders: Vec<Contender<'_>> = vec![
        (KERNEL, Box::new(|| timed(KERNEL, &by_kernel))),
        (SINGLE, Box::new(|| timed(SINGLE, &singly))),
    ];
    if has_batch {
        contenders.push((BATCH, Box::new(|| timed(BATCH, &by_batch))));
    }
    let figures = in_turn(env.scaled(9, 1), &mut contenders)?;
    drop(contenders);
    let of = |way: &str| figures.get(way).map(|rates| median(rates));
    Ok(Cell {
        len,
        count,
        kernel: of(KERNEL).unwrap_or(0.0),
        batch: of(BATCH),
        single: of(SINGLE).unwrap_or(0.0),
    })
}

impl Cell {
    /// A line of the table.
    fn line(&self) -> String {
        let Cell { len, count, kernel, batch, single } = self;
        let batch = batch.map_or_else(|| "none".to_owned(), |batch| format!("{batch:.2}"));
        format!(
            "{count} of {len} bytes: kernel {kernel:.2}, batch {batch}, memcpy {single:.2} GiB/s"
        )
    }

    fn is_of_kernel(&self) -> bool {
        self.kernel >= self.single && self.batch.is_none_or(|batch| self.kernel >= batch)
    }

    fn is_better_listed(&self) -> bool {
        self.batch.is_some_and(|batch| batch >= self.single)
    }
}

/// The longest length up to which the kernel is the quickest for most counts; the least counts from
/// which on it is quicker than single calls, and a batch is.
fn switch_points(cells: &[Cell]) -> SwitchPoints {
    let mut lens: Vec<usize> = cells.iter().map(|cell| cell.len).collect();
    lens.sort_unstable();
    lens.dedup();
    let is_small = |len: &usize| {
        let its: Vec<&Cell> =
            cells.iter().filter(|cell| cell.len == *len && cell.count >= 32).collect();
        let won = its.iter().filter(|cell| cell.is_of_kernel()).count();
        2 * won > its.len()
    };
    let small_max = lens.into_iter().take_while(is_small).last();
    let least = |len: usize, wins: &dyn Fn(&Cell) -> bool| {
        let mut its: Vec<&Cell> = cells.iter().filter(|cell| cell.len == len).collect();
        its.sort_unstable_by_key(|cell| std::cmp::Reverse(cell.count));
        its.into_iter().take_while(|cell| wins(cell)).last().map(|cell| cell.count)
    };
    SwitchPoints {
        small_max,
        small_min: least(OF_SMALL_MIN, &|cell| cell.kernel >= cell.single),
        batch_min: least(OF_BATCH_MIN, &Cell::is_better_listed),
    }
}

impl SwitchPoints {
    fn value(self) -> Value {
        json!({
            "small_max": self.small_max, "small_min": self.small_min, "batch_min": self.batch_min,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(len: usize, count: usize, rates: [f64; 3]) -> Cell {
        let [kernel, batch, single] = rates;
        Cell { len, count, kernel, batch: Some(batch), single }
    }

    #[test]
    fn switch_points_are_where_one_way_overtakes_another() {
        let cells = [
            cell(512, 256, [5.0, 1.0, 0.5]),
            cell(512, 8192, [5.0, 6.0, 0.5]),
            cell(512, 1024, [5.0, 1.0, 0.5]),
            cell(OF_SMALL_MIN, 256, [20.0, 5.0, 2.0]),
            cell(OF_SMALL_MIN, 8, [2.0, 1.0, 1.0]),
            cell(OF_SMALL_MIN, 4, [1.0, 1.0, 1.0]),
            cell(OF_SMALL_MIN, 2, [0.5, 1.0, 1.0]),
            cell(OF_SMALL_MIN, 1, [1.0, 0.5, 0.5]),
            cell(OF_BATCH_MIN, 256, [20.0, 40.0, 30.0]),
            cell(OF_BATCH_MIN, 2, [5.0, 11.0, 10.0]),
            cell(OF_BATCH_MIN, 1, [5.0, 6.0, 7.0]),
            cell(256 * KIB, 256, [50.0, 40.0, 30.0]),
        ];
        let expected =
            SwitchPoints { small_max: Some(OF_SMALL_MIN), small_min: Some(4), batch_min: Some(2) };
        assert_eq!(switch_points(&cells), expected);
        let none = SwitchPoints { small_max: None, small_min: None, batch_min: None };
        assert_eq!(switch_points(&[]), none);
        let lacking = Cell { batch: None, ..cell(OF_BATCH_MIN, 256, [20.0, 0.0, 10.0]) };
        assert!(lacking.is_of_kernel() && !lacking.is_better_listed());
    }
}
