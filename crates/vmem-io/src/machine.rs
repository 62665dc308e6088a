//! How much memory this process may have.
//!
//! Invariant: never more than the smaller of the machine's memory and the limit of the process's
//! control group. Called by the facade when the configuration leaves `host_capacity` open.

use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Bytes of main memory that this process may have: all of the machine's, or what its control
/// group allows.
pub fn memory_limit_bytes() -> u64 {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(memory);
    let machine = system.total_memory();
    system.cgroup_limits().map_or(machine, |group| machine.min(group.total_memory))
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_some_memory() {
        assert!(super::memory_limit_bytes() > 1 << 20);
    }
}
