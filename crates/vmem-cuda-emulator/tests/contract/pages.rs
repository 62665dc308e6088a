//! Pages that are mapped: the driver's calls for them, and their codes.
//!
//! Invariant: as that of the tools; a test gives back what it reserved, mapped and created. Called
//! by the tests of mapped memory.

use cudarc::driver::{result, sys};

use crate::tools::{MIB, code};

/// The granularity of devices, in bytes.
pub(crate) const PAGE: usize = 2 * MIB;

fn at_device(id: i32) -> sys::CUmemLocation {
    let type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    sys::CUmemLocation { type_, id }
}

pub(crate) fn properties(device: i32) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: at_device(device),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

pub(crate) fn try_reserve(bytes: usize, alignment: usize) -> Result<u64, i32> {
    let mut pointer = 0;
    // SAFETY: a place for the address.
    let reserved = unsafe { sys::cuMemAddressReserve(&mut pointer, bytes, alignment, 0, 0) };
    reserved.result().map(|()| pointer).map_err(|error| code::<()>(Err(error)))
}

pub(crate) fn reserve(bytes: usize) -> u64 {
    try_reserve(bytes, 0).unwrap()
}

pub(crate) fn free_addresses(pointer: u64, bytes: usize) -> i32 {
    // SAFETY: no test uses addresses that it has given back, or it means to try that.
    code(unsafe { sys::cuMemAddressFree(pointer, bytes) }.result())
}

pub(crate) fn try_create(device: i32, bytes: usize) -> Result<u64, i32> {
    let mut handle = 0;
    // SAFETY: a place for the handle, and properties.
    let created = unsafe { sys::cuMemCreate(&mut handle, bytes, &properties(device), 0) };
    created.result().map(|()| handle).map_err(|error| code::<()>(Err(error)))
}

pub(crate) fn create(device: i32) -> u64 {
    try_create(device, PAGE).unwrap()
}

pub(crate) fn release(handle: u64) -> i32 {
    // SAFETY: each test releases what it created.
    code(unsafe { sys::cuMemRelease(handle) }.result())
}

pub(crate) fn map_at(pointer: u64, bytes: usize, offset: usize, handle: u64) -> i32 {
    // SAFETY: nothing uses the addresses yet.
    code(unsafe { sys::cuMemMap(pointer, bytes, offset, handle, 0) }.result())
}

pub(crate) fn map(pointer: u64, handle: u64) {
    assert_eq!(map_at(pointer, PAGE, 0, handle), 0);
}

pub(crate) fn unmap(pointer: u64, bytes: usize) -> i32 {
    // SAFETY: the tests use what they unmap no more, or mean to break that.
    code(unsafe { sys::cuMemUnmap(pointer, bytes) }.result())
}

pub(crate) fn set_access(
    pointer: u64,
    bytes: usize,
    device: i32,
    flags: sys::CUmemAccess_flags,
) -> i32 {
    let grant = sys::CUmemAccessDesc { location: at_device(device), flags };
    // SAFETY: one grant.
    code(unsafe { sys::cuMemSetAccess(pointer, bytes, &grant, 1) }.result())
}

/// Lets the first device read and write.
pub(crate) fn grant(pointer: u64, bytes: usize) {
    let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    assert_eq!(set_access(pointer, bytes, 0, flags), 0);
}

pub(crate) fn is_supported() -> bool {
    let attribute =
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
    // SAFETY: the first device.
    unsafe { result::device::get_attribute(0, attribute) }.unwrap() != 0
}
