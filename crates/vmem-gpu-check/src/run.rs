//! A part in a process of its own, and the record of what came of it.
//!
//! Invariant: the record has a line for each part that has ended, whole, written before the next
//! part begins; a part that hangs is ended after eight minutes and counts as failed. The run ends
//! in the minutes that it was given, whatever its parts do. Called by `main`.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};

use crate::Options;
use crate::parts::{self, On, Outcome, Part};
use crate::user::{self, Env};

/// No part takes longer.
const PART_MAX: Duration = Duration::from_secs(8 * 60);
/// What begins the line with which a part ends.
const RESULT: &str = "RESULT ";

/// Runs a part here, and prints what it found.
///
/// # Errors
///
/// What does not hold.
pub(crate) fn here(name: &str, options: &Options) -> Result<bool> {
    let part = parts::all().into_iter().find(|part| part.name == name);
    let Some(part) = part else { bail!("there is no part {name:?}: see --list") };
    // Also without a card: the record is to say why there is none.
    let outcome = Env::open(options).and_then(|env| within(&part, &env));
    let outcome =
        outcome.unwrap_or_else(|error| json!({"outcome": "failed", "why": format!("{error:#}")}));
    println!("{RESULT}{outcome}");
    // Not by returning: a part may leave a driver behind that never ends.
    std::io::stdout().flush()?;
    std::process::exit(i32::from(outcome["outcome"] == "failed"));
}

/// Runs a part, and returns its line of the record.
fn within(part: &Part, env: &Env) -> Result<Value> {
    // Before the part, after which the driver may say nothing any more.
    let device = user::describe(env)?;
    let outcome = match (part.run)(env) {
        Ok(Outcome::Passed(figures)) => json!({"outcome": "passed", "figures": figures}),
        Ok(Outcome::Missed(figures)) => json!({"outcome": "missed", "figures": figures}),
        Ok(Outcome::Skipped(why)) => json!({"outcome": "skipped", "why": why}),
        Err(error) => json!({"outcome": "failed", "why": format!("{error:#}")}),
    };
    let broken = env.rules_broken();
    let mut outcome = match broken.is_empty() {
        true => outcome,
        false => json!({"outcome": "failed", "why": broken, "before": outcome}),
    };
    outcome["device"] = device;
    Ok(outcome)
}

/// Runs the parts that were asked for, each in a process of its own. True if none failed and no bar
/// was missed.
///
/// # Errors
///
/// If the record cannot be kept.
pub(crate) fn all(options: &Options) -> Result<bool> {
    let done = if options.again { HashSet::new() } else { passed(options)? };
    let record = OpenOptions::new().create(true).append(true).open(&options.json);
    let mut record = record.with_context(|| format!("opening {}", options.json.display()))?;
    // A line that was cut short stays a line of its own.
    let before = std::fs::read(&options.json).context("reading the record")?;
    if !before.is_empty() && !before.ends_with(b"\n") {
        record.write_all(b"\n").context("writing the record")?;
    }
    let mut good = true;
    let ends = Instant::now() + Duration::from_secs(options.minutes * 60);
    let mut counts = [("passed", 0), ("missed", 0), ("skipped", 0), ("failed", 0)];
    let wanted = |part: &Part| {
        let any = options.only.is_empty();
        part.on != On::Within
            && (any || options.only.iter().any(|only| part.name.starts_with(only)))
    };
    let wanted: Vec<Part> = parts::all().into_iter().filter(wanted).collect();
    let names: Vec<&str> = wanted.iter().map(|part| part.name).collect();
    for only in &options.only {
        if !names.iter().any(|name| name.starts_with(only.as_str())) {
            bail!("no part has a name that begins with {only:?}: see --list");
        }
    }
    for part in wanted {
        if done.contains(part.name) {
            println!("{:<32} passed before", part.name);
            continue;
        }
        let begun = Instant::now();
        let left = ends.saturating_duration_since(begun);
        good &= !left.is_zero();
        let mut line = match (part.on, options.emulated) {
            _ if left.is_zero() => {
                let why = format!("{} minutes are over", options.minutes);
                json!({"outcome": "skipped", "why": why})
            }
            (On::Card, true) => json!({"outcome": "skipped", "why": "it needs a card"}),
            (On::Emulated, false) => {
                json!({"outcome": "skipped", "why": "it needs the emulated driver"})
            }
            _ => apart(&part, options, left.min(PART_MAX))?,
        };
        let outcome = line["outcome"].as_str().unwrap_or("failed").to_owned();
        line["part"] = part.name.into();
        line["seconds"] = begun.elapsed().as_secs_f64().into();
        line["seed"] = options.seed.into();
        line["emulated"] = options.emulated.into();
        line["device_number"] = options.device.into();
        line["version"] = env!("CARGO_PKG_VERSION").into();
        line["at"] = humantime::format_rfc3339_seconds(SystemTime::now()).to_string().into();
        record.write_all(format!("{line}\n").as_bytes()).context("writing the record")?;
        record.sync_data().context("writing the record")?;
        let why = line["why"].as_str().unwrap_or_default();
        println!("{:<32} {outcome} in {:.1} s {why}", part.name, begun.elapsed().as_secs_f64());
        if let Some(figures) = line.get("figures").filter(|figures| !figures.is_null()) {
            println!("{:<32} {figures}", "");
        }
        good &= outcome == "passed" || outcome == "skipped";
        if let Some((_, count)) = counts.iter_mut().find(|(name, _)| *name == outcome) {
            *count += 1;
        }
    }
    println!("{}", counts.map(|(name, count)| format!("{count} {name}")).join(", "));
    Ok(good)
}

/// The parts that the record says have passed, of this version, with this seed, on this device of
/// this kind of driver.
fn passed(options: &Options) -> Result<HashSet<String>> {
    let text = match std::fs::read_to_string(&options.json) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(HashSet::new()),
        text => text.with_context(|| format!("reading {}", options.json.display()))?,
    };
    // A line that was cut short is of a part that has not ended.
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let passed = lines.filter(|line| {
        line["outcome"] == "passed"
            && line["seed"] == options.seed
            && line["emulated"] == options.emulated
            && line["device_number"] == options.device
            && line["version"] == env!("CARGO_PKG_VERSION")
    });
    Ok(passed.filter_map(|line| line["part"].as_str().map(str::to_owned)).collect())
}

/// What a part found that printed this.
pub(crate) fn found(text: &str) -> Option<Value> {
    let result = text.lines().rev().find_map(|line| line.strip_prefix(RESULT))?;
    serde_json::from_str(result).ok()
}

/// Runs a part in a process of its own, for so long at most, and returns what it found.
fn apart(part: &Part, options: &Options, limit: Duration) -> Result<Value> {
    let mut child = Command::new(std::env::current_exe().context("finding this program")?);
    child.args(["--part", part.name, "--seed", &options.seed.to_string()]);
    child.args(["--device", &options.device.to_string()]);
    if options.emulated {
        child.arg("--emulated");
    }
    if let Some(dir) = &options.dir {
        child.arg("--dir").arg(dir);
    }
    // All kernels at once, rather than when they are first launched, beside others that run.
    child.env("CUDA_MODULE_LOADING", "EAGER");
    // A group of its own, for a part may start programs.
    let child = child.process_group(0).stdout(Stdio::piped()).spawn();
    let mut child = child.context("starting a part")?;
    let mut output = child.stdout.take().context("a part has an output")?;
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        let _ = output.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().context("waiting for a part")? {
            break Some(status);
        }
        if begun.elapsed() > limit {
            if let Some(group) = Pid::from_raw(child.id() as i32) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            let _ = child.wait();
            break None;
        }
        thread::sleep(Duration::from_millis(20));
    };
    let text = reader.join().unwrap_or_default();
    let result = found(&text);
    let ended_well = status.is_some_and(|status| status.success());
    Ok(match (result, status) {
        (Some(result), _) if ended_well || result["outcome"] == "failed" => result,
        (_, None) => {
            json!({"outcome": "failed", "why": format!("it had not ended after {limit:?}")})
        }
        (_, Some(status)) => json!({"outcome": "failed", "why": format!("it ended with {status}")}),
    })
}
