//! Which addresses of a device's memory are free, and behind which of them there is memory.
//!
//! Invariant: pages of memory are behind disjoint pages of addresses, or behind none; all of a
//! range that was taken has memory behind it. Free addresses are many times the memory, so that
//! memory which is free on whole pages serves any length, wherever it lies, once it was moved.
//! Pure: what a move means is the caller's to do. Called by `memory`.
//!
//! Like a heap that grows: what comes next begins where the last one ended, and shares its page.

mod budget;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use vmem_core::backend::{DeviceUsage, End, MissingPages, Ranges};

pub(crate) use budget::{Left, PageLeaving};

/// Requests below this length, in bytes, take the high end of a range, so that they do not end up
/// between long ones.
const SHORT_BYTES: u64 = 64 * 1024;
/// Places that are compared for one request.
const PLACES_MAX: usize = 8;

/// A page of memory that moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageMove {
    /// Which memory.
    pub(crate) memory: u32,
    /// The page of addresses before which it is now, if before any.
    pub(crate) from: Option<u64>,
    /// That before which it is to be.
    pub(crate) to: u64,
}

/// Pages that are to move, so that all of a range has memory. Nobody else has the range, or these
/// pages, until they were [settled](PageLedger::settle).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PagePlan {
    /// From the first address, in bytes.
    range: Range<u64>,
    /// By ascending addresses.
    pub(crate) moves: Vec<PageMove>,
}

/// A page of addresses with memory behind it.
#[derive(Clone, Copy, Debug)]
struct Page {
    memory: u32,
    used_bytes: u64,
}

/// The addresses and the memory of one tier. All in bytes from the first address.
#[derive(Debug)]
pub(crate) struct PageLedger {
    unit: u64,
    page_bytes: u64,
    capacity_bytes: u64,
    /// What the capacity is to become.
    budget_bytes: u64,
    /// What is on its way to become part of it.
    joining_bytes: u64,
    /// The free addresses.
    free: Ranges,
    /// Those of them with memory behind.
    ready: Ranges,
    /// By their number among the addresses.
    pages: BTreeMap<u64, Page>,
    /// The pages of which nothing is used.
    idle: BTreeSet<u64>,
    /// Memory that is behind no address.
    spare: Vec<u32>,
    /// How many pages leave as soon as nothing of them is used, and those that have.
    owed: u64,
    leaving: Vec<PageLeaving>,
    used_bytes: u64,
    peak_bytes: u64,
}

impl PageLedger {
    /// `count` pages of memory, behind the first of `addresses` pages.
    pub(crate) fn new(unit: u64, page_bytes: u64, count: u32, addresses: u64) -> Self {
        let capacity_bytes = u64::from(count) * page_bytes;
        let mut free = Ranges::default();
        free.add(0..addresses * page_bytes);
        let mut ready = Ranges::default();
        ready.add(0..capacity_bytes);
        let page = |memory| (u64::from(memory), Page { memory, used_bytes: 0 });
        PageLedger {
            unit,
            page_bytes,
            capacity_bytes,
            budget_bytes: capacity_bytes,
            joining_bytes: 0,
            free,
            ready,
            pages: (0..count).map(page).collect(),
            idle: (0..u64::from(count)).collect(),
            spare: Vec::new(),
            owed: 0,
            leaving: Vec::new(),
            used_bytes: 0,
            peak_bytes: 0,
        }
    }

    /// What `len` bytes take, rounding included, in bytes.
    pub(crate) fn footprint(&self, len: usize) -> u64 {
        (len as u64).max(1).checked_next_multiple_of(self.unit).unwrap_or(u64::MAX)
    }

    /// Takes memory for `len` bytes from what is ready: its offset and its footprint.
    pub(crate) fn take(&mut self, len: usize) -> Option<(u64, u64)> {
        let footprint = self.footprint(len);
        let end = if footprint < SHORT_BYTES { End::High } else { End::Low };
        let range = self.ready.take(footprint, end)?;
        assert!(self.free.take_exact(&range), "memory that is ready is free");
        self.used_bytes += footprint;
        self.peak_bytes = self.peak_bytes.max(self.used_bytes);
        for (number, bytes) in self.shares(&range) {
            self.expect_page(number).used_bytes += bytes;
            self.idle.remove(&number);
        }
        Some((range.start, footprint))
    }

    /// Which pages to move, so that an object of this footprint finds memory that is ready: those
    /// of a place that needs the fewest whole pages. None if too few are free.
    pub(crate) fn plan(&mut self, footprint: u64) -> Option<PagePlan> {
        let (_, start) = self
            .places(footprint)
            .into_iter()
            .map(|start| (self.cost(&(start..start + footprint)), start))
            .filter(|&(cost, _)| cost <= self.whole_pages())
            .min()?;
        let range = start..start + footprint;
        assert!(self.free.take_exact(&range), "a place is free");
        self.ready.remove(&range);
        let bare = self.numbers(&range).filter(|number| !self.pages.contains_key(number));
        let bare: Vec<u64> = bare.collect();
        let moves = bare.into_iter().map(|to| {
            // Nobody is to have the rest of the page before it has memory.
            self.free.remove(&self.page(to));
            let (memory, from) = self.find_memory(&range);
            PageMove { memory, from, to }
        });
        let moves = moves.collect();
        Some(PagePlan { range, moves })
    }

    /// The moves of a plan were done: all of its range is ready. Or they were not: their memory is
    /// behind no address.
    pub(crate) fn settle(&mut self, plan: PagePlan, done: bool) {
        let PagePlan { range, moves } = plan;
        self.free.add(range.clone());
        for PageMove { memory, from, to } in moves {
            if let Some(from) = from.filter(|_| !vmem_core::planted!("page-addresses")) {
                self.free.add(self.page(from));
            }
            let page = self.page(to);
            self.free.add(page.start..page.start.max(range.start));
            self.free.add(page.end.min(range.end)..page.end);
            if done {
                self.pages.insert(to, Page { memory, used_bytes: 0 });
                self.idle.insert(to);
                self.ready.add(page.start..page.start.max(range.start));
                self.ready.add(page.end.min(range.end)..page.end);
            } else {
                self.spare.push(memory);
            }
        }
        for (number, bytes) in self.shares(&range) {
            if self.pages.contains_key(&number) {
                let start = range.start.max(self.page(number).start);
                self.ready.add(start..start + bytes);
            }
        }
    }

    /// Gives back what `take` returned.
    ///
    /// # Panics
    ///
    /// If it was not taken: the ledger is wrong then.
    pub(crate) fn give_back(&mut self, offset: u64, footprint: u64) {
        let range = offset..offset + footprint;
        self.free.add(range.clone());
        self.ready.add(range.clone());
        self.used_bytes -= footprint;
        for (number, bytes) in self.shares(&range) {
            let page = self.expect_page(number);
            page.used_bytes -= bytes;
            if page.used_bytes == 0 {
                self.idle.insert(number);
            }
        }
        self.let_leave();
    }

    /// How many bytes with memory behind them are free from this offset on.
    pub(crate) fn free_from(&self, offset: u64) -> u64 {
        self.ready.run_from(offset)
    }

    /// How many whole pages an object of this footprint lacks: none if as many are free, though
    /// they may have to move. None at all where it is no longer than one.
    pub(crate) fn missing_pages(&self, footprint: u64) -> Option<MissingPages> {
        let needed = footprint.div_ceil(self.page_bytes);
        let count = needed.saturating_sub(self.whole_pages());
        (footprint > self.page_bytes).then_some(MissingPages { page_bytes: self.page_bytes, count })
    }

    /// Whether there is memory for an object of this footprint that need not move.
    pub(crate) fn is_ready(&self, footprint: u64) -> bool {
        self.ready.longest_len() >= footprint
    }

    /// The free bytes that are not ready.
    pub(crate) fn bare_bytes(&self) -> u64 {
        self.capacity_bytes - self.used_bytes - self.ready.total()
    }

    /// The figures, now.
    pub(crate) fn usage(&self) -> DeviceUsage {
        let longest = self.free.longest().unwrap_or(0..0);
        let start = longest.start.next_multiple_of(self.page_bytes);
        let whole = (self.whole_pages() * self.page_bytes).min(longest.end.saturating_sub(start));
        DeviceUsage {
            used_bytes: self.used_bytes,
            capacity_bytes: self.capacity_bytes,
            peak_bytes: self.peak_bytes,
            largest_free_bytes: self.ready.longest_len().max(whole),
        }
    }

    /// The pages of memory of which nothing is used.
    fn whole_pages(&self) -> u64 {
        (self.idle.len() + self.spare.len()) as u64
    }

    fn page(&self, number: u64) -> Range<u64> {
        number * self.page_bytes..(number + 1) * self.page_bytes
    }

    /// The pages on which a range lies, by number.
    fn numbers(&self, range: &Range<u64>) -> Range<u64> {
        range.start / self.page_bytes..range.end.div_ceil(self.page_bytes)
    }

    /// The pages on which a range lies, with the bytes of it that are on each.
    fn shares(&self, range: &Range<u64>) -> impl Iterator<Item = (u64, u64)> + use<> {
        let range = range.clone();
        let page_bytes = self.page_bytes;
        self.numbers(&range).map(move |number| {
            let start = range.start.max(number * page_bytes);
            (number, range.end.min((number + 1) * page_bytes) - start)
        })
    }

    fn expect_page(&mut self, number: u64) -> &mut Page {
        self.pages.get_mut(&number).expect("invariant: what is used has memory behind it")
    }

    /// Memory for one page, from where nothing is used; not from the pages of `range`. The
    /// addresses before which it was are nobody's until the caller adds them.
    fn find_memory(&mut self, range: &Range<u64>) -> (u32, Option<u64>) {
        if let Some(memory) = self.spare.pop() {
            return (memory, None);
        }
        let own = self.numbers(range);
        let above = self.idle.range(own.end..).next_back();
        let number = above.or_else(|| self.idle.range(..own.start).next_back()).copied();
        let number = number.expect("invariant: the cost of a place was asked first");
        (self.take_idle(number), Some(number))
    }

    /// The memory of an idle page.
    fn take_idle(&mut self, number: u64) -> u32 {
        let page = self.pages.remove(&number).expect("invariant: an idle page has memory");
        self.idle.remove(&number);
        let addresses = self.page(number);
        assert!(self.ready.take_exact(&addresses), "an idle page is ready");
        // They have memory behind them until it has gone.
        let is_kept = !vmem_core::planted!("page-addresses");
        assert!(!is_kept || self.free.take_exact(&addresses), "an idle page is free");
        page.memory
    }

    /// How many whole pages a range takes: those without memory, which get some, and idle ones.
    fn cost(&self, range: &Range<u64>) -> u64 {
        let numbers = self.numbers(range);
        let with_memory = self.pages.range(numbers.clone()).count() as u64;
        let idle = self.idle.range(numbers.clone()).count() as u64;
        numbers.end - numbers.start - with_memory + idle
    }

    /// Where a range of this length could begin: at either end of memory that is ready, so that
    /// what is left of a page is used, and on a page of its own.
    fn places(&self, footprint: u64) -> Vec<u64> {
        let mut places = Vec::new();
        for run in self.ready.longest_first().take(PLACES_MAX) {
            let below = run.end.checked_sub(footprint);
            places.extend([Some(run.start), below].into_iter().flatten());
        }
        let longest = self.free.longest().map(|run| run.start);
        places.extend(longest.map(|start| start.next_multiple_of(self.page_bytes)));
        places.retain(|&start| self.free.run_from(start) >= footprint);
        places
    }
}

#[cfg(test)]
mod tests;
