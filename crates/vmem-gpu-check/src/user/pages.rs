//! Device memory as pages that are mapped to addresses, as the tier takes it.
//!
//! Invariant: what was reserved, created and mapped is given back by its owner only, after
//! everything on the device has ended. Taken from `User`; called by `contract`, scenarios and bars.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use cudarc::driver::{CudaContext, DriverError, sys};

use super::machine::driver;
use super::{DeviceMemory, User};

/// The driver's kinds of what is asked for, by number.
const PINNED: c_uint = 1;
const ON_DEVICE: c_uint = 1;
const READ_AND_WRITE: c_uint = 3;
const MINIMUM: c_uint = 0;
const RECOMMENDED: c_uint = 1;

/// Where memory is.
#[repr(C)]
#[derive(Clone, Copy)]
struct Location {
    kind: c_uint,
    device: c_int,
}

/// What memory is asked for; the rest is for kinds that are not.
#[repr(C)]
struct Kind {
    kind: c_uint,
    shared_by: c_uint,
    location: Location,
    metadata: *mut c_void,
    flags: u64,
}

/// Which device may do what with it.
#[repr(C)]
struct Access {
    location: Location,
    flags: c_uint,
}

type Handle = c_ulonglong;
type Called = std::result::Result<(), DriverError>;

/// Looked up, as the tier does: a cudarc that was built for a newer driver describes memory
/// otherwise.
#[derive(Clone, Copy)]
struct Functions {
    granularity: unsafe extern "C" fn(*mut usize, *const Kind, c_uint) -> sys::CUresult,
    create: unsafe extern "C" fn(*mut Handle, usize, *const Kind, c_ulonglong) -> sys::CUresult,
    release: unsafe extern "C" fn(Handle) -> sys::CUresult,
    reserve: unsafe extern "C" fn(*mut u64, usize, usize, u64, c_ulonglong) -> sys::CUresult,
    free: unsafe extern "C" fn(u64, usize) -> sys::CUresult,
    map: unsafe extern "C" fn(u64, usize, usize, Handle, c_ulonglong) -> sys::CUresult,
    unmap: unsafe extern "C" fn(u64, usize) -> sys::CUresult,
    allow: unsafe extern "C" fn(u64, usize, *const Access, usize) -> sys::CUresult,
    /// The one that the tier does not use: it says which memory is behind an address.
    retain: Option<unsafe extern "C" fn(*mut Handle, *mut c_void) -> sys::CUresult>,
}

impl Functions {
    fn find() -> std::result::Result<Self, String> {
        let library = driver()?;
        macro_rules! find {
            ($name:literal) => {{
                // SAFETY: its type is that of the symbol of this name in every version.
                let found = unsafe { library.get(concat!($name, "\0").as_bytes()) };
                found.map(|found| *found).map_err(|_| format!("the driver lacks {}", $name))
            }};
        }
        Ok(Functions {
            granularity: find!("cuMemGetAllocationGranularity")?,
            create: find!("cuMemCreate")?,
            release: find!("cuMemRelease")?,
            reserve: find!("cuMemAddressReserve")?,
            free: find!("cuMemAddressFree")?,
            map: find!("cuMemMap")?,
            unmap: find!("cuMemUnmap")?,
            allow: find!("cuMemSetAccess")?,
            retain: find!("cuMemRetainAllocationHandle").ok(),
        })
    }
}

/// What a device says of such memory, and where it is taken.
#[derive(Clone)]
pub(crate) struct Paging {
    functions: Functions,
    context: Arc<CudaContext>,
}

impl Paging {
    /// The inner error says why the device has none: then a part is skipped.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn find(user: &User) -> Result<std::result::Result<Self, String>> {
        let supported =
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
        let number = supported as c_uint;
        ensure!(number == 102, "the attribute has number {number} here");
        let context = user.context.clone();
        let value = context.attribute(supported).context("attribute 102")?;
        if value != 1 {
            let why =
                format!("the device has no memory that can be mapped: attribute 102 is {value}");
            return Ok(Err(why));
        }
        Ok(Functions::find().map(|functions| Paging { functions, context }))
    }

    /// What lengths are multiples of, in bytes: at least, and as the driver recommends.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn granularity(&self) -> Result<[usize; 2]> {
        let kind = kind(self.location());
        let of = |option: c_uint| {
            let mut bytes = 0;
            // SAFETY: a place for the answer, and a description that outlives the call.
            unsafe { (self.functions.granularity)(&mut bytes, &kind, option) }
                .result()
                .context("cuMemGetAllocationGranularity")?;
            anyhow::Ok(bytes)
        };
        Ok([of(MINIMUM)?, of(RECOMMENDED)?])
    }

    /// The page of a tier that is not too large for it.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn page_bytes(&self) -> Result<usize> {
        Ok(self.granularity()?[1].max(1).next_power_of_two())
    }

    /// Whether the memory behind this address was mapped there; none if the driver cannot tell.
    pub(crate) fn is_mapped(&self, address: u64) -> Option<bool> {
        let retain = self.functions.retain?;
        let mut handle = 0;
        let place = std::ptr::without_provenance_mut(address as usize);
        // SAFETY: a place for the answer; an address that is none of such memory is refused.
        let found = unsafe { retain(&mut handle, place) }.result().is_ok();
        if found {
            // SAFETY: it was retained just now.
            let _ = unsafe { (self.functions.release)(handle) };
        }
        Some(found)
    }

    /// Reserves that many bytes of addresses; their first one.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn reserve(&self, bytes: usize, alignment: usize) -> Result<u64, DriverError> {
        let mut base = 0;
        // SAFETY: a place for the answer; addresses of the driver's choice.
        unsafe { (self.functions.reserve)(&mut base, bytes, alignment, 0, 0) }.result()?;
        Ok(base)
    }

    /// Gives back what was reserved as one, and to which nothing is mapped.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn free(&self, base: u64, bytes: usize) -> Called {
        // SAFETY: the driver refuses all else.
        unsafe { (self.functions.free)(base, bytes) }.result()
    }

    /// `count` pages of memory, and `addresses` pages of addresses with nothing behind.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn pages(&self, page: usize, addresses: usize, count: usize) -> Result<Pages> {
        self.context.bind_to_thread()?;
        let base = self.reserve(addresses * page, page).context("cuMemAddressReserve")?;
        let paging = self.clone();
        let mut pages =
            Pages { paging, base, page, addresses, memory: Vec::new(), mapped: Mutex::default() };
        let kind = kind(self.location());
        for _ in 0..count {
            let mut handle = 0;
            // SAFETY: a place for the answer, and a description that outlives the call.
            unsafe { (self.functions.create)(&mut handle, page, &kind, 0) }
                .result()
                .context("cuMemCreate")?;
            pages.memory.push(handle);
        }
        Ok(pages)
    }

    /// Device memory that consists of `count` pages.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn memory(&self, page: usize, count: usize) -> Result<DeviceMemory> {
        let pages = self.pages(page, count, count)?;
        for n in 0..count {
            pages.map(n, n).context("cuMemMap")?;
        }
        pages.allow(0..count).context("cuMemSetAccess")?;
        let context = self.context.clone();
        Ok(DeviceMemory { address: pages.base, len: count * page, pages: Some(pages), context })
    }

    fn location(&self) -> Location {
        Location { kind: ON_DEVICE, device: self.context.ordinal() as c_int }
    }
}

/// Plain memory of a device.
fn kind(location: Location) -> Kind {
    Kind { kind: PINNED, shared_by: 0, location, metadata: std::ptr::null_mut(), flags: 0 }
}

/// Some pages of memory, and addresses for them.
pub(crate) struct Pages {
    paging: Paging,
    base: u64,
    page: usize,
    addresses: usize,
    memory: Vec<Handle>,
    /// The pages of addresses with memory behind.
    mapped: Mutex<BTreeSet<usize>>,
}

/// Calls on a thread that has the context. What the driver says is returned as it is.
impl Pages {
    pub(crate) fn page_bytes(&self) -> usize {
        self.page
    }

    /// Where a page of addresses begins.
    pub(crate) fn address(&self, page: usize) -> u64 {
        self.base + (page * self.page) as u64
    }

    /// Has this thread enter the context.
    pub(crate) fn bind(&self) -> Called {
        self.paging.context.bind_to_thread()
    }

    /// Maps a page of memory to a page of addresses.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn map(&self, memory: usize, page: usize) -> Called {
        let at = self.address(page);
        let handle = self.memory[memory];
        // SAFETY: of this length, to addresses that are reserved; the driver refuses those that
        // have memory.
        unsafe { (self.paging.functions.map)(at, self.page, 0, handle, 0) }.result()?;
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner).insert(page);
        Ok(())
    }

    /// Unmaps pages of addresses, which the parts use no more.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn unmap(&self, pages: Range<usize>) -> Called {
        let at = self.address(pages.start);
        // SAFETY: the parts wait for whatever uses these.
        unsafe { (self.paging.functions.unmap)(at, pages.len() * self.page) }.result()?;
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        mapped.retain(|page| !pages.contains(page));
        Ok(())
    }

    /// Lets the device use these pages of addresses.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn allow(&self, pages: Range<usize>) -> Called {
        let access = Access { location: self.paging.location(), flags: READ_AND_WRITE };
        let at = self.address(pages.start);
        let bytes = pages.len() * self.page;
        // SAFETY: a description that outlives the call.
        unsafe { (self.paging.functions.allow)(at, bytes, &access, 1) }.result()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // What the driver says of what it no longer has is no matter.
        let _ = self.bind();
        let mapped =
            std::mem::take(&mut *self.mapped.lock().unwrap_or_else(PoisonError::into_inner));
        for page in mapped {
            let _ = self.unmap(page..page + 1);
        }
        for handle in self.memory.drain(..) {
            // SAFETY: it was created once, and is released here alone.
            let _ = unsafe { (self.paging.functions.release)(handle) };
        }
        let _ = self.paging.free(self.base, self.addresses * self.page);
    }
}
