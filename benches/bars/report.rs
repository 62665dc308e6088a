//! Lines, table and JSON of what was measured.

use std::fmt::Write as _;

/// All rounds of one side.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rounds(pub(crate) Vec<f64>);

impl Rounds {
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// One bar.
#[derive(Debug)]
pub(crate) struct Bar<'a> {
    pub(crate) id: &'a str,
    pub(crate) what: String,
    pub(crate) unit: &'a str,
    pub(crate) ours: &'a Rounds,
    pub(crate) peer: &'a str,
    pub(crate) theirs: &'a Rounds,
    /// The ratio ours/theirs that is to be reached; none where a figure is only printed.
    pub(crate) bar: Option<f64>,
}

/// What is printed at the end.
#[derive(Debug, Default)]
pub(crate) struct Report {
    table: String,
    json: Vec<serde_json::Value>,
}

impl Report {
    /// Prints a bar: the ratio is the median of the ratios of the rounds.
    pub(crate) fn add(&mut self, bar: &Bar<'_>) {
        let ratios: Vec<f64> =
            bar.ours.0.iter().zip(&bar.theirs.0).map(|(ours, theirs)| ours / theirs).collect();
        let low = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let high = ratios.iter().copied().fold(0.0, f64::max);
        let ratio = Rounds(ratios.clone()).median();
        let verdict = match bar.bar {
            Some(most) if ratio <= most => "PASS",
            Some(_) => "FAIL",
            None => "INFO",
        };
        let ours = bar.ours.median();
        let theirs = bar.theirs.median();
        let most = bar.bar.map_or_else(|| "-".into(), |bar| format!("{bar:.2}"));
        let id = bar.id;
        let what = &bar.what;
        let unit = bar.unit;
        let peer = bar.peer;
        let rounds = ratios.len();
        println!(
            "BAR {id} {what} ours={ours:.0} peer={peer}:{theirs:.0} unit={unit} ratio={ratio:.2} \
             bar={most} {verdict} rounds={rounds} spread={low:.2}..{high:.2}"
        );
        let line = format!(
            "| {id} | {what} | {ours:.0} {unit} | {peer}: {theirs:.0} {unit} | {ratio:.2} \
             ({low:.2}..{high:.2}) | {most} | {verdict} |"
        );
        let _infallible = writeln!(self.table, "{line}");
        self.json.push(serde_json::json!({
            "id": id, "what": what, "unit": unit, "ours": bar.ours.0, "peer": peer,
            "theirs": bar.theirs.0, "ratio": ratio, "bar": bar.bar, "verdict": verdict,
        }));
    }

    /// Prints a figure that is compared with nothing.
    pub(crate) fn figure(&mut self, id: &str, what: &str, value: f64, unit: &str, bar: f64) {
        let verdict = if value <= bar { "PASS" } else { "FAIL" };
        println!("BAR {id} {what} ours={value:.0} unit={unit} bar={bar:.0} {verdict}");
        let line = format!("| {id} | {what} | {value:.0} {unit} | - | - | {bar:.0} | {verdict} |");
        let _infallible = writeln!(self.table, "{line}");
        self.json.push(serde_json::json!({
            "id": id, "what": what, "unit": unit, "ours": value, "bar": bar, "verdict": verdict,
        }));
    }

    /// Says of a bar that this machine cannot run it, and why.
    pub(crate) fn skipped(&mut self, id: &str, what: &str, why: &str) {
        println!("BAR {id} {what} SKIPPED: {why}");
        let _infallible =
            writeln!(self.table, "| {id} | {what} | - | - | - | - | SKIPPED: {why} |");
        self.json.push(serde_json::json!({
            "id": id, "what": what, "verdict": "SKIPPED", "why": why,
        }));
    }

    pub(crate) fn finish(self) -> anyhow::Result<()> {
        println!("\n| bar | what | ours | beside it | ratio (spread) | bar | |");
        println!("|---|---|---|---|---|---|---|\n{}", self.table);
        // Cargo runs benches in the folder of their package.
        let bars = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bars");
        std::fs::create_dir_all(bars)?;
        std::fs::write(format!("{bars}/bars.json"), serde_json::to_vec_pretty(&self.json)?)?;
        Ok(())
    }
}

/// CPU time of this process, with what the kernel did for it, in nanoseconds.
pub(crate) fn process_cpu_ns() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// CPU time of this thread, in nanoseconds.
pub(crate) fn thread_cpu_ns() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}
