//! The page in a real browser: it shows live figures, changes, has no script error, and is fit for
//! a phone, the night, the keyboard and readers of a screen.
//!
//! Invariant: a headless Chromium looks at a store that is at work, over a socket of the loopback
//! interface. What it looks for is in `tests/browser/check.js`. Without a browser the test is
//! skipped, and says so; with `VMEM_BROWSER=required` it fails. `scripts/install-browser.sh`
//! installs one.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;
use vmem::{MemoryTier, ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryConfig};

const LEN: usize = 64 << 10;
const HANG: Duration = Duration::from_secs(300);

/// Where `scripts/install-browser.sh` puts the packages, and the browser; or why not.
fn browser() -> Result<(PathBuf, PathBuf), String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from);
    let modules = root.join(target).join("browser/node_modules");
    let chromium = std::env::var_os("VMEM_CHROMIUM").map(PathBuf::from);
    let chromium = chromium.unwrap_or_else(|| "/usr/bin/chromium".into());
    for needed in [&modules.join("playwright-core"), &modules.join("axe-core"), &chromium] {
        if !needed.exists() {
            return Err(format!("there is no {}", needed.display()));
        }
    }
    Ok((modules, chromium))
}

/// Reads and writes that fill memory, evict, wait and miss, until it is dropped.
async fn load(vmem: VirtualMemory) {
    let mut handles: Vec<VMemHandle> = Vec::new();
    for n in 0..64_u8 {
        handles.push(vmem.put(vec![n; LEN], MemoryTier::Host).await.unwrap());
    }
    let _pin = vmem.pin(&handles[0], MemoryTier::Host).await.unwrap();
    for round in 0_usize.. {
        let promoted = ReadOptions::new().promote(true);
        let handle = &handles[round * 7 % handles.len()];
        // Under pressure one may be refused: that is shown too.
        drop(vmem.read_with(handle, promoted).await);
        drop(vmem.read_at(&handles[round * 11 % handles.len()], 0..LEN / 2).await);
        for _ in 0..round % 50 {
            drop(vmem.read(handle).await);
        }
        if round.is_multiple_of(5) {
            drop(vmem.write(handle, vec![round as u8; LEN]).await);
        }
        tokio::time::sleep(Duration::from_millis(2 + round as u64 % 5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_shows_a_store_at_work_on_each_screen() {
    let (modules, chromium) = match browser() {
        Ok(found) => found,
        Err(why) => {
            let required = std::env::var_os("VMEM_BROWSER").is_some_and(|word| word == "required");
            assert!(!required, "{why}");
            eprintln!("SKIPPED: {why}: install it by `scripts/install-browser.sh`");
            return;
        }
    };
    let config = VirtualMemoryConfig::builder().host_capacity(3 << 20).disk_capacity(64 << 20);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let server = vmem_dashboard::serve(vmem.clone(), ([127, 0, 0, 1], 0)).await.unwrap();
    let url = format!("http://{}/", server.address());
    let serving = tokio::spawn(server.run());
    let loading = tokio::spawn(load(vmem.clone()));

    let check = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser/check.js");
    let mut node = Command::new("node");
    node.arg(check).arg(url).env("NODE_PATH", modules).env("VMEM_CHROMIUM", chromium);
    let output = tokio::time::timeout(HANG, node.kill_on_drop(true).output()).await;
    let output = output.expect("the browser ends").unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    println!("{}", text(&output.stdout));
    assert!(output.status.success(), "{}", text(&output.stderr));
    loading.abort();
    serving.abort();
    // The load has its handles no more, so nothing is in use.
    drop(loading.await);
    vmem.close().await.unwrap();
}
