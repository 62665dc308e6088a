//! The copies in the memory of one device by their address, and which of them go together.
//!
//! Invariant: what is chosen leaves a place for the object that waits, if all of it goes: nothing
//! that stays lies in that place. Where the evictor goes on with the rest it may be a part of such
//! a choice. No object is asked anything under a lock, and a look is bounded. Asked by the evictor
//! where free memory lies in pieces.
//!
//! Where an object lies in one piece of memory, neighbours have to go. Where memory is pages that
//! are mapped to any address, whole pages have to become free, wherever they lie.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::device::MissingPages;

/// The most pages that one look considers.
const PAGES_MAX: usize = 4096;
/// The most copies that are on the pages of one look, and in all windows of another.
const COPIES_MAX: usize = 16 * 1024;

/// A copy in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resident {
    pub(crate) footprint: u64,
    pub(crate) object: u64,
}

/// The copies by their address, for the search for neighbours.
#[derive(Debug, Default)]
pub(crate) struct Residents {
    by_address: BTreeMap<u64, Resident>,
    bytes: u64,
}

impl Residents {
    pub(crate) fn insert(&mut self, address: u64, resident: Resident) {
        self.bytes += resident.footprint;
        let before = self.by_address.insert(address, resident);
        assert!(before.is_none(), "two copies lie at one address of the device");
    }

    pub(crate) fn remove(&mut self, address: u64) {
        let resident =
            self.by_address.remove(&address).expect("invariant: a copy that leaves had entered");
        assert!(self.bytes >= resident.footprint, "copies take what they took");
        self.bytes -= resident.footprint;
        assert!(self.bytes == 0 || !self.by_address.is_empty(), "bytes that are no copy's");
    }

    /// What they take.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The first copy that begins at this address or above.
    pub(crate) fn from(&self, address: u64) -> Option<(u64, Resident)> {
        self.by_address.range(address..).next().map(|(&at, &one)| (at, one))
    }

    /// The last copy that begins below this address.
    pub(crate) fn below(&self, address: u64) -> Option<(u64, Resident)> {
        self.by_address.range(..address).next_back().map(|(&at, &one)| (at, one))
    }
}

/// A copy that can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Leaver {
    object: u64,
    footprint: u64,
    /// Its last access.
    stamp: u64,
}

/// How dear it is that these go: first by the last access of any of them, then by their bytes.
fn cost(leavers: &[Leaver]) -> (u64, u64) {
    let newest = leavers.iter().map(|leaver| leaver.stamp).max();
    (newest.unwrap_or(0), leavers.iter().map(|leaver| leaver.footprint).sum())
}

/// What one look at pages has seen.
#[derive(Default)]
struct Look {
    /// By their number.
    looked_at: BTreeSet<u64>,
    copies: usize,
    /// What goes for each page that can be emptied.
    pages: Vec<Vec<Leaver>>,
}

impl Look {
    fn is_over(&self) -> bool {
        self.looked_at.len() >= PAGES_MAX || self.copies >= COPIES_MAX
    }
}

/// Objects that leave space when they go, all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Neighbours {
    pub(crate) objects: Vec<u64>,
    /// The addresses that become free, if they lie side by side. Then it serves as well if the
    /// objects move elsewhere.
    pub(crate) window: Option<Range<u64>>,
}

/// What a choice of neighbours is made from.
pub(crate) struct Surroundings<'a> {
    /// As [`Residents::from`].
    pub(crate) from: &'a dyn Fn(u64) -> Option<(u64, Resident)>,
    /// As [`Residents::below`].
    pub(crate) below: &'a dyn Fn(u64) -> Option<(u64, Resident)>,
    /// The free bytes from an address to the next range.
    pub(crate) free_from: &'a dyn Fn(u64) -> u64,
    /// The last access of an object that can go.
    pub(crate) stamp: &'a dyn Fn(u64) -> Option<u64>,
}

impl Surroundings<'_> {
    /// Objects that leave `need` free bytes for one object when they go: those that lie beside
    /// each other, or, if whole pages are `missing`, those on pages that lie apart. Of these
    /// choices, all of them near one of the seeds, the one that was used longest ago. Where none is
    /// enough, a part of one, if `parts` are of use; empty if nothing can go.
    pub(crate) fn coldest(
        &self,
        seeds: &[u64],
        need: u64,
        missing: Option<MissingPages>,
        parts: bool,
    ) -> Neighbours {
        let of_pages = |missing| self.coldest_pages(seeds, missing, parts);
        let (pages, is_enough) = missing.map_or_else(Default::default, of_pages);
        let mut copies_left = COPIES_MAX;
        let window = |&seed: &u64| self.window(seed, need, &mut copies_left);
        let windows = seeds.iter().filter_map(window).map(|(leavers, at)| (leavers, Some(at)));
        let whole = windows.chain(is_enough.then(|| (pages.clone(), None)));
        let coldest = whole.min_by_key(|(leavers, _)| cost(leavers));
        let part = if parts { pages } else { Vec::new() };
        let (chosen, window) = coldest.unwrap_or((part, None));
        Neighbours { objects: chosen.into_iter().map(|leaver| leaver.object).collect(), window }
    }

    fn leaver(&self, Resident { footprint, object }: Resident) -> Option<Leaver> {
        Some(Leaver { object, footprint, stamp: (self.stamp)(object)? })
    }

    /// The copy that begins at this address.
    fn at(&self, address: u64) -> Option<Resident> {
        (self.from)(address).filter(|&(at, _)| at == address).map(|(_, resident)| resident)
    }

    /// The copies from the one at `seed` upwards, then downwards, until they and what is free
    /// between them come to `need` bytes, and the addresses of all that. None if something that
    /// cannot go is in the way, or they are more than are left for this look.
    fn window(
        &self,
        seed: u64,
        need: u64,
        copies_left: &mut usize,
    ) -> Option<(Vec<Leaver>, Range<u64>)> {
        let mut leavers = Vec::new();
        let mut take = |resident| {
            *copies_left = copies_left.checked_sub(1)?;
            leavers.push(self.leaver(resident)?);
            Some(())
        };
        let mut start = seed;
        let mut end = seed;
        while end - start < need {
            match self.at(end) {
                Some(resident) => match take(resident) {
                    Some(()) => end += resident.footprint,
                    None => break,
                },
                None => match (self.free_from)(end) {
                    0 => break,
                    free => end += free,
                },
            }
        }
        while end - start < need {
            let missing = need - (end - start);
            if start >= missing && (self.free_from)(start - missing) >= missing {
                start -= missing;
                break;
            }
            let (address, resident) = (self.below)(start)?;
            let gap = start.checked_sub(address + resident.footprint)?;
            if gap > 0 && (self.free_from)(address + resident.footprint) < gap {
                return None;
            }
            take(resident)?;
            start = address;
        }
        // No more than is needed: what is free beyond that is of use to those that move.
        let start = if start < seed { end - need } else { start };
        Some((leavers, start..start + need))
    }

    /// The copies on the pages that were used longest ago, of those on which one of the seeds lies,
    /// or what begins there, and of those behind them if these are too few; and whether that is as
    /// many pages as are missing, or a part as large as one look finds.
    fn coldest_pages(
        &self,
        seeds: &[u64],
        missing: MissingPages,
        parts: bool,
    ) -> (Vec<Leaver>, bool) {
        let MissingPages { page_bytes, count } = missing;
        let mut look = Look::default();
        for &seed in seeds {
            self.look_at(seed, page_bytes, &mut look);
        }
        // A choice of twice as many. Where the coldest all lie on pages that cannot be emptied,
        // those behind them are as good as any.
        let first = seeds.last().map_or(0, |seed| (seed / page_bytes + 1) * page_bytes);
        for turn in [first..u64::MAX, 0..first] {
            let mut at = turn.start;
            while look.pages.len() as u64 <= 2 * count && !look.is_over() {
                let next = (self.from)(at).filter(|&(next, _)| next < turn.end);
                let Some((next, resident)) = next else { break };
                self.look_at(next, page_bytes, &mut look);
                // The last one on the page may reach into others, and share the last of these.
                let end = (next / page_bytes + 1) * page_bytes;
                let last = (self.below)(end).map_or(next, |(last, _)| last);
                let reaches = (next + resident.footprint - 1) / page_bytes * page_bytes;
                at = if last > next { last } else { reaches.max(end) };
            }
        }
        let is_large = look.is_over() && parts;
        let mut pages = look.pages;
        pages.sort_by_key(|leavers| cost(leavers));
        let is_enough = pages.len() as u64 >= count || is_large;
        pages.truncate(usize::try_from(count).unwrap_or(usize::MAX));
        // One that lies on several of them goes once.
        let each = pages.into_iter().flatten().map(|leaver| (leaver.object, leaver));
        let leavers: Vec<_> = each.collect::<BTreeMap<_, _>>().into_values().collect();
        let is_enough = is_enough && !leavers.is_empty();
        (leavers, is_enough)
    }

    /// Looks at the pages on which this address lies, or what begins there, as far as they were not
    /// looked at.
    fn look_at(&self, seed: u64, page_bytes: u64, look: &mut Look) {
        let end = seed + self.at(seed).map_or(1, |resident| resident.footprint);
        for page in seed / page_bytes..end.div_ceil(page_bytes) {
            if !look.is_over() && look.looked_at.insert(page) {
                let range = page * page_bytes..(page + 1) * page_bytes;
                let leavers = self.page(&range, &mut look.copies);
                // What is free already is not missing.
                look.pages.extend(leavers.filter(|leavers| !leavers.is_empty()));
            }
        }
    }

    /// The copies that lie on a page, or reach into it. None if something that cannot go does.
    fn page(&self, page: &Range<u64>, copies: &mut usize) -> Option<Vec<Leaver>> {
        let mut leavers = Vec::new();
        let mut take = |resident| {
            *copies += 1;
            leavers.push(self.leaver(resident)?);
            Some(())
        };
        let mut at = page.start;
        if let Some((address, resident)) = (self.below)(page.start)
            && address + resident.footprint > page.start
        {
            take(resident)?;
            at = address + resident.footprint;
        }
        while at < page.end {
            match self.at(at) {
                Some(resident) => {
                    take(resident)?;
                    at += resident.footprint;
                }
                None => match (self.free_from)(at) {
                    0 => return None,
                    free => at += free,
                },
            }
        }
        Some(leavers)
    }
}

#[cfg(test)]
mod tests;
