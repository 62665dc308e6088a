//! What a load saw.
//!
//! Invariant: a wrong answer is kept with its reason, and never averaged away.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::Lost;

/// Reasons that are kept of lost answers.
const LOST_MAX: usize = 3;

/// What a load saw.
#[derive(Debug, Default)]
pub struct Report {
    /// Requests that were answered, by status.
    pub answers: BTreeMap<u16, u64>,
    /// What was not as it must be: each is an error of the service.
    pub wrong: Vec<String>,
    /// Bodies that were compared.
    pub compared: u64,
    /// Requests without a whole answer.
    pub lost: u64,
    /// Why, of the first ones.
    pub lost_because: Vec<String>,
    /// How long the load ran, in seconds.
    pub seconds: f64,
    /// Clients that were not to read.
    pub stalled: usize,
    /// Of them, those whose answers had not ended when the load had.
    pub stalled_live: usize,
    pub(crate) latencies_us: Vec<u32>,
    /// Those of reads of objects that sent bytes: other answers are quick, and say nothing.
    pub(crate) gets_us: Vec<u32>,
}

impl Report {
    /// Counts an answer, which may be a read of an object.
    pub(crate) fn answered(&mut self, status: u16, took: Duration, is_get: bool) {
        *self.answers.entry(status).or_default() += 1;
        let took_us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        self.latencies_us.push(took_us);
        self.gets_us.extend((is_get && matches!(status, 200 | 206)).then_some(took_us));
    }

    /// Counts a request without an answer.
    pub fn lose(&mut self, lost: &Lost) {
        self.lost += 1;
        if self.lost_because.len() < LOST_MAX {
            self.lost_because.push(lost.to_string());
        }
    }

    /// Adds what another client saw.
    pub fn add(&mut self, other: Report) {
        for (status, count) in other.answers {
            *self.answers.entry(status).or_default() += count;
        }
        self.wrong.extend(other.wrong);
        self.compared += other.compared;
        self.lost += other.lost;
        self.lost_because.extend(other.lost_because);
        self.lost_because.truncate(LOST_MAX);
        self.seconds = self.seconds.max(other.seconds);
        self.stalled += other.stalled;
        self.stalled_live += other.stalled_live;
        self.latencies_us.extend(other.latencies_us);
        self.gets_us.extend(other.gets_us);
    }

    /// Requests that were answered.
    pub fn requests(&self) -> u64 {
        self.answers.values().sum()
    }

    /// The time, in microseconds, within which this fraction of the requests was answered.
    pub fn quantile_us(&self, fraction: f64) -> u32 {
        quantile(self.latencies_us.clone(), fraction)
    }

    /// As [`quantile_us`](Self::quantile_us), of reads of objects that got 200 or 206.
    pub fn gets_quantile_us(&self, fraction: f64) -> u32 {
        quantile(self.gets_us.clone(), fraction)
    }

    /// Whether each answer came and was right, and some had bodies to compare.
    pub fn is_right(&self) -> bool {
        self.wrong.is_empty() && self.lost == 0 && self.compared > 0
    }
}

fn quantile(mut sorted: Vec<u32>, fraction: f64) -> u32 {
    sorted.sort_unstable();
    let at = (sorted.len() as f64 * fraction) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or_default()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.requests() as f64 / self.seconds.max(1e-9);
        writeln!(f, "{} requests, {rate:.0} a second", self.requests())?;
        writeln!(
            f,
            "latency: half within {} us, 99 % within {} us",
            self.quantile_us(0.5),
            self.quantile_us(0.99)
        )?;
        writeln!(f, "by status: {:?}", self.answers)?;
        for reason in &self.lost_because {
            writeln!(f, "lost: {reason}")?;
        }
        for wrong in self.wrong.iter().take(10) {
            writeln!(f, "WRONG: {wrong}")?;
        }
        if self.stalled > 0 {
            let of = (self.stalled_live, self.stalled);
            writeln!(
                f,
                "{} of {} clients that do not read were being answered at the end",
                of.0, of.1
            )?;
        }
        write!(
            f,
            "{} bodies compared, {} wrong, {} answers lost",
            self.compared,
            self.wrong.len(),
            self.lost
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_reads_that_sent_bytes_are_timed_as_reads() {
        let mut report = Report::default();
        for status in [404, 416, 503, 304] {
            report.answered(status, Duration::from_micros(1), true);
        }
        report.answered(201, Duration::from_micros(1), false);
        assert!(report.gets_us.is_empty());
        report.answered(200, Duration::from_micros(7), true);
        report.answered(206, Duration::from_micros(9), true);
        assert_eq!((report.gets_us.clone(), report.gets_quantile_us(0.99)), (vec![7, 9], 9));
        assert_eq!(report.requests(), 7);
    }
}
