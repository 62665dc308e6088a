//! Memory of a device as pages that are mapped to addresses, and mapped elsewhere later.
//!
//! Invariant: each page of memory is mapped to one page of addresses at most; one that is moved, or
//! freed at last, is used by no copy and no kernel. Called by the card, on threads that are bound
//! to its context.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::ops::Range;

use cudarc::driver::{CudaContext, DriverError, sys};
use parking_lot::Mutex;

use crate::paged::{Left, PageLeaving, PageMove};

/// Fewer pages are one block: that is as good for so little memory.
const PAGES_MIN: u64 = 16;
/// With more of them opening takes long; they are larger then.
const PAGES_MAX: u64 = 16 * 1024;
/// How many times the memory of the device there are addresses, where there are as many: so that
/// free pages find addresses side by side, whatever lies between, and more memory finds some too.
const ADDRESSES: [u64; 3] = [16, 8, 4];
/// The driver's kinds of what is asked for, by number.
const PINNED: c_uint = 1;
const ON_DEVICE: c_uint = 1;
const READ_AND_WRITE: c_uint = 3;
const RECOMMENDED: c_uint = 1;

/// Where memory is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Location {
    kind: c_uint,
    device: c_int,
}

/// What memory is asked for; the rest is for kinds that are not.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Kind {
    kind: c_uint,
    shared_by: c_uint,
    location: Location,
    metadata: *mut c_void,
    flags: u64,
}

/// Which device may do what with it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Access {
    location: Location,
    flags: c_uint,
}

type Handle = c_ulonglong;

/// What of the driver is needed besides what every store needs: looked up here, since a cudarc that
/// was built for a newer one describes memory otherwise.
#[derive(Clone, Copy, Debug)]
struct Functions {
    granularity: unsafe extern "C" fn(*mut usize, *const Kind, c_uint) -> sys::CUresult,
    create: unsafe extern "C" fn(*mut Handle, usize, *const Kind, c_ulonglong) -> sys::CUresult,
    release: unsafe extern "C" fn(Handle) -> sys::CUresult,
    reserve: unsafe extern "C" fn(*mut u64, usize, usize, u64, c_ulonglong) -> sys::CUresult,
    free: unsafe extern "C" fn(u64, usize) -> sys::CUresult,
    map: unsafe extern "C" fn(u64, usize, usize, Handle, c_ulonglong) -> sys::CUresult,
    unmap: unsafe extern "C" fn(u64, usize) -> sys::CUresult,
    allow: unsafe extern "C" fn(u64, usize, *const Access, usize) -> sys::CUresult,
}

impl Functions {
    /// None where the driver lacks one.
    fn find() -> Option<Self> {
        let library = crate::probe::loaded()?;
        macro_rules! find {
            ($name:literal) => {{
                // SAFETY: its type is that of the symbol of this name in every version.
                let found = unsafe { library.get(concat!($name, "\0").as_bytes()) };
                *found.ok()?
            }};
        }
        let found = Functions {
            granularity: find!("cuMemGetAllocationGranularity"),
            create: find!("cuMemCreate"),
            release: find!("cuMemRelease"),
            reserve: find!("cuMemAddressReserve"),
            free: find!("cuMemAddressFree"),
            map: find!("cuMemMap"),
            unmap: find!("cuMemUnmap"),
            allow: find!("cuMemSetAccess"),
        };
        // For the life of the process, as the driver itself.
        std::mem::forget(library);
        Some(found)
    }
}

/// The pages, and the addresses.
#[derive(Debug)]
pub(crate) struct Mapped {
    driver: Functions,
    base: u64,
    page_bytes: u64,
    /// In pages.
    addresses: u64,
    device: c_int,
    /// By number; none where it was given back.
    memory: Mutex<Vec<Option<Handle>>>,
    /// The pages of addresses with memory behind.
    mapped: Mutex<BTreeSet<u64>>,
}

impl Mapped {
    /// Takes `bytes` of a device that has `all`, rounded down to pages, or less if there is less,
    /// but `least`. None if the device or the driver has no such thing, or `bytes` is little.
    ///
    /// # Errors
    ///
    /// What the driver says; everything is given back then.
    pub(crate) fn open(
        context: &CudaContext,
        bytes: u64,
        least: u64,
        all: u64,
    ) -> Result<Option<Self>, DriverError> {
        let supported =
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
        let Some(driver) = Functions::find() else { return Ok(None) };
        if context.attribute(supported)? == 0 {
            return Ok(None);
        }
        let device = context.ordinal() as c_int;
        let kind = kind(device);
        let mut page_bytes = 0_usize;
        // SAFETY: a place for the answer, and a description that outlives the call.
        unsafe { (driver.granularity)(&mut page_bytes, &kind, RECOMMENDED) }.result()?;
        let mut page_bytes = page_bytes.max(1).next_power_of_two() as u64;
        while bytes / page_bytes > PAGES_MAX {
            page_bytes *= 2;
        }
        let wanted = bytes / page_bytes;
        if wanted < PAGES_MIN {
            return Ok(None);
        }
        let mapped = Mutex::default();
        let memory = Mutex::default();
        let mut pages =
            Mapped { driver, base: 0, page_bytes, addresses: 0, device, memory, mapped };
        let least = least.div_ceil(page_bytes).max(PAGES_MIN);
        match pages.fill(wanted, least, all / page_bytes) {
            Ok(()) => Ok(Some(pages)),
            Err(error) => {
                // What it says of what it never had is no matter.
                pages.free().ok();
                Err(error)
            }
        }
    }

    /// Takes memory and addresses, and maps the first to the first.
    fn fill(&mut self, wanted: u64, least: u64, all: u64) -> Result<(), DriverError> {
        let memory = self.create(wanted, least)?;
        if (memory.len() as u64) < least {
            return Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        }
        let mut reserved = Ok(());
        for times in ADDRESSES {
            let addresses = all.max(wanted) * times;
            let bytes = (addresses * self.page_bytes) as usize;
            let mut base = 0;
            let alignment = self.page_bytes as usize;
            // SAFETY: a place for the answer; addresses of its choice.
            let code = unsafe { (self.driver.reserve)(&mut base, bytes, alignment, 0, 0) };
            reserved = code.result();
            if reserved.is_ok() {
                (self.base, self.addresses) = (base, addresses);
                break;
            }
        }
        reserved?;
        // By their address it is known on which page objects lie.
        if !self.base.is_multiple_of(self.page_bytes) {
            return Err(DriverError(sys::CUresult::CUDA_ERROR_MISALIGNED_ADDRESS));
        }
        let all = |memory| PageMove { memory, from: None, to: u64::from(memory) };
        let moves: Vec<_> = memory.into_iter().map(all).collect();
        self.try_carry_out(&moves)
    }

    /// Takes this many pages of memory, or fewer if there are fewer: by their numbers. Then others,
    /// and what else a store needs, are left some, but `least` are kept.
    ///
    /// # Errors
    ///
    /// What the driver says, but of too little memory; none is kept then.
    pub(crate) fn create(&self, wanted: u64, least: u64) -> Result<Vec<u32>, DriverError> {
        let kind = kind(self.device);
        let mut created = Vec::new();
        let mut outcome = Ok(());
        for _ in 0..wanted {
            let mut handle = 0;
            // SAFETY: a place for the answer, and a description that outlives the call.
            match unsafe { (self.driver.create)(&mut handle, self.page_bytes as usize, &kind, 0) } {
                sys::CUresult::CUDA_SUCCESS => created.push(handle),
                // Others have taken the rest.
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    let kept = created.len() - created.len() / 8;
                    let kept = kept.max((least as usize).min(created.len()));
                    outcome = self.release_all(created.drain(kept..));
                    break;
                }
                error => {
                    outcome = error.result();
                    break;
                }
            }
        }
        if outcome.is_err() {
            // The first error is the one to tell.
            self.release_all(created.drain(..)).ok();
        }
        outcome?;
        let mut memory = self.memory.lock();
        let unused: Vec<usize> = (0..memory.len()).filter(|&at| memory[at].is_none()).collect();
        let numbers = unused.into_iter().chain(memory.len()..);
        let number = |(number, handle)| {
            let count = memory.len().max(number + 1);
            memory.resize(count, None);
            memory[number] = Some(handle);
            number as u32
        };
        Ok(numbers.zip(created).map(number).collect())
    }

    /// Gives one page of memory back to the device, which nobody uses; what became of it.
    pub(crate) fn give_up(&self, page: &PageLeaving) -> (Left, Result<(), DriverError>) {
        if let Err(error) = page.from.map_or(Ok(()), |from| self.unmap(from)) {
            return (Left::Stays, Err(error));
        }
        let place = page.memory as usize;
        let handle = self.memory.lock()[place].take();
        let released = self.release_all(handle);
        if released.is_err() {
            self.memory.lock()[place] = handle;
            return (Left::Unmapped, released);
        }
        (Left::Gone, Ok(()))
    }

    /// Releases memory that is mapped nowhere.
    fn release_all(&self, memory: impl IntoIterator<Item = Handle>) -> Result<(), DriverError> {
        let mut outcome = Ok(());
        for handle in memory {
            // SAFETY: it was created once, is mapped nowhere, and its number is forgotten.
            outcome = outcome.and(unsafe { (self.driver.release)(handle) }.result());
        }
        outcome
    }

    /// The first address.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    pub(crate) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// How many pages of memory there are.
    pub(crate) fn count(&self) -> u64 {
        self.memory.lock().iter().flatten().count() as u64
    }

    /// How many pages of addresses there are.
    pub(crate) fn addresses(&self) -> u64 {
        self.addresses
    }

    /// Moves pages that nobody uses, all of them or none: after an error their memory is behind no
    /// address.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn carry_out(&self, moves: &[PageMove]) -> Result<(), DriverError> {
        let moved = self.try_carry_out(moves);
        if moved.is_err() {
            let pages = moves.iter().flat_map(|one| one.from.into_iter().chain([one.to]));
            for page in pages.filter(|page| self.mapped.lock().contains(page)) {
                // A driver that refuses this too has failed for good.
                self.unmap(page).ok();
            }
        }
        moved
    }

    fn try_carry_out(&self, moves: &[PageMove]) -> Result<(), DriverError> {
        moves.iter().filter_map(|one| one.from).try_for_each(|page| self.unmap(page))?;
        moves.iter().try_for_each(|one| self.map(one.memory, one.to))?;
        let mut runs = moves.chunk_by(|one, next| one.to + 1 == next.to);
        runs.try_for_each(|run| self.allow(run[0].to..run[run.len() - 1].to + 1))
    }

    fn map(&self, memory: u32, page: u64) -> Result<(), DriverError> {
        let handle = self.memory.lock()[memory as usize];
        let handle = handle.expect("invariant: memory that moves was not given back");
        // SAFETY: the addresses are reserved, of the length of this memory, and nothing is mapped
        // there: the driver refuses it otherwise.
        unsafe { (self.driver.map)(self.address(page), self.page_bytes as usize, 0, handle, 0) }
            .result()?;
        self.mapped.lock().insert(page);
        Ok(())
    }

    fn unmap(&self, page: u64) -> Result<(), DriverError> {
        // SAFETY: it is mapped, and no copy and no kernel uses it, by the promise of the caller: a
        // range is free only once its last user has ended.
        unsafe { (self.driver.unmap)(self.address(page), self.page_bytes as usize) }.result()?;
        self.mapped.lock().remove(&page);
        Ok(())
    }

    /// Lets the device use these pages of addresses.
    fn allow(&self, pages: Range<u64>) -> Result<(), DriverError> {
        let location = kind(self.device).location;
        let access = Access { location, flags: READ_AND_WRITE };
        let bytes = ((pages.end - pages.start) * self.page_bytes) as usize;
        // SAFETY: memory is mapped to all of these; the description outlives the call.
        unsafe { (self.driver.allow)(self.address(pages.start), bytes, &access, 1) }.result()
    }

    fn address(&self, page: u64) -> u64 {
        self.base + page * self.page_bytes
    }

    /// Gives everything back. Nothing uses it any more.
    ///
    /// # Errors
    ///
    /// The first that the driver says; it goes on then.
    pub(crate) fn free(self) -> Result<(), DriverError> {
        let mapped = std::mem::take(&mut *self.mapped.lock());
        let mut outcome = Ok(());
        for page in mapped {
            outcome = outcome.and(self.unmap(page));
        }
        let memory = std::mem::take(&mut *self.memory.lock());
        outcome = outcome.and(self.release_all(memory.into_iter().flatten()));
        if self.base != 0 {
            let bytes = (self.addresses * self.page_bytes) as usize;
            // SAFETY: they were reserved as one, and nothing is mapped to them any more: the driver
            // refuses it otherwise.
            outcome = outcome.and(unsafe { (self.driver.free)(self.base, bytes) }.result());
        }
        outcome
    }
}

/// Plain memory of a device.
fn kind(device: c_int) -> Kind {
    let location = Location { kind: ON_DEVICE, device };
    Kind { kind: PINNED, shared_by: 0, location, metadata: std::ptr::null_mut(), flags: 0 }
}
