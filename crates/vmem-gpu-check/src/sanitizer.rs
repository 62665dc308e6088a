//! Scenarios under NVIDIA's checker of memory, where it is installed.
//!
//! Invariant: it is seen to find a fault that was planted before it is believed. Each object has an
//! allocation of its own, so that whatever goes beyond one is seen. Called by `parts`.

#![allow(unsafe_code, reason = "a kernel that goes astray is launched")]

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use vmem::MemoryTier;
use vmem::gpu::VramExt;

use crate::parts::{On, Outcome, Part};
use crate::user::Env;

/// What the checker ends with if it found something.
const FOUND: i32 = 77;
pub(crate) fn parts() -> Vec<Part> {
    let part = |name, on, run, about| Part { name, about, on, run };
    vec![
        part(
            "sanitizer-planted",
            On::Card,
            planted,
            "the memory checker finds a fault that was planted",
        ),
        part("sanitizer-07", On::Card, |env| watched("scenario-07", env), "scenario 7 under it"),
        part("sanitizer-08", On::Card, |env| watched("scenario-08", env), "scenario 8 under it"),
        part("sanitizer-09", On::Card, |env| watched("scenario-09", env), "scenario 9 under it"),
        part("planted-fault", On::Within, fault, "a kernel that writes beyond an object"),
    ]
}

/// Where the checker is.
fn tool() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/cuda/bin", "/opt/cuda/bin"].map(PathBuf::from);
    let places = std::env::split_paths(&path).chain(usual);
    places.map(|place| place.join("compute-sanitizer")).find(|tool| tool.is_file())
}

/// What came of a part under the checker, with what it printed.
enum Checked {
    Clean(String),
    Found(String),
    /// It does not work here.
    Refused(String),
}

/// Runs a part under the checker.
fn check(tool: &PathBuf, part: &str, env: &Env) -> Result<Checked> {
    let mut command = Command::new(tool);
    command.args(["--tool", "memcheck", "--error-exitcode", &FOUND.to_string()]);
    command.arg(std::env::current_exe().context("finding this program")?);
    command.args(["--part", part, "--seed", &env.seed.to_string()]);
    command.args(["--device", &env.device.to_string()]);
    if let Some(dir) = env.dir() {
        command.arg("--dir").arg(dir);
    }
    command.env("VMEM_GPU_ALLOCATIONS", "separate");
    let output = command.output().context("running compute-sanitizer")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found = output.status.code() == Some(FOUND);
    if let Some(line) = refusal(&text) {
        return Ok(Checked::Refused(line));
    }
    ensure!(found || output.status.success(), "{part} ended with {}: {text}", output.status);
    Ok(if found { Checked::Found(text) } else { Checked::Clean(text) })
}

/// Why the checker does not work here, if what it printed says so: a sandbox may keep it from the
/// device.
fn refusal(text: &str) -> Option<String> {
    let told = ["Device not supported", "Failed to initialize", "Debugger is already attached"];
    let line = text.lines().find(|line| told.iter().any(|told| line.contains(told)))?;
    Some(format!("compute-sanitizer does not work here: {}", line.trim()))
}

fn planted(env: &Env) -> Result<Outcome> {
    let Some(tool) = tool() else {
        return Ok(Outcome::Skipped("compute-sanitizer is not installed".into()));
    };
    match check(&tool, "planted-fault", env)? {
        Checked::Found(_) => Ok(Outcome::Passed(json!(null))),
        Checked::Clean(text) => bail!("the planted fault was not found: {text}"),
        Checked::Refused(why) => Ok(Outcome::Skipped(why)),
    }
}

fn watched(part: &str, env: &Env) -> Result<Outcome> {
    let Some(tool) = tool() else {
        return Ok(Outcome::Skipped("compute-sanitizer is not installed".into()));
    };
    match check(&tool, part, env)? {
        Checked::Clean(_) => Ok(Outcome::Passed(json!({"part": part}))),
        Checked::Found(text) => bail!("{part}: {text}"),
        Checked::Refused(why) => Ok(Outcome::Skipped(why)),
    }
}

/// A kernel of the user writes a byte behind an object.
fn fault(env: &Env) -> Result<Outcome> {
    env.block_on(async {
        let len = 4096;
        let vmem = env.store(8 << 20, 64 << 20, |set| set).await?;
        let user = env.user()?;
        let handle = vmem.put(vec![1; len], MemoryTier::Host).await?;
        let lease = vmem.device_on(&handle, &user.stream).await?;
        // SAFETY: used on the stream of the lease, before it is dropped.
        let at = unsafe { lease.device_ptr() };
        // SAFETY: this is unsound on purpose: the byte behind the object has another owner, which
        // the sanitizer must find.
        unsafe { user.launch("vmem_outside", &[at, len as u64], 1, &user.stream) }?;
        drop(lease);
        let _ = user.stream.synchronize();
        let _ = tokio::time::timeout(Duration::from_secs(20), vmem.close()).await;
        Ok(Outcome::Passed(json!(null)))
    })
}
