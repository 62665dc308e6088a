//! What vmem assumes of memory: copies, registered pages, and an allocation that fails.
//!
//! Invariant: as that of all parts. Called by `parts`.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::time::Instant;

use anyhow::{Result, ensure};
use cudarc::driver::{CudaContext, CudaStream, result, sys};
use serde_json::json;

use super::{KIB, MIB, SPIN, code};
use crate::parts::Outcome;
use crate::user::Env;

/// Host memory of pages of its own, registered or not.
pub(super) struct Mapped {
    address: *mut c_void,
    len: usize,
}

impl Mapped {
    pub(super) fn new(len: usize) -> Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, at an address of the system's choice.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        ensure!(address != libc::MAP_FAILED, "mapping memory");
        Ok(Mapped { address, len })
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped, that long, and this type's own.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.len) }
    }

    /// Registers a part of it; returns what the driver says.
    pub(super) fn register(&self, at: usize, len: usize) -> i32 {
        // SAFETY: within the mapping, which is unmapped only after all was unregistered.
        let at = unsafe { self.address.byte_add(at) };
        // SAFETY: as above.
        code(
            unsafe { sys::cuMemHostRegister_v2(at, len, sys::CU_MEMHOSTREGISTER_PORTABLE) }
                .result(),
        )
    }

    pub(super) fn unregister(&self, at: usize) -> i32 {
        // SAFETY: within the mapping.
        let at = unsafe { self.address.byte_add(at) };
        // SAFETY: the driver says if it is not registered.
        code(unsafe { sys::cuMemHostUnregister(at) }.result())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped once. The parts unregister before, and wait for their copies.
        unsafe { libc::munmap(self.address, self.len) };
    }
}

pub(super) fn up(to: u64, bytes: &[u8], stream: &CudaStream) -> i32 {
    // SAFETY: the parts keep what they copy until they have waited for the stream.
    code(unsafe { result::memcpy_htod_async(to, bytes, stream.cu_stream()) })
}

pub(super) fn down(into: &mut [u8], from: u64, stream: &CudaStream) -> i32 {
    // SAFETY: as above.
    code(unsafe { result::memcpy_dtoh_async(into, from, stream.cu_stream()) })
}

pub(super) fn copies(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let stream = &user.stream;
    let device = user.allocate(MIB)?;
    let mut pinned = user.pinned(MIB)?;
    pinned.bytes_mut().fill(7);
    user.spin(SPIN, stream)?;
    let begun = Instant::now();
    ensure!(up(device.address, pinned.bytes(), stream) == 0, "a copy from pinned memory");
    let returned = begun.elapsed();
    ensure!(returned < SPIN / 2, "a copy from pinned memory waited: {returned:?}");
    stream.synchronize()?;
    ensure!(device.read(stream)?.iter().all(|&byte| byte == 7), "its bytes");
    // Pageable memory: once the call has returned the caller may change the source.
    let mut source = vec![8; MIB];
    user.spin(SPIN, stream)?;
    let begun = Instant::now();
    ensure!(up(device.address, &source, stream) == 0, "a copy from pageable memory");
    let pageable = begun.elapsed();
    source.fill(9);
    stream.synchronize()?;
    ensure!(
        device.read(stream)?.iter().all(|&byte| byte == 8),
        "the source was looked at after the call"
    );
    let mut target = vec![0; MIB];
    ensure!(down(&mut target, device.address, stream) == 0, "a copy to pageable memory");
    let there = target.iter().all(|&byte| byte == 8);
    stream.synchronize()?;
    ensure!(there, "a copy to pageable memory returned before its end");
    Ok(Outcome::Passed(json!({
        "pinned_call_us": returned.as_micros() as u64,
        "pageable_call_us": pageable.as_micros() as u64,
    })))
}

pub(super) fn registration(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let stream = &user.stream;
    let device = user.allocate(128 * KIB)?;
    let mut memory = Mapped::new(128 * KIB)?;
    memory.bytes().fill(3);
    ensure!(memory.register(0, 64 * KIB) == 0, "registering");
    let twice = memory.register(0, 64 * KIB);
    let overlapping = memory.register(32 * KIB, 64 * KIB);
    ensure!(twice == 712 && overlapping == 712, "twice: {twice}, overlapping: {overlapping}");
    ensure!(memory.register(64 * KIB, 64 * KIB) == 0, "its neighbour");
    // A card may take it: vmem never relies on that.
    let crossing = up(device.address, memory.bytes(), stream);
    stream.synchronize()?;
    ensure!(up(device.address, &memory.bytes()[64 * KIB..], stream) == 0, "within one");
    stream.synchronize()?;
    ensure!(memory.unregister(64 * KIB) == 0, "unregistering");
    let again = memory.unregister(64 * KIB);
    ensure!(again == 713, "unregistered twice: {again}");
    ensure!(memory.unregister(0) == 0, "unregistering");
    Ok(Outcome::Passed(json!({"a_copy_across_two_registrations": crossing})))
}

/// What was registered in the context of one device all devices reach, and the context of another
/// one has the driver forget it.
pub(super) fn two_devices(env: &Env) -> Result<Outcome> {
    if let Some(emulator) = &env.emulator {
        emulator.devices(2);
    }
    let devices = CudaContext::device_count()? as usize;
    if devices < 2 {
        return Ok(Outcome::Skipped("one device".into()));
    }
    let users = [env.user()?, Env::user_on((env.device + 1) % devices)?];
    let mut memory = Mapped::new(MIB)?;
    memory.bytes().fill(5);
    users[0].stream.context().bind_to_thread()?;
    ensure!(memory.register(0, MIB) == 0, "registering");
    for user in &users {
        let device = user.allocate(MIB)?;
        ensure!(up(device.address, memory.bytes(), &user.stream) == 0, "a copy");
        user.stream.synchronize()?;
        ensure!(device.read(&user.stream)?.iter().all(|&byte| byte == 5), "what was copied");
    }
    users[1].stream.context().bind_to_thread()?;
    let elsewhere = memory.unregister(0);
    users[0].stream.context().bind_to_thread()?;
    let again = memory.unregister(0);
    ensure!(
        elsewhere == 0 && again == 713,
        "unregistered by the other device: {elsewhere}, then by the first: {again}"
    );
    Ok(Outcome::Passed(json!({})))
}

pub(super) fn stale_pages(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let stream = &user.stream;
    let device = user.allocate(64 * KIB)?;
    let mut memory = Mapped::new(64 * KIB)?;
    memory.bytes().fill(1);
    ensure!(memory.register(0, 64 * KIB) == 0, "registering");
    // SAFETY: whole pages of the mapping.
    let given = unsafe { libc::madvise(memory.address, memory.len, libc::MADV_DONTNEED) };
    ensure!(given == 0, "giving pages back");
    memory.bytes().fill(2);
    ensure!(up(device.address, memory.bytes(), stream) == 0, "a copy");
    stream.synchronize()?;
    let stale = device.read(stream)?[1000];
    ensure!(memory.unregister(0) == 0, "unregistering");
    ensure!(memory.register(0, 64 * KIB) == 0, "registering again");
    ensure!(up(device.address, memory.bytes(), stream) == 0, "a copy");
    stream.synchronize()?;
    ensure!(
        device.read(stream)?.iter().all(|&byte| byte == 2),
        "registered again, the new pages are seen"
    );
    ensure!(memory.unregister(0) == 0, "unregistering");
    // Nothing of vmem needs the old bytes: it is enough that it never does this.
    Ok(Outcome::Passed(json!({"the_device_saw_the_pages_of_before": stale == 1})))
}

pub(super) fn memory(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    user.context.bind_to_thread()?;
    let (free, total) = result::mem_get_info()?;
    // SAFETY: plain bytes; it is not given.
    let refused = code(unsafe { result::malloc_sync(total + MIB) });
    ensure!(refused == 2, "more than there is: {refused}");
    let memory = user.allocate(free / 4)?;
    let (less, _) = result::mem_get_info()?;
    ensure!(less <= free - free / 8, "{free} bytes free before, {less} after a quarter was taken");
    drop(memory);
    drop(user.allocate(MIB)?);
    Ok(Outcome::Passed(json!({"free_bytes": free, "total_bytes": total})))
}
