//! The ledger against itself, and against what a driver knows.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const UNIT: u64 = 512;
const PAGE: u64 = 64 * UNIT;

fn ledger(count: u32) -> PageLedger {
    PageLedger::new(UNIT, PAGE, count, u64::from(count) * 8)
}

/// An object: its offset and its footprint.
type Taken = (u64, u64);

/// Memory that is ready, or that is after pages were moved.
fn take(ledger: &mut PageLedger, units: u64) -> Option<Taken> {
    let len = (units * UNIT) as usize;
    ledger.take(len).or_else(|| {
        let plan = ledger.plan(units * UNIT)?;
        ledger.settle(plan, true);
        Some(ledger.take(len).expect("what was planned is ready"))
    })
}

fn give(ledger: &mut PageLedger, &(offset, footprint): &Taken) {
    ledger.give_back(offset, footprint);
}

/// What the ledger says of itself agrees.
fn check(ledger: &PageLedger, taken: &[Taken]) {
    let used: u64 = taken.iter().map(|one| one.1).sum();
    assert_eq!(ledger.usage().used_bytes, used);
    let mapped: u64 = ledger.pages.len() as u64 * PAGE;
    assert_eq!(ledger.ready.total(), mapped - used, "all that is mapped is used or ready");
    let memory = ledger.pages.values().map(|page| page.memory).chain(ledger.spare.clone());
    let memory: BTreeSet<u32> = memory.collect();
    assert_eq!(memory.len(), ledger.pages.len() + ledger.spare.len(), "each is in one place");
    assert_eq!(memory.len() as u64 * PAGE, ledger.capacity_bytes);
    let idle = ledger.pages.iter().filter(|(_, page)| page.used_bytes == 0);
    assert!(idle.map(|(number, _)| number).eq(&ledger.idle));
    for &(offset, footprint) in taken {
        let range = offset..offset + footprint;
        assert!(!ledger.free.touches(&range) && !ledger.ready.touches(&range));
        assert!(ledger.numbers(&range).all(|number| ledger.pages.contains_key(&number)));
    }
    let mut sorted = taken.to_vec();
    sorted.sort_unstable();
    assert!(sorted.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0), "disjoint");
}

#[test]
fn free_pages_that_lie_apart_hold_one_object() {
    let mut ledger = ledger(8);
    let taken: Vec<_> = (0..8).map(|_| take(&mut ledger, 64).unwrap()).collect();
    assert_eq!(take(&mut ledger, 1), None);
    // Every other one goes: no two free pages lie beside each other.
    taken.iter().step_by(2).for_each(|placed| give(&mut ledger, placed));
    assert_eq!(ledger.usage().largest_free_bytes, 4 * PAGE);
    assert_eq!(ledger.take(4 * PAGE as usize), None, "not before pages were moved");
    let plan = ledger.plan(4 * PAGE).unwrap();
    assert!(!plan.moves.is_empty() && plan.moves.iter().all(|one| one.from != Some(one.to)));
    ledger.settle(plan, true);
    let long = ledger.take(4 * PAGE as usize).unwrap();
    assert_eq!(ledger.usage().largest_free_bytes, 0);
    give(&mut ledger, &long);
    assert_eq!(ledger.usage().largest_free_bytes, 4 * PAGE);
}

#[test]
fn objects_share_pages_where_the_last_one_ended() {
    let mut ledger = ledger(6);
    // One page and a half each: four of them fill six pages.
    let taken: Vec<_> = (0..4).map(|_| take(&mut ledger, 96).unwrap()).collect();
    assert_eq!(ledger.usage().used_bytes, 6 * PAGE);
    // The first and the third go: three pages' worth, of which two are whole.
    give(&mut ledger, &taken[0]);
    give(&mut ledger, &taken[2]);
    assert_eq!(ledger.usage().largest_free_bytes, 2 * PAGE);
    // Half of a page in use and two whole ones.
    let placed = take(&mut ledger, 160).unwrap();
    check(&ledger, &[placed, taken[1], taken[3]]);
}

#[test]
fn missing_pages_are_those_that_are_not_free() {
    let mut ledger = ledger(4);
    assert_eq!(ledger.missing_pages(PAGE), None, "a page is one piece");
    let taken: Vec<_> = (0..4).map(|_| take(&mut ledger, 64).unwrap()).collect();
    let missing = |ledger: &PageLedger, pages| ledger.missing_pages(pages * PAGE).unwrap();
    assert_eq!(missing(&ledger, 3), MissingPages { page_bytes: PAGE, count: 3 });
    give(&mut ledger, &taken[1]);
    assert_eq!(missing(&ledger, 3).count, 2);
    assert_eq!(missing(&ledger, 2).count, 1);
}

#[test]
fn pages_that_could_not_move_are_spare() {
    let mut ledger = ledger(8);
    let taken: Vec<_> = (0..8).map(|_| take(&mut ledger, 64).unwrap()).collect();
    taken.iter().step_by(2).for_each(|placed| give(&mut ledger, placed));
    let kept: Vec<_> = taken.into_iter().skip(1).step_by(2).collect();
    for _ in 0..3 {
        let plan = ledger.plan(4 * PAGE).unwrap();
        assert!(!plan.moves.is_empty());
        ledger.settle(plan, false);
        check(&ledger, &kept);
        assert_eq!(ledger.usage().largest_free_bytes, 4 * PAGE);
    }
    assert!(take(&mut ledger, 4 * 64).is_some(), "what failed may succeed");
}

#[test]
fn plans_are_nobody_elses_until_they_are_settled() {
    let mut ledger = ledger(4);
    let taken: Vec<_> = (0..4).map(|_| take(&mut ledger, 64).unwrap()).collect();
    give(&mut ledger, &taken[0]);
    give(&mut ledger, &taken[2]);
    let plan = ledger.plan(2 * PAGE).unwrap();
    assert_eq!(ledger.take(1), None, "what is to move is nobody's to take");
    assert_eq!(ledger.usage().used_bytes, 2 * PAGE, "and is nobody's");
    ledger.settle(plan, true);
    assert!(ledger.take(1).is_some());
}

/// What a driver knows: which memory is behind which page of addresses.
struct Driver(BTreeMap<u64, u32>);

impl Driver {
    /// Carries out the moves; or only as far as memory becomes spare.
    fn carry_out(&mut self, plan: &PagePlan, done: bool) {
        for &PageMove { memory, from, to } in &plan.moves {
            if let Some(from) = from {
                assert_eq!(self.0.remove(&from), Some(memory), "it moves from where it is");
            }
            assert!(!self.0.values().any(|&one| one == memory), "it is in one place");
            if done {
                assert_eq!(self.0.insert(to, memory), None, "nothing is there before");
            }
        }
    }
}

#[test]
fn ledger_agrees_with_a_driver_at_random() {
    let given = std::env::var("VMEM_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut moved = 0;
    for seed in given.map_or(0..20, |seed| seed..seed + 1) {
        println!("VMEM_SEED={seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let mut ledger = ledger(16);
        let mut driver = Driver((0..16).map(|at| (u64::from(at), at)).collect());
        let mut taken: Vec<Taken> = Vec::new();
        let mut under_way: Option<PagePlan> = None;
        let mut given_up: Vec<u32> = Vec::new();
        for _ in 0..2000 {
            let step = random.random_range(0..12);
            if step == 10 {
                ledger.set_budget(random.random_range(4..16) * PAGE);
                ledger.begin_leaving(random.random_range(1..4) * PAGE);
                let held = (!taken.is_empty()).then(|| taken.swap_remove(0));
                held.iter().for_each(|one| give(&mut ledger, one));
                for page in ledger.end_leaving() {
                    let left = [Left::Gone, Left::Unmapped, Left::Stays][random.random_range(0..3)];
                    if let Some(from) = page.from.filter(|_| left != Left::Stays) {
                        assert_eq!(driver.0.remove(&from), Some(page.memory));
                    }
                    given_up.extend((left == Left::Gone).then_some(page.memory));
                    ledger.settle_leaving(page, left);
                }
            } else if step == 11 {
                ledger.set_budget(random.random_range(10..=16) * PAGE);
                let (plan, surplus) = ledger.plan_new(std::mem::take(&mut given_up));
                for page in surplus {
                    given_up.push(page.memory);
                    ledger.settle_leaving(page, Left::Gone);
                }
                let done = random.random_bool(0.8);
                driver.carry_out(&plan, done);
                ledger.settle_new(plan, done);
            } else if step < 4 && !taken.is_empty() {
                let one = taken.swap_remove(random.random_range(0..taken.len()));
                give(&mut ledger, &one);
            } else if step < 6 {
                let Some(plan) = under_way.take() else { continue };
                let done = random.random_bool(0.8);
                driver.carry_out(&plan, done);
                moved += if done { plan.moves.len() } else { 0 };
                ledger.settle(plan, done);
            } else {
                let longest = [8, 100, 500][random.random_range(0..3)];
                let units = random.random_range(1..longest);
                match ledger.take((units * UNIT) as usize) {
                    Some(one) => taken.push(one),
                    None if under_way.is_some() => {}
                    None => {
                        let largest = ledger.usage().largest_free_bytes;
                        under_way = ledger.plan(units * UNIT);
                        let is_right = under_way.is_some() || largest < units * UNIT;
                        assert!(is_right, "{units} units fit");
                    }
                }
            }
            for one in under_way.iter().flat_map(|plan| &plan.moves) {
                for page in one.from.into_iter().chain([one.to]).map(|page| ledger.page(page)) {
                    assert!(!ledger.free.touches(&page), "it is nobody's while it moves");
                    assert!(!ledger.ready.touches(&page));
                }
            }
            if under_way.is_none() {
                check(&ledger, &taken);
                let pages = ledger.pages.iter().map(|(&at, page)| (at, page.memory));
                assert!(pages.eq(driver.0.clone()));
            }
        }
        if let Some(plan) = under_way {
            ledger.settle(plan, false);
        }
        ledger.set_budget(16 * PAGE);
        let (plan, surplus) = ledger.plan_new(given_up);
        assert_eq!((ledger.lacking(), surplus.len()), (0, 0));
        ledger.settle_new(plan, true);
        for one in taken.drain(..) {
            give(&mut ledger, &one);
        }
        assert_eq!(ledger.usage().largest_free_bytes, 16 * PAGE);
        assert!(take(&mut ledger, 16 * 64).is_some());
    }
    assert!(moved > 100, "{moved} pages moved");
}

#[test]
fn pages_leave_as_soon_as_nothing_of_them_is_used() {
    let mut ledger = ledger(6);
    let taken: Vec<_> = (0..4).map(|_| take(&mut ledger, 64).unwrap()).collect();
    ledger.begin_leaving(3 * PAGE);
    assert_eq!(ledger.usage().capacity_bytes, 6 * PAGE, "none is beyond the budget");
    ledger.set_budget(3 * PAGE);
    ledger.begin_leaving(3 * PAGE);
    assert_eq!(ledger.usage().capacity_bytes, 4 * PAGE, "two were free");
    assert_eq!(take(&mut ledger, 1), None, "what leaves is nobody's to take");
    give(&mut ledger, &taken[1]);
    assert_eq!(take(&mut ledger, 1), None, "so is what is owed");
    give(&mut ledger, &taken[2]);
    let leaving = ledger.end_leaving();
    let mut from: Vec<_> = leaving.iter().map(|page| page.from).collect();
    from.sort_unstable();
    assert_eq!(from, [Some(0), Some(1), Some(4)]);
    check(&ledger, &[taken[0], taken[3]]);
    for (page, left) in leaving.into_iter().zip([Left::Gone, Left::Unmapped, Left::Stays]) {
        ledger.settle_leaving(page, left);
        check(&ledger, &[taken[0], taken[3]]);
    }
    assert_eq!(ledger.usage().capacity_bytes, 5 * PAGE);
    assert_eq!(ledger.usage().largest_free_bytes, 3 * PAGE);
    assert!(take(&mut ledger, 3 * 64).is_some());
}

#[test]
fn new_pages_are_ready_wherever_others_lie() {
    let mut ledger = ledger(4);
    let taken: Vec<_> = (0..4).map(|_| take(&mut ledger, 64).unwrap()).collect();
    for done in [true, false] {
        let first = if done { 4 } else { 7 };
        ledger.set_budget(7 * PAGE);
        assert_eq!(ledger.lacking(), 3);
        let (plan, surplus) = ledger.plan_new((first..first + 5).collect());
        assert_eq!((plan.moves.len(), surplus.len(), ledger.lacking()), (3, 2, 0));
        assert_eq!(take(&mut ledger, 1), None, "not before they are there");
        ledger.settle_new(plan, done);
        check(&ledger, &taken);
        let placed = ledger.take(3 * PAGE as usize);
        assert_eq!(placed.is_some(), done);
        let placed = placed.or_else(|| take(&mut ledger, 3 * 64)).unwrap();
        give(&mut ledger, &placed);
        ledger.set_budget(4 * PAGE);
        ledger.begin_leaving(9 * PAGE);
        for page in ledger.end_leaving() {
            ledger.settle_leaving(page, Left::Gone);
        }
        assert_eq!(ledger.usage().capacity_bytes, 4 * PAGE);
    }
    // More than there are addresses for are spare.
    ledger.set_budget(40 * PAGE);
    let (plan, surplus) = ledger.plan_new((10..40).collect());
    assert_eq!((plan.moves.len(), surplus.len()), (28, 0));
    ledger.settle_new(plan, true);
    check(&ledger, &taken);
    assert_eq!(ledger.usage().capacity_bytes, 34 * PAGE);
}

#[test]
#[should_panic(expected = "was free")]
fn giving_back_twice_is_found() {
    let mut ledger = ledger(2);
    let placed = take(&mut ledger, 10).unwrap();
    give(&mut ledger, &placed);
    give(&mut ledger, &placed);
}
