//! Memory of the host, by address.
//!
//! Invariant: an address is read or written only for an operation whose caller promised that it is
//! valid until the operation has ended: that is the contract of the driver's functions. Called by
//! the streams.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::hash::{DefaultHasher, Hasher};

/// The pattern that a destination in flight holds.
const SCRIBBLE: u8 = 0xA5;

/// Memory of the host, promised to be valid while an operation is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostMemory {
    pub(crate) address: usize,
    pub(crate) len: usize,
}

impl HostMemory {
    pub(crate) fn read(self) -> Vec<u8> {
        let from = std::ptr::with_exposed_provenance::<u8>(self.address);
        let mut bytes = vec![0; self.len];
        // SAFETY: the caller of the driver's function promised that the source is readable until
        // the copy has ended; a raw copy makes no reference to memory that a careless user may be
        // writing.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), self.len) };
        bytes
    }

    pub(crate) fn write(self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len);
        let to = std::ptr::with_exposed_provenance_mut::<u8>(self.address);
        // SAFETY: as above, of a destination.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, self.len) };
    }

    /// What is in it, in short.
    pub(crate) fn checksum(self) -> u64 {
        let mut hasher = DefaultHasher::new();
        hasher.write(&self.read());
        hasher.finish()
    }

    /// Spoils a destination: until the copy has ended its contents are undefined.
    pub(crate) fn scribble(self) {
        self.write(&vec![SCRIBBLE; self.len]);
    }

    /// Whether it is as `scribble` left it.
    pub(crate) fn is_scribbled(self) -> bool {
        self.read().iter().all(|&byte| byte == SCRIBBLE)
    }
}

/// A host function with its argument.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostFunction {
    pub(crate) function: unsafe extern "C" fn(*mut c_void),
    pub(crate) argument: usize,
}

impl HostFunction {
    pub(crate) fn call(self) {
        let argument = std::ptr::with_exposed_provenance_mut(self.argument);
        // SAFETY: its launcher promised that it may be called with this argument.
        unsafe { (self.function)(argument) };
    }
}

/// Writes an output argument of a driver's function, if the caller wants it.
pub(crate) fn put<T>(place: *mut T, value: T) {
    if !place.is_null() {
        // SAFETY: the caller promised a valid place for the result.
        unsafe { place.write(value) };
    }
}

/// Reads an input argument that is passed by address.
pub(crate) fn get<T: Copy>(place: *const T) -> Option<T> {
    if place.is_null() {
        return None;
    }
    // SAFETY: the caller promised a valid argument.
    Some(unsafe { place.read_unaligned() })
}

/// Element `nth` of an array of the caller's.
pub(crate) fn element<T: Copy>(array: *const T, nth: usize) -> Option<T> {
    // SAFETY: the caller promised as many elements as it said.
    if array.is_null() { None } else { get(unsafe { array.add(nth) }) }
}

/// The text at an address, up to its zero.
pub(crate) fn text(place: *const std::ffi::c_char) -> Option<String> {
    if place.is_null() {
        return None;
    }
    // SAFETY: the caller promised a string that ends.
    let text = unsafe { std::ffi::CStr::from_ptr(place) };
    Some(text.to_string_lossy().into_owned())
}

/// Element `nth` of an array of addresses.
pub(crate) fn nth(array: *mut *mut c_void, nth: usize) -> Option<*mut c_void> {
    element(array.cast_const(), nth)
}
