//! What happened, in numbers, and the verdict.

use std::process::ExitCode;

use bytesize::ByteSize;
use vmem::{TierStats, VirtualMemoryStats};

use crate::display::say;
use crate::files::Found;
use crate::moves::Moves;
use crate::tally::{Messages, Tally};

/// How the run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Complete,
    Interrupted,
}

/// Prints the table. Its figures are those of the store and of our own counts.
pub(crate) fn print(tally: &Tally, moves: &Moves, stats: &VirtualMemoryStats) {
    say("");
    row("files", format!("{} stored", tally.files_stored.get()));
    for phase in tally.phases() {
        let took = phase.elapsed().as_secs_f64();
        let rate = ByteSize(phase.rate());
        let hits = match phase.hits + phase.misses {
            0 => String::new(),
            reads => format!(", {reads} reads, {:.1} % hits", phase.hit_ratio() * 100.0),
        };
        row(phase.name, format!("{} in {took:.1} s, {rate}/s{hits}", ByteSize(phase.bytes)));
    }
    let whole = tally.whole_reads.get();
    let ranges = tally.range_reads.get();
    let into = tally.reads_into.get();
    let prefetches = tally.prefetches.get();
    row(
        "calls",
        format!("{whole} read, {ranges} read_at, {into} read_into, {prefetches} prefetch"),
    );
    row("host", peak(&stats.host));
    row("disk", peak(&stats.disk));
    let down = ByteSize(stats.host_to_disk_bytes);
    let up = ByteSize(stats.disk_to_host_bytes);
    row("moved", format!("{down} down to disk, {up} up from disk"));
    let evictions = stats.evictions;
    let clean = stats.clean_drops;
    let promotions = stats.promotions;
    row("evicted", format!("{evictions}, of them {clean} with nothing to write"));
    row("promoted", promotions.to_string());
    for ((cause, from, to), sum) in moves.by_kind() {
        let failed =
            if sum.failed == 0 { String::new() } else { format!(", {} failed", sum.failed) };
        let why = format!("{from} to {to}, {cause}");
        row(
            "moves",
            format!("{why:26} {:>8} {:>11}{failed}", sum.count, ByteSize(sum.bytes).to_string()),
        );
    }
    if moves.missed.get() > 0 {
        row("", format!("and {} that came too fast to be listed", moves.missed.get()));
    }
    row("compared", ByteSize(tally.bytes_compared.get()).to_string());
}

fn row(name: &str, text: String) {
    say(&format!("{name:10}{text}"));
}

fn peak(tier: &TierStats) -> String {
    let percent = tier.peak_bytes as f64 / tier.capacity_bytes.max(1) as f64 * 100.0;
    let peak = ByteSize(tier.peak_bytes);
    let capacity = ByteSize(tier.capacity_bytes);
    format!("peak {peak} of {capacity} ({percent:.1} %)")
}

/// Prints what deserves a word, and as the last line whether anything differed.
pub(crate) fn conclude(
    tally: &Tally,
    found: &Found,
    stats: &VirtualMemoryStats,
    end: End,
) -> ExitCode {
    list("changed meanwhile", &tally.changed);
    list("unreadable", &tally.unreadable);
    list("failed", &tally.failed);
    list("DIFFERS", &tally.differ);
    let over_budget = [("host", stats.host), ("disk", stats.disk)]
        .into_iter()
        .filter(|(_, tier)| tier.peak_bytes > tier.capacity_bytes)
        .inspect(|(name, _)| say(&format!("OVER BUDGET: {name}")))
        .count();
    if found.left_out > 0 {
        say(&format!("left out by --max: {} files", found.left_out));
    }
    let files = tally.files_compared.get();
    let bytes = ByteSize(tally.bytes_compared.get());
    let differ = tally.differ.count();
    let failed = tally.failed.count();
    let excused = tally.changed.count() + tally.unreadable.count();
    let excuse = match excused {
        0 => String::new(),
        _ => format!(" ({excused} changed meanwhile or unreadable)"),
    };
    let text = format!("{files} files, {bytes} compared, {differ} differ{excuse}");
    let nothing = files == 0 && excused > 0;
    if differ > 0 || failed > 0 || over_budget > 0 || nothing {
        say(&format!("FAILED: {text}, {failed} calls failed"));
        ExitCode::from(1)
    } else if end == End::Interrupted {
        say(&format!("INTERRUPTED: {text} so far"));
        ExitCode::from(130)
    } else {
        say(&format!("OK: {text}"));
        ExitCode::SUCCESS
    }
}

fn list(what: &str, messages: &Messages) {
    let first = messages.first();
    for message in &first {
        say(&format!("{what}: {message}"));
    }
    let more = messages.count() - first.len() as u64;
    if more > 0 {
        say(&format!("{what}: and {more} more"));
    }
}
