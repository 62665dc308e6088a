//! Hostile places: what a machine may deny, denied on purpose; and the driver that a run is to
//! test.
//!
//! Invariant: a denial holds only for the calling thread and for the threads and processes that it
//! starts afterwards. Called by tests, in threads or children of their own.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use vmem_core::IoDriver;
use vmem_io::driver::{Alignment, Driver, RingOptions, driver_over};

/// The variable that names the driver of a test run, in the words of [`IoDriver`].
pub const DRIVER_VARIABLE: &str = "VMEM_TEST_DRIVER";

/// The disk driver that tests over real files open their stores with: [`DRIVER_VARIABLE`], or
/// `Auto`.
///
/// # Panics
///
/// If the variable names no driver.
pub fn driver_under_test() -> IoDriver {
    match std::env::var(DRIVER_VARIABLE) {
        Ok(name) => name.parse().expect("VMEM_TEST_DRIVER names a driver"),
        Err(_) => IoDriver::Auto,
    }
}

/// A driver of this kind over a new, empty file in `directory`, by direct I/O where that is to be
/// had; `Auto` is the first that is. For the reactor driver, inside of a runtime.
///
/// # Errors
///
/// What the machine refuses.
pub fn real_driver(kind: IoDriver, directory: &Path) -> io::Result<Arc<dyn Driver>> {
    let scratch = || tempfile::tempfile_in(directory);
    let file = scratch()?;
    let alignment = Alignment::probe(&file, &scratch()?).unwrap_or(Alignment::NONE);
    let options = RingOptions { alignment, ..Default::default() };
    match kind {
        IoDriver::Auto => real_driver(IoDriver::Reactor, directory)
            .or_else(|_| real_driver(IoDriver::TokioUring, directory))
            .or_else(|_| real_driver(IoDriver::Blocking, directory)),
        kind => driver_over(kind, file, options),
    }
}

/// What is denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// io_uring as a whole, as by a container's profile (`EPERM`) or an old kernel (`ENOSYS`).
    IoUring {
        /// What `io_uring_setup` answers.
        errno: i32,
    },
    /// Rings can be made, and nothing submitted.
    IoUringEnter {
        /// What `io_uring_enter` answers.
        errno: i32,
    },
    /// Registered memory.
    IoUringRegister {
        /// What `io_uring_register` answers.
        errno: i32,
    },
    /// Direct I/O: `EINVAL` to each call that asks for it.
    DirectIo,
}

impl Denied {
    /// Puts it into force, for good.
    ///
    /// # Errors
    ///
    /// Why this machine has no such filters.
    pub fn enforce(self) -> Result<(), String> {
        let rules = self.rules().map_err(|error| error.to_string())?;
        let answer = SeccompAction::Errno(self.errno() as u32);
        let arch = std::env::consts::ARCH.try_into();
        let arch = arch.map_err(|error| format!("no filters for this machine: {error:?}"))?;
        let program = SeccompFilter::new(rules, SeccompAction::Allow, answer, arch)
            .and_then(BpfProgram::try_from)
            .map_err(|error| error.to_string())?;
        seccompiler::apply_filter(&program).map_err(|error| error.to_string())
    }

    fn errno(self) -> i32 {
        match self {
            Denied::IoUring { errno }
            | Denied::IoUringEnter { errno }
            | Denied::IoUringRegister { errno } => errno,
            Denied::DirectIo => libc::EINVAL,
        }
    }

    fn rules(self) -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
        let call = match self {
            Denied::IoUring { .. } => libc::SYS_io_uring_setup,
            Denied::IoUringEnter { .. } => libc::SYS_io_uring_enter,
            Denied::IoUringRegister { .. } => libc::SYS_io_uring_register,
            Denied::DirectIo => return Self::direct_rules(),
        };
        Ok(BTreeMap::from([(call, Vec::new())]))
    }

    fn direct_rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
        let flag = libc::O_DIRECT as u64;
        let with_flag = |argument| {
            let masked = SeccompCmpOp::MaskedEq(flag);
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, masked, flag)
        };
        let set_flags = SeccompCondition::new(
            1,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::Eq,
            libc::F_SETFL as u64,
        )?;
        Ok(BTreeMap::from([
            (libc::SYS_openat, vec![SeccompRule::new(vec![with_flag(2)?])?]),
            (libc::SYS_fcntl, vec![SeccompRule::new(vec![set_flags, with_flag(2)?])?]),
        ]))
    }
}
