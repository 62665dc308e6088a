//! The default budget in a real control group: the limit stands on a group above the process's own.
//!
//! Mechanism: the limit was read from the root of the hierarchy alone. Effect: in a nested group
//! (systemd's `MemoryMax=`, a container that sees the host's tree) the default budget was a quarter
//! of the machine, and the process was killed for memory. Fix: the least limit on the path counts.
//!
//! Invariant: the group exists for one child alone, and is removed again. Needs root and a mounted
//! hierarchy that controls memory; says so loudly where there is none.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::{Path, PathBuf};

use vmem::{MemoryTier, VirtualMemoryConfig};

use crate::support::process::again;

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 512 * MIB;
/// Where the child is to go.
const GROUP: &str = "VMEM_TEST_GROUP";

/// A group with a limit, and one in it without; both are removed in the end.
struct Nested(PathBuf);

impl Nested {
    /// In whichever hierarchy controls memory here.
    fn new() -> Result<Self, String> {
        let name = format!("vmem-test-{}", std::process::id());
        let mut refused = Vec::new();
        for (top, file) in [
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", "memory.max"),
            ("/sys/fs/cgroup/unified", "memory.max"),
        ] {
            let nested = Nested(Path::new(top).join(&name));
            let made = fs::create_dir(&nested.0)
                .and_then(|()| fs::metadata(nested.0.join(file)))
                .and_then(|_| fs::write(nested.0.join(file), LIMIT.to_string()))
                .and_then(|()| fs::create_dir(nested.inner()));
            match made {
                Ok(()) => return Ok(nested),
                Err(error) => refused.push(format!("{top}: {error}")),
            }
        }
        Err(refused.join("; "))
    }

    fn inner(&self) -> PathBuf {
        self.0.join("inner")
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.inner());
        let _ = fs::remove_dir(&self.0);
    }
}

/// Plays the child of the test below; alone it does nothing.
#[test]
fn child_in_a_nested_group() {
    let Some(group) = std::env::var_os(GROUP) else { return };
    let procs = Path::new(&group).join("cgroup.procs");
    fs::write(procs, std::process::id().to_string()).unwrap();
    assert_eq!(vmem_io::memory_limit_bytes(), LIMIT);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        // The host budget is left to its default.
        let config = VirtualMemoryConfig::builder().disk_capacity(4 * LIMIT).build().unwrap();
        let vmem = vmem::open(config).await.unwrap();
        let stats = vmem.stats();
        assert_eq!(stats.host.capacity_bytes + stats.staging_bytes, LIMIT / 4);
        let mut objects = Vec::new();
        for n in 0..3 * LIMIT / MIB {
            let data = vec![n as u8; MIB as usize];
            objects.push(vmem.put(data, MemoryTier::Host).await.unwrap());
        }
        for (n, object) in objects.iter().enumerate() {
            assert!(vmem.read(object).await.unwrap().iter().all(|&byte| byte == n as u8));
        }
        drop(objects);
        vmem.close().await.unwrap();
        let half = VirtualMemoryConfig::builder().disk_capacity(512 * MIB).host_percent(50.0);
        let vmem = vmem::open(half.build().unwrap()).await.unwrap();
        assert_eq!(vmem.config().host_capacity(), Some(LIMIT / 2));
        vmem.close().await.unwrap();
    });
    println!("reached the end");
}

#[test]
fn default_host_budget_fits_a_nested_control_group() {
    let nested = match Nested::new() {
        Ok(nested) => nested,
        Err(why) => return eprintln!("SKIPPED a real control group: none can be made: {why}"),
    };
    let output = again(module_path!(), "child_in_a_nested_group")
        .env(GROUP, nested.inner())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let reached = output.status.success() && text.contains("reached the end");
    assert!(reached, "{}: {text}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
}
