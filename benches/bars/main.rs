//! The bars of vmem, each a ratio taken within this run: `cargo bench -p vmem-bench --features
//! peers`.
//!
//! Ours and the peer's rounds alternate on the same data; the median is quoted with its spread.
//! Costs are CPU time of the measuring thread, which is steadier than wall time on a shared
//! machine. An id as argument runs one bar; `VMEM_BENCH=quick` takes fewer rounds. It measures, a
//! reader judges: the process ends with 0 whether or not the bars hold.

mod bulk;
#[cfg(feature = "peers")]
mod cached;
mod clients;
#[cfg(target_os = "linux")]
mod cold;
mod evict;
mod group;
mod hot;
#[cfg(feature = "peers")]
mod mapped;
mod metadata;
#[cfg(target_os = "linux")]
mod mixed;
mod named;
#[cfg(feature = "peers")]
mod peer;
mod ranges;
#[cfg(target_os = "linux")]
mod raw;
mod remote;
mod report;
mod sets;
mod side;
mod streams;
mod table;
#[cfg(all(target_os = "linux", feature = "watched"))]
mod watched;

use report::Report;

fn main() -> anyhow::Result<()> {
    if metadata::child()? || named::child()? || table::child()? {
        return Ok(());
    }
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let quick = std::env::var("VMEM_BENCH").is_ok_and(|value| value == "quick");
    let wanted = |id: &str| only.as_deref().is_none_or(|only| only.eq_ignore_ascii_case(id));
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average at the start: {}", load.trim());
    let mut report = Report::default();
    let rounds = if quick { 3 } else { 9 };
    if wanted("P1") {
        hot::p1(&mut report, rounds)?;
    }
    if wanted("P2") {
        hot::p2(&mut report, rounds)?;
    }
    #[cfg(target_os = "linux")]
    if wanted("P3") {
        cold::p3(&mut report, quick)?;
    }
    #[cfg(target_os = "linux")]
    if wanted("P4") {
        mixed::p4(&mut report, quick, if quick { 2 } else { 5 })?;
    }
    if wanted("P6") {
        evict::p6(&mut report, if quick { 3 } else { 5 })?;
    }
    if wanted("P7") {
        metadata::p7(&mut report, if quick { 200_000 } else { 1_000_000 })?;
    }
    if wanted("P12") {
        named::p12(&mut report, if quick { 3 } else { 7 })?;
    }
    if wanted("P13") {
        table::p13(
            &mut report,
            if quick { 200_000 } else { 1_000_000 },
            if quick { 3 } else { 7 },
        )?;
    }
    if wanted("P14") {
        table::p14(&mut report, if quick { 200_000 } else { 1_000_000 })?;
    }
    if wanted("P15") {
        ranges::p15(&mut report, rounds)?;
    }
    if wanted("P16") {
        bulk::p16(&mut report, if quick { 20_000 } else { 100_000 }, if quick { 3 } else { 5 })?;
    }
    if wanted("P17") {
        streams::p17(&mut report, if quick { 256 } else { 1024 }, if quick { 3 } else { 5 })?;
    }
    if wanted("R1") {
        remote::r1(&mut report, quick, if quick { 3 } else { 7 })?;
    }
    if wanted("clients") {
        clients::clients(&mut report, if quick { 3 } else { 5 })?;
    }
    if wanted("sets") {
        sets::sets(&mut report, rounds)?;
    }
    if wanted("names") {
        named::million(&mut report, if quick { 50_000 } else { 1_000_000 })?;
    }
    #[cfg(all(target_os = "linux", feature = "watched"))]
    if wanted("V1") {
        watched::v1(&mut report, quick, if quick { 5 } else { 9 })?;
    }
    report.finish()
}
