//! All parts, by name.
//!
//! Invariant: names are unique, and begin with what kind of part it is: `contract`, `scenario`,
//! `bar`, `sanitizer`. Called by `main`.

use anyhow::Result;
use serde_json::Value;

use crate::user::Env;
use crate::{bars, contract, sanitizer, scenarios};

/// Something to check.
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) on: On,
    pub(crate) run: fn(&Env) -> Result<Outcome>,
}

/// Where a part says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum On {
    /// On a card, and on the emulated driver.
    Both,
    /// It needs faults that only the emulated driver has.
    Emulated,
    /// It needs the hardware, or NVIDIA's tools.
    Card,
    /// Another part runs it, for it is meant to fail.
    Within,
}

/// What a part that did not fail came to.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It holds; with what was seen.
    Passed(Value),
    /// A bar was missed; with the figures.
    Missed(Value),
    /// It could not be checked here, for this reason.
    Skipped(String),
}

/// Every part, in the order in which they run.
pub(crate) fn all() -> Vec<Part> {
    [contract::parts(), scenarios::parts(), sanitizer::parts(), bars::parts()]
        .into_iter()
        .flatten()
        .collect()
}
