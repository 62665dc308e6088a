//! Memory in which copies lie as a test says, and what is chosen there.

use super::*;

const PAGE: u64 = 1000;

/// Copies by address and footprint, each named by its address and used at a stamp; what can
/// not go has none. The rest of `0..end` is free, but for `foreign`.
struct Memory {
    residents: Residents,
    stamps: BTreeMap<u64, u64>,
    foreign: Vec<Range<u64>>,
    end: u64,
}

impl Memory {
    fn new(copies: &[(u64, u64, Option<u64>)], foreign: Vec<Range<u64>>, end: u64) -> Self {
        let mut residents = Residents::default();
        for &(address, footprint, _) in copies {
            residents.insert(address, Resident { footprint, object: address });
        }
        let stamps = copies.iter().filter_map(|&(address, _, at)| Some((address, at?)));
        Memory { residents, stamps: stamps.collect(), foreign, end }
    }

    fn free_from(&self, address: u64) -> u64 {
        let copies = self.residents.by_address.iter().map(|(&at, one)| at..at + one.footprint);
        let mut next = self.end;
        for used in copies.chain(self.foreign.iter().cloned()) {
            if used.contains(&address) {
                return 0;
            }
            if used.start > address {
                next = next.min(used.start);
            }
        }
        next.saturating_sub(address)
    }

    fn choose(&self, choice: impl FnOnce(&Surroundings<'_>) -> Neighbours) -> Vec<u64> {
        let mut chosen = choice(&Surroundings {
            from: &|address| self.residents.from(address),
            below: &|address| self.residents.below(address),
            free_from: &|address| self.free_from(address),
            stamp: &|object| self.stamps.get(&object).copied(),
        })
        .objects;
        chosen.sort_unstable();
        chosen
    }

    fn coldest(&self, seeds: &[u64], need: u64, pages: Option<u64>) -> Vec<u64> {
        let missing = pages.map(|count| MissingPages { page_bytes: PAGE, count });
        self.choose(|space| space.coldest(seeds, need, missing, true))
    }
}

#[test]
fn window_has_what_lies_side_by_side_and_the_gaps() {
    let copies = [(0, 400, Some(9)), (400, 300, Some(1)), (900, 300, Some(2))];
    let memory = Memory::new(&copies, Vec::new(), 1300);
    let window = |need| memory.coldest(&[400, 900], need, None);
    assert_eq!(window(300), [400]);
    assert_eq!(window(500), [400], "what is free behind it serves");
    assert_eq!(window(700), [400, 900]);
    let foreign = 700..900;
    let beside_a_foreign_one = Memory::new(&copies, Vec::from([foreign]), 1300);
    let chosen = beside_a_foreign_one.coldest(&[400, 900], 600, None);
    assert_eq!(chosen, [0, 400], "a range that is no copy's cannot go");
}

#[test]
fn window_is_as_long_as_what_is_needed() {
    let copies = [(0, 400, Some(9)), (400, 300, Some(1)), (900, 300, Some(2))];
    let memory = Memory::new(&copies, Vec::new(), 1300);
    let at = |seed, need| {
        let mut window = None;
        memory.choose(|space| {
            let chosen = space.coldest(&[seed], need, None, true);
            window.clone_from(&chosen.window);
            chosen
        });
        window
    };
    assert_eq!(at(400, 200), Some(400..600), "the rest of the copy is not needed");
    assert_eq!(at(400, 450), Some(400..850), "nor what is free behind it");
    assert_eq!(at(900, 450), Some(850..1300), "with what is free below");
    assert_eq!(at(900, 700), Some(600..1300), "the rest of the last copy below");
}

#[test]
fn pages_that_lie_apart_are_emptied() {
    // Four pages; the second and the last are the coldest.
    let copies = [
        (0, 1000, Some(9)),
        (1000, 400, Some(1)),
        (1400, 500, Some(2)),
        (2000, 1000, Some(8)),
        (3000, 900, Some(3)),
    ];
    let memory = Memory::new(&copies, Vec::new(), 4 * PAGE);
    let seeds = [1000, 1400, 3000, 2000, 0];
    assert_eq!(memory.coldest(&seeds, 2000, Some(2)), [1000, 1400, 3000]);
    assert_eq!(memory.coldest(&seeds, 1500, Some(1)), [1000, 1400], "no more than are missing");
    assert_eq!(memory.coldest(&seeds, 9000, Some(9)), [0, 1000, 1400, 2000, 3000], "all of it");
    assert_eq!(memory.coldest(&[], 2000, Some(2)), [1000, 1400, 3000], "without a seed too");
}

#[test]
fn window_goes_where_it_is_used_less_than_pages_are() {
    // One copy across two pages: to take its place needs no page of its neighbours'.
    let copies = [(0, 500, Some(8)), (500, 1500, Some(1)), (2000, 1000, Some(9))];
    let memory = Memory::new(&copies, Vec::new(), 3 * PAGE);
    assert_eq!(memory.coldest(&[500, 0, 2000], 1500, Some(2)), [500]);
}

#[test]
fn pages_with_something_that_stays_are_left() {
    let stays = (600, 400, None);
    let copies = [(0, 600, Some(1)), stays, (1500, 1000, Some(5)), (3100, 100, Some(2))];
    let memory = Memory::new(&copies, vec![2700..2750, 3500..3600], 4 * PAGE);
    // One page of two: a part is better than nothing.
    assert_eq!(memory.coldest(&[0, 3100, 1500], 2000, Some(2)), [1500]);
    assert_eq!(memory.coldest(&[0, 3100], 2000, Some(2)), [1500], "from behind");
}

#[test]
fn pages_behind_are_looked_at_where_the_coldest_cannot_be_emptied() {
    let copies = [(0, 500, Some(1)), (500, 500, None), (1000, 800, Some(7)), (2000, 900, Some(8))];
    let memory = Memory::new(&copies, Vec::new(), 3 * PAGE);
    assert_eq!(memory.coldest(&[0], 1100, Some(1)), [1000]);
    assert_eq!(memory.coldest(&[0], 1500, Some(2)), [1000, 2000]);
}

/// Copies of a page and a half each, of which those at the cold end cannot go.
#[test]
fn look_behind_goes_round_the_whole_memory() {
    let copy = |n: u64| (n * 1500, 1500, (n > 1 && n != 4).then_some(n));
    let copies: Vec<_> = (0..8).map(copy).collect();
    let memory = Memory::new(&copies, Vec::new(), 12 * PAGE);
    // Pages that have nothing of the first two, and of the one between.
    assert_eq!(memory.coldest(&[0], 2500, Some(3)), [3000, 4500]);
    assert_eq!(memory.coldest(&[0], 4500, Some(4)), [3000, 4500, 7500]);
    assert_eq!(memory.coldest(&[10_500], 2500, Some(3)), [3000, 4500], "from the first again");
}

#[test]
fn part_is_chosen_where_it_is_of_use_alone() {
    let copies = [(0, 900, Some(1)), (1000, 900, None)];
    let memory = Memory::new(&copies, Vec::new(), 2 * PAGE);
    let missing = Some(MissingPages { page_bytes: PAGE, count: 2 });
    for (parts, chosen) in [(true, vec![0]), (false, Vec::new())] {
        assert_eq!(memory.choose(|space| space.coldest(&[0], 2000, missing, parts)), chosen);
    }
}

#[test]
fn long_copies_free_the_pages_that_are_theirs_alone_first() {
    let copies = [(0, 500, Some(9)), (500, 2600, Some(1)), (3100, 900, Some(8))];
    let memory = Memory::new(&copies, Vec::new(), 4 * PAGE);
    assert_eq!(memory.coldest(&[500], 2800, Some(2)), [500]);
    assert_eq!(memory.coldest(&[500], 3500, Some(3)), [500, 3100]);
}
