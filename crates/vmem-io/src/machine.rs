//! How much memory this process may have.
//!
//! Invariant: never more than the smaller of the machine's memory and the least limit of the
//! process's control groups. Called by the facade when the configuration leaves `host_capacity`
//! open, and for the default budget of a disk tier that lies in memory.

use std::path::Path;

use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use crate::cgroup;

/// Bytes of main memory that this process may have: the machine's, or the least that one of its
/// control groups allows, from its own up to the root, in either version of the hierarchy.
///
/// A container may not see the groups above its own. Version 1 of the hierarchy tells what they
/// allow anyway; version 2 does not.
pub fn memory_limit_bytes() -> u64 {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let machine = System::new_with_specifics(memory).total_memory();
    cgroup::memory_limit_bytes(Path::new("/")).map_or(machine, |group| machine.min(group))
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_some_memory() {
        assert!(super::memory_limit_bytes() > 1 << 20);
    }
}
