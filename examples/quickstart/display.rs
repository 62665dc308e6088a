//! Shows live what happens: bars on a terminal, a plain line every second elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::JoinHandle;
use vmem::{TierStats, VirtualMemory, VirtualMemoryStats};

use crate::moves::Moves;
use crate::tally::{Phase, Tally};

const BAR_REFRESH: Duration = Duration::from_millis(100);
const LINE_EVERY: Duration = Duration::from_secs(1);
/// The length of a bar, in steps of its progress.
const BAR_STEPS: u64 = 1000;

/// What is shown, and where it is looked up.
#[derive(Debug)]
pub(crate) struct Display {
    vmem: VirtualMemory,
    tally: Arc<Tally>,
    moves: Arc<Moves>,
    last: Option<(Instant, u64)>,
}

/// Prints one line. Its reader may have gone away (`| head`), which is no reason to stop.
pub(crate) fn say(line: &str) {
    drop(writeln!(std::io::stdout(), "{line}"));
}

impl Display {
    /// Shows until the task is aborted.
    pub(crate) fn start(
        vmem: VirtualMemory,
        tally: Arc<Tally>,
        moves: Arc<Moves>,
    ) -> JoinHandle<()> {
        let display = Display { vmem, tally, moves, last: None };
        if std::io::stdout().is_terminal() {
            tokio::spawn(display.bars())
        } else {
            tokio::spawn(display.lines())
        }
    }

    async fn lines(mut self) {
        let mut tick = tokio::time::interval(LINE_EVERY);
        tick.tick().await;
        loop {
            tick.tick().await;
            let stats = self.vmem.stats();
            let Some(phase) = self.tally.current(&stats) else { continue };
            say(&format!(
                "{:8} {:3.0} %  {:>10}/s | host {} | disk {} | {}",
                phase.name,
                phase.fraction() * 100.0,
                ByteSize(phase.rate()).to_string(),
                level(&stats.host),
                level(&stats.disk),
                self.movement(&phase, &stats),
            ));
        }
    }

    async fn bars(mut self) {
        let bars = Bars::new();
        let mut tick = tokio::time::interval(BAR_REFRESH);
        loop {
            tick.tick().await;
            let stats = self.vmem.stats();
            let Some(phase) = self.tally.current(&stats) else { continue };
            let rate = format!("{}/s", ByteSize(phase.rate()));
            set(&bars.phase, phase.name, phase.fraction(), rate);
            for (bar, name, tier) in
                [(&bars.host, "host", &stats.host), (&bars.disk, "disk", &stats.disk)]
            {
                let fill = tier.used_bytes as f64 / tier.capacity_bytes.max(1) as f64;
                set(bar, name, fill, format!("{}, {} objects", level(tier), tier.objects));
            }
            // Ten times a second is too short for a rate.
            if self.last.is_none_or(|(at, _)| at.elapsed() >= LINE_EVERY) {
                bars.moves.set_message(self.movement(&phase, &stats));
            }
        }
    }

    /// Migrations in a second, since this was last asked, and the hit ratio of the phase.
    fn movement(&mut self, phase: &Phase, stats: &VirtualMemoryStats) -> String {
        let now = Instant::now();
        let total = self.moves.up.get() + self.moves.down.get();
        let (before, counted) = self.last.replace((now, total)).unwrap_or((phase.began, 0));
        let seconds = now.duration_since(before).as_secs_f64().max(1e-9);
        let in_flight = stats.migrations_in_flight;
        let rate = (total - counted) as f64 / seconds;
        let hits = match phase.hits + phase.misses {
            0 => "no reads yet".to_owned(),
            _ => format!("hits {:.1} %", phase.hit_ratio() * 100.0),
        };
        format!("{rate:.0} migrations/s, {in_flight} in flight | {hits}")
    }
}

fn level(tier: &TierStats) -> String {
    format!("{} of {}", ByteSize(tier.used_bytes), ByteSize(tier.capacity_bytes))
}

/// The lines of a terminal. Dropping them clears them.
struct Bars {
    phase: ProgressBar,
    host: ProgressBar,
    disk: ProgressBar,
    moves: ProgressBar,
    all: MultiProgress,
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
        let bar = |template: &str| {
            let bar = all.add(ProgressBar::new(BAR_STEPS));
            match ProgressStyle::with_template(template) {
                Ok(style) => bar.with_style(style.progress_chars("=> ")),
                Err(_) => bar,
            }
        };
        Bars {
            phase: bar("{prefix:8} [{bar:40.green}] {msg}"),
            host: bar("{prefix:8} [{bar:40.yellow}] {msg}"),
            disk: bar("{prefix:8} [{bar:40.blue}] {msg}"),
            moves: bar("         {msg}"),
            all,
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        for bar in [&self.phase, &self.host, &self.disk, &self.moves] {
            bar.finish_and_clear();
        }
        drop(self.all.clear());
    }
}

fn set(bar: &ProgressBar, name: &'static str, fraction: f64, message: String) {
    bar.set_prefix(name);
    bar.set_position((fraction.clamp(0.0, 1.0) * BAR_STEPS as f64) as u64);
    bar.set_message(message);
}
