//! What a bar found, and whether it holds.
//!
//! Invariant: a ratio has our median above and that of the best other one below, both of one run;
//! on the emulated driver no figure is reported at all. Called by the bars.

use anyhow::{Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::timing::{Figures, median, spread};
use crate::parts::Outcome;
use crate::user::Env;

/// Our name among contenders.
pub(super) const OURS: &str = "vmem";

/// Where a ratio has to be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Limit {
    /// Of rates: more is better.
    AtLeast(f64),
    /// Of times: less is better.
    AtMost(f64),
}

#[derive(Default)]
pub(super) struct Report {
    figures: Map<String, Value>,
    missed: Vec<String>,
    compared_bytes: u64,
}

impl Report {
    /// Something to know beside the figures.
    pub(super) fn tell(&mut self, what: impl Into<String>, value: impl Into<Value>) {
        self.figures.insert(what.into(), value.into());
    }

    /// Compares what was found with what must be there.
    ///
    /// # Errors
    ///
    /// If a byte differs, which makes the figures worthless.
    pub(super) fn same(&mut self, what: &str, found: &[u8], expected: &[u8]) -> Result<()> {
        let len = found.len();
        let wanted = expected.len();
        ensure!(len == wanted, "{what}: {len} bytes, not {wanted}");
        if found != expected {
            let differs = found.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(len);
            bail!("{what}: byte {differs} of {len} differs");
        }
        self.compared_bytes += found.len() as u64;
        Ok(())
    }

    /// Our figures against the best of these. Those that took no part are left out.
    pub(super) fn judge(
        &mut self,
        what: &str,
        unit: &str,
        figures: &Figures,
        others: &[&'static str],
        limit: Limit,
    ) {
        let order = |a: &&&str, b: &&&str| {
            let [a, b] = [a, b].map(|name| median(&figures[**name]));
            a.total_cmp(&b)
        };
        let there = others.iter().filter(|name| figures.contains_key(**name));
        let best = match limit {
            Limit::AtLeast(_) => there.max_by(order),
            Limit::AtMost(_) => there.min_by(order),
        };
        let (Some(best), Some(ours)) = (best, figures.get(OURS)) else {
            self.missed.push(format!("{what}: nothing to compare with"));
            return;
        };
        let theirs = &figures[*best];
        let rounds: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
        let ratio = median(ours) / median(theirs);
        let all: Map<String, Value> =
            figures.iter().map(|(name, values)| (name.to_string(), spread(values))).collect();
        let bar = self.hold(what, ratio, limit);
        self.tell(
            what,
            json!({
                "unit": unit, "figures": all, "best_other": best, "ratio": ratio,
                "ratio_of_rounds": spread(&rounds), "bar": bar,
            }),
        );
    }

    /// Notes a bar that is missed, and says what the bar is.
    pub(super) fn hold(&mut self, what: &str, value: f64, limit: Limit) -> Value {
        let (holds, bar) = match limit {
            Limit::AtLeast(least) => (value >= least, format!(">= {least}")),
            Limit::AtMost(most) => (value <= most, format!("<= {most}")),
        };
        // Written so that NaN misses it.
        if !holds {
            self.missed.push(format!("{what}: {value:.3}, not {bar}"));
        }
        json!({"value": value, "is_to_be": bar, "holds": holds})
    }

    pub(super) fn end(self, env: &Env) -> Result<Outcome> {
        let Report { mut figures, missed, compared_bytes } = self;
        ensure!(compared_bytes > 0, "nothing was compared");
        if env.emulator.is_some() {
            return Ok(Outcome::Passed(
                json!({"emulated": true, "compared_bytes": compared_bytes}),
            ));
        }
        figures.insert("compared_bytes".into(), compared_bytes.into());
        if missed.is_empty() {
            return Ok(Outcome::Passed(figures.into()));
        }
        figures.insert("missed".into(), missed.into());
        Ok(Outcome::Missed(figures.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(ours: f64, others: [f64; 2]) -> Figures {
        [(OURS, ours), ("a", others[0]), ("b", others[1])]
            .into_iter()
            .map(|(name, value)| (name, vec![value]))
            .collect()
    }

    #[test]
    fn the_best_other_counts() {
        let mut report = Report::default();
        let rates = figures(9.0, [10.0, 5.0]);
        report.judge("rate", "", &rates, &["a", "b", "absent"], Limit::AtLeast(0.8));
        report.judge("time", "", &figures(12.0, [10.0, 20.0]), &["a", "b"], Limit::AtMost(1.3));
        assert_eq!(report.missed, [""; 0]);
        assert_eq!(report.figures["rate"]["best_other"], "a");
        assert_eq!(report.figures["rate"]["ratio"], 0.9);
        assert_eq!(report.figures["time"]["best_other"], "a");
        report.judge("slow", "", &figures(9.0, [10.0, 5.0]), &["a"], Limit::AtLeast(0.95));
        report.judge("alone", "", &figures(9.0, [10.0, 5.0]), &["absent"], Limit::AtLeast(0.5));
        report.hold("nothing", f64::NAN, Limit::AtLeast(0.5));
        assert_eq!(report.missed.len(), 3, "{:?}", report.missed);
    }

    #[test]
    fn a_byte_that_differs_fails() {
        let mut report = Report::default();
        assert!(report.same("these", &[1, 2], &[1, 2]).is_ok());
        assert!(report.same("these", &[1, 2], &[1, 3]).is_err());
        assert!(report.same("these", &[1, 2], &[1]).is_err());
        assert_eq!(report.compared_bytes, 2);
    }
}
