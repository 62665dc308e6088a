//! Where objects lie in the memory of a device.
//!
//! Invariant: ranges are disjoint, and memory is behind all of each. Nothing here waits for the
//! driver: pages are moved by a thread of their own (`mover`), one plan at a time, and those that
//! wait for them are woken then. Where the driver refuses, or does not answer, memory is as one
//! block until it does. Called by the tier; ranges come back to it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vmem_core::backend::{DeviceRange, DeviceUsage, MissingPages, RangeLedger, RangeOwner};

use crate::card::{Card, UNIT};
use crate::mapped::Mapped;
use crate::paged::{Left, PageLeaving, PageLedger, PagePlan};

/// After the driver refused to move pages they stay where they are for so long, and twice as long
/// each time that it refuses again.
const REST_MIN: Duration = Duration::from_millis(50);
const REST_MAX: Duration = Duration::from_secs(2);
/// So often it is asked again before other ways are taken.
const REFUSALS_MAX: u32 = 3;
/// What is not moved by then is not waited for.
const HANGS: Duration = Duration::from_secs(5);

/// The memory of a tier.
pub(crate) struct Memory {
    base: u64,
    ledger: Mutex<Ledger>,
    page_bytes: Option<u64>,
    /// One at a time makes pages leave.
    shrinking: Mutex<()>,
    /// Where each object has an allocation of its own.
    separate: Option<Separate>,
}

enum Ledger {
    Block(RangeLedger),
    Pages { pages: Box<PageLedger>, moves: Moves, refusals: u32 },
}

/// Whether pages can be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moves {
    Ready,
    UnderWaySince(Instant),
    /// The driver refused.
    Resting,
}

/// What a request comes to.
pub(crate) enum Reserved {
    Range(DeviceRange),
    /// Nothing before these pages were moved, for which the caller sees.
    After(PagePlan),
    None,
}

/// Allocations of single objects.
struct Separate {
    card: Arc<Card>,
    /// Where in the ledger each address is.
    offsets: Mutex<HashMap<u64, u64>>,
}

impl Memory {
    /// The memory that a card has taken.
    pub(crate) fn new(card: &Arc<Card>) -> Arc<Self> {
        let ledger = match card.pages() {
            Some(mapped) => {
                let count = mapped.count() as u32;
                let addresses = mapped.addresses();
                let pages = PageLedger::new(UNIT, mapped.page_bytes(), count, addresses);
                Ledger::Pages { pages: Box::new(pages), moves: Moves::Ready, refusals: 0 }
            }
            None => Ledger::Block(RangeLedger::new(card.capacity(), UNIT)),
        };
        let separate =
            (card.base() == 0).then(|| Separate { card: card.clone(), offsets: Mutex::default() });
        let page_bytes = card.pages().map(Mapped::page_bytes);
        let shrinking = Mutex::default();
        let ledger = Mutex::new(ledger);
        Arc::new(Memory { base: card.base(), ledger, page_bytes, shrinking, separate })
    }

    /// The size of a page, where memory is pages.
    pub(crate) fn page_bytes(&self) -> Option<u64> {
        self.page_bytes
    }

    /// Takes memory for `len` bytes.
    pub(crate) fn reserve(self: &Arc<Self>, len: usize) -> Reserved {
        let taken = match &mut *self.ledger.lock() {
            Ledger::Block(ledger) => ledger.take(len),
            Ledger::Pages { pages, moves, .. } => match pages.take(len) {
                None if *moves == Moves::Ready => match pages.plan(pages.footprint(len)) {
                    Some(plan) => {
                        *moves = Moves::UnderWaySince(Instant::now());
                        return Reserved::After(plan);
                    }
                    None => None,
                },
                taken => taken,
            },
        };
        let Some((offset, footprint)) = taken else { return Reserved::None };
        match self.address(offset, len) {
            Some(address) => {
                Reserved::Range(DeviceRange::new(address, len, footprint, self.clone()))
            }
            None => {
                self.give_back(offset, footprint);
                Reserved::None
            }
        }
    }

    /// As `DeviceBackend::reserve_outside`.
    pub(crate) fn reserve_outside(
        self: &Arc<Self>,
        len: usize,
        window: &Range<u64>,
    ) -> Option<DeviceRange> {
        let offset = |address: u64| address.checked_sub(self.base);
        let window = offset(window.start)?..offset(window.end)?;
        let taken = match &mut *self.ledger.lock() {
            // Allocations of their own lie beside nothing.
            Ledger::Block(ledger) if self.separate.is_none() => ledger.take_outside(len, &window),
            _ => None,
        };
        let (at, footprint) = taken?;
        Some(DeviceRange::new(self.base + at, len, footprint, self.clone()))
    }

    /// The pages of a plan were moved, or are not: then they rest for as long as this returns.
    pub(crate) fn settle(&self, plan: PagePlan, done: bool) -> Option<Duration> {
        let Ledger::Pages { pages, moves, refusals } = &mut *self.ledger.lock() else {
            return None;
        };
        pages.settle(plan, done);
        if done {
            (*moves, *refusals) = (Moves::Ready, 0);
            return None;
        }
        let rest = REST_MAX.min(REST_MIN * 2_u32.saturating_pow(*refusals));
        (*moves, *refusals) = (Moves::Resting, refusals.saturating_add(1));
        Some(rest)
    }

    /// Pages may be moved again.
    pub(crate) fn rested(&self) {
        if let Ledger::Pages { moves, .. } = &mut *self.ledger.lock() {
            *moves = Moves::Ready;
        }
    }

    /// As `DeviceBackend::set_budget`.
    pub(crate) fn set_budget(&self, bytes: u64) {
        if let Ledger::Pages { pages, .. } = &mut *self.ledger.lock() {
            pages.set_budget(bytes);
        }
    }

    /// As `DeviceBackend::budget`.
    pub(crate) fn budget(&self) -> u64 {
        match &*self.ledger.lock() {
            Ledger::Block(ledger) => ledger.usage().capacity_bytes,
            Ledger::Pages { pages, .. } => pages.budget(),
        }
    }

    /// Pages of which nothing is used, and that are beyond the budget, are nobody's from now on,
    /// for the caller to give to the device: no more than `bytes` of them. `range` is dropped, and
    /// what it had is among them.
    pub(crate) fn let_leave(&self, bytes: u64, range: Option<DeviceRange>) -> Vec<PageLeaving> {
        let _one = self.shrinking.lock();
        if let Ledger::Pages { pages, .. } = &mut *self.ledger.lock() {
            pages.begin_leaving(bytes);
        }
        // Not under the lock: it comes back to the ledger.
        drop(range);
        match &mut *self.ledger.lock() {
            Ledger::Pages { pages, .. } => pages.end_leaving(),
            Ledger::Block(_) => Vec::new(),
        }
    }

    /// Whether a page that is to leave is beyond the budget still.
    pub(crate) fn may_leave(&self) -> bool {
        match &*self.ledger.lock() {
            Ledger::Pages { pages, .. } => pages.lacking() == 0,
            Ledger::Block(_) => false,
        }
    }

    /// How many pages the budget lacks.
    pub(crate) fn lacking_pages(&self) -> u64 {
        match &*self.ledger.lock() {
            Ledger::Pages { pages, .. } => pages.lacking(),
            Ledger::Block(_) => 0,
        }
    }

    /// What became of a page that was to leave.
    pub(crate) fn settle_leaving(&self, page: PageLeaving, left: Left) {
        if let Ledger::Pages { pages, .. } = &mut *self.ledger.lock() {
            pages.settle_leaving(page, left);
        }
    }

    /// Where new pages of memory go, and those that are beyond the budget.
    pub(crate) fn plan_new(&self, memory: Vec<u32>) -> Option<(PagePlan, Vec<PageLeaving>)> {
        match &mut *self.ledger.lock() {
            Ledger::Pages { pages, .. } => Some(pages.plan_new(memory)),
            Ledger::Block(_) => None,
        }
    }

    /// They are there, or are behind no address.
    pub(crate) fn settle_new(&self, plan: PagePlan, done: bool) {
        if let Ledger::Pages { pages, .. } = &mut *self.ledger.lock() {
            pages.settle_new(plan, done);
        }
    }

    /// What lies at this place of the ledger, made if need be.
    fn address(&self, offset: u64, len: usize) -> Option<u64> {
        let Some(separate) = &self.separate else { return Some(self.base + offset) };
        let address = separate.card.allocate(len)?;
        separate.offsets.lock().insert(address, offset);
        Some(address)
    }

    fn give_back(&self, offset: u64, footprint: u64) {
        match &mut *self.ledger.lock() {
            Ledger::Block(ledger) => ledger.give_back(offset, footprint),
            Ledger::Pages { pages, .. } => pages.give_back(offset, footprint),
        }
    }

    /// What `len` bytes take, in bytes.
    pub(crate) fn footprint(&self, len: usize) -> u64 {
        match &*self.ledger.lock() {
            Ledger::Block(ledger) => ledger.footprint(len),
            Ledger::Pages { pages, .. } => pages.footprint(len),
        }
    }

    /// As `DeviceBackend::free_from`.
    pub(crate) fn free_from(&self, address: u64) -> u64 {
        // Allocations of their own lie beside nothing.
        if self.separate.is_some() {
            return 0;
        }
        let Some(offset) = address.checked_sub(self.base) else { return 0 };
        match &*self.ledger.lock() {
            Ledger::Block(ledger) => ledger.free_from(offset),
            Ledger::Pages { pages, .. } => pages.free_from(offset),
        }
    }

    /// As `DeviceBackend::missing_pages`.
    pub(crate) fn missing_pages(&self, footprint: u64) -> Option<MissingPages> {
        match &mut *self.ledger.lock() {
            Ledger::Block(_) => None,
            Ledger::Pages { pages, moves, refusals } => {
                let missing = pages.missing_pages(footprint)?;
                let is_coming = match moves {
                    // Since the caller was refused; it was rung for.
                    _ if pages.is_ready(footprint) => true,
                    // No place was found for what is free.
                    Moves::Ready => false,
                    Moves::UnderWaySince(since) => {
                        if since.elapsed() >= HANGS {
                            return None;
                        }
                        !vmem_core::planted!("page-on-its-way")
                    }
                    Moves::Resting if *refusals >= REFUSALS_MAX => return None,
                    Moves::Resting => missing.count == 0,
                };
                let count = if is_coming { 0 } else { missing.count.max(1) };
                Some(MissingPages { count, ..missing })
            }
        }
    }

    /// As `DeviceBackend::coming_bytes`.
    pub(crate) fn coming_bytes(&self) -> u64 {
        match &*self.ledger.lock() {
            Ledger::Pages { pages, moves: Moves::UnderWaySince(since), .. }
                if since.elapsed() < HANGS =>
            {
                pages.bare_bytes()
            }
            _ => 0,
        }
    }

    /// The figures, now.
    pub(crate) fn usage(&self) -> DeviceUsage {
        match &*self.ledger.lock() {
            Ledger::Block(ledger) => ledger.usage(),
            Ledger::Pages { pages, .. } => pages.usage(),
        }
    }
}

impl RangeOwner for Memory {
    fn release(&self, address: u64, footprint: u64) {
        let offset = match &self.separate {
            None => Some(address - self.base),
            Some(separate) => {
                let offset = separate.offsets.lock().remove(&address);
                separate.card.free_one(address);
                offset
            }
        };
        if let Some(offset) = offset {
            self.give_back(offset, footprint);
        }
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("usage", &self.usage()).finish_non_exhaustive()
    }
}
