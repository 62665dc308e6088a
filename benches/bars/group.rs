//! Control groups that limit the memory of one side.
//!
//! Invariant: a group is made for one child process, which joins it before it allocates, and is
//! removed again. Called by `side`. Needs root and a mounted hierarchy that controls memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Groups of this process so far: each has a name of its own.
static MADE: AtomicU32 = AtomicU32::new(0);

/// A group, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Group {
    path: PathBuf,
    usage: &'static str,
}

impl Group {
    /// Makes a group, with a limit or without, in whichever hierarchy controls memory here.
    ///
    /// # Errors
    ///
    /// Why there is none, for each hierarchy.
    pub(crate) fn new(limit_bytes: Option<u64>) -> Result<Self, String> {
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("vmem-bench-{}-{number}", std::process::id());
        let mut refused = Vec::new();
        for (top, limit, usage) in [
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
            ("/sys/fs/cgroup", "memory.max", "memory.current"),
            ("/sys/fs/cgroup/unified", "memory.max", "memory.current"),
        ] {
            let path = Path::new(top).join(&name);
            if let Err(error) = fs::create_dir(&path) {
                refused.push(format!("{top}: {error}"));
                continue;
            }
            let group = Group { path, usage };
            let limited = match limit_bytes {
                Some(bytes) => fs::write(group.path.join(limit), bytes.to_string()),
                None => fs::metadata(group.path.join(limit)).map(drop),
            };
            match limited {
                Ok(()) => return Ok(group),
                Err(error) => refused.push(format!("{top}: {error}")),
            }
        }
        Err(refused.join("; "))
    }

    /// The file that a process joins by.
    pub(crate) fn processes(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// What is charged to it: page cache and kernel memory too.
    pub(crate) fn used_bytes(&self) -> anyhow::Result<f64> {
        Ok(fs::read_to_string(self.path.join(self.usage))?.trim().parse()?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // It is busy for a moment after its last process has ended.
        for _ in 0..100 {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                _ => return,
            }
        }
    }
}
