//! Reads processor time, for tests that assert that no core is kept busy.
//!
//! Invariant: user and system time together, to a hundredth of a second, as Linux reports it.
//! Called by tests, which compare two readings.

use std::time::Duration;

/// The processor time of this process, so far.
///
/// # Panics
///
/// If `/proc` is not that of Linux.
pub fn process_cpu() -> Duration {
    read("/proc/self/stat")
}

/// The processor time of the calling thread, so far.
///
/// # Panics
///
/// As [`process_cpu`].
pub fn thread_cpu() -> Duration {
    read("/proc/thread-self/stat")
}

fn read(path: &str) -> Duration {
    let status = std::fs::read_to_string(path).expect("Linux has this file");
    // The name of the process, in parentheses, may hold anything.
    let fields: Vec<&str> =
        status.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |field: usize| fields[field].parse::<u64>().expect("a count of ticks");
    // The kernel reports hundredths of a second.
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}
