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

use crate::paged::PageMove;

/// Fewer pages are one block: that is as good for so little memory.
const PAGES_MIN: u64 = 16;
/// With more of them opening takes long; they are larger then.
const PAGES_MAX: u64 = 16 * 1024;
/// How many times the memory there are addresses, where there are as many: so that free pages find
/// addresses side by side, whatever lies between.
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
    memory: Vec<Handle>,
    /// The pages of addresses with memory behind.
    mapped: Mutex<BTreeSet<u64>>,
}

impl Mapped {
    /// Takes `bytes` of a device, rounded down to pages, or less if there is less, but `least`.
    /// None if the device or the driver has no such thing, or `bytes` is little.
    ///
    /// # Errors
    ///
    /// What the driver says; everything is given back then.
    pub(crate) fn open(
        context: &CudaContext,
        bytes: u64,
        least: u64,
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
        let memory = Vec::new();
        let mut pages =
            Mapped { driver, base: 0, page_bytes, addresses: 0, device, memory, mapped };
        match pages.fill(wanted, least.div_ceil(page_bytes)) {
            Ok(()) => Ok(Some(pages)),
            Err(error) => {
                // What it says of what it never had is no matter.
                pages.free().ok();
                Err(error)
            }
        }
    }

    /// Takes memory and addresses, and maps the first to the first.
    fn fill(&mut self, wanted: u64, least: u64) -> Result<(), DriverError> {
        let kind = kind(self.device);
        for _ in 0..wanted {
            let mut handle = 0;
            // SAFETY: a place for the answer, and a description that outlives the call.
            match unsafe { (self.driver.create)(&mut handle, self.page_bytes as usize, &kind, 0) } {
                sys::CUresult::CUDA_SUCCESS => self.memory.push(handle),
                // Others have taken the rest. They, and what else a store needs, are left some.
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY if self.count() >= least.max(PAGES_MIN) => {
                    let kept = (self.count() - self.count() / 8).max(least).max(PAGES_MIN);
                    for handle in self.memory.drain(kept as usize..) {
                        // SAFETY: it was created above, and is mapped nowhere.
                        unsafe { (self.driver.release)(handle) }.result()?;
                    }
                    break;
                }
                error => error.result()?,
            }
        }
        let mut reserved = Ok(());
        for times in ADDRESSES {
            let addresses = self.count() * times;
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
        let moves: Vec<_> = (0..self.memory.len() as u32).map(all).collect();
        self.try_carry_out(&moves)
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
        self.memory.len() as u64
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
        let handle = self.memory[memory as usize];
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
    pub(crate) fn free(mut self) -> Result<(), DriverError> {
        let mapped = std::mem::take(&mut *self.mapped.lock());
        let mut outcome = Ok(());
        for page in mapped {
            outcome = outcome.and(self.unmap(page));
        }
        for handle in self.memory.drain(..) {
            // SAFETY: it was created once, and is released here alone.
            outcome = outcome.and(unsafe { (self.driver.release)(handle) }.result());
        }
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
