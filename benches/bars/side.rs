//! One side of P13 as a process of its own, so that its memory and its CPU are its own.
//!
//! Invariant: sides run in turns. A child stands still, stopped by a signal, but for its own
//! rounds: the ring threads of a peer may spin while they are idle. Called by `table`.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::Context;
use futures::future::join_all;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, Zipf};
use rustix::process::{Pid, Signal, kill_process};

use crate::group::Group;
use crate::metadata::resident_bytes;
use crate::report::process_cpu_ns;

/// Bytes of one object.
pub(crate) const LEN: usize = 1536;
/// Objects of a set.
pub(crate) const SET: usize = 32;
/// Tasks that read sets at once.
pub(crate) const TASKS: usize = 64;

/// What a child is to be: a word, the number of objects, a directory, and what the side itself
/// wants to know.
const CHILD: &str = "VMEM_BENCH_P13_CHILD";
/// The file by which it joins its control group.
const GROUP: &str = "VMEM_BENCH_P13_GROUP";

/// The bytes of an object.
pub(crate) fn bytes_of(key: usize) -> [u8; LEN] {
    let mut bytes = [key as u8; LEN];
    bytes[..8].copy_from_slice(&(key as u64).to_le_bytes());
    bytes
}

/// # Errors
///
/// If these are not the bytes of the object.
pub(crate) fn check(key: usize, bytes: &[u8]) -> anyhow::Result<()> {
    let starts = bytes.starts_with(&(key as u64).to_le_bytes());
    let right = starts && bytes.len() == LEN && bytes[LEN - 1] == key as u8;
    anyhow::ensure!(right, "the bytes of object {key}");
    Ok(())
}

/// The object of this rank of popularity: objects that are asked for most do not lie side by side.
pub(crate) fn key_of(rank: usize, count: usize) -> usize {
    // A prime beyond any count: every key has one rank.
    (rank as u64 * 2_654_435_761 % count as u64) as usize
}

/// A reader of sets: cheap to clone, one for each task.
pub(crate) trait Reader: Clone + Send + Sync + 'static {
    /// Reads a set, and checks every object. A key may occur twice.
    fn read(&self, keys: Vec<usize>) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// The share of all objects read so far that memory served.
    fn hit_ratio(&self) -> anyhow::Result<f64>;
}

/// What sets cost in one round, each: nanoseconds on the clock with all tasks, and of CPU.
pub(crate) type Cost = (f64, f64);

/// Reads this many sets with all tasks, chosen by Zipf's law.
pub(crate) async fn round(
    reader: &impl Reader,
    count: usize,
    sets: usize,
    seed: u64,
) -> anyhow::Result<Cost> {
    let began = Instant::now();
    let cpu = process_cpu_ns();
    let tasks = (0..TASKS).map(|task| {
        let reader = reader.clone();
        let mut rng = SmallRng::seed_from_u64(seed << 8 | task as u64);
        tokio::spawn(async move {
            let zipf = Zipf::new(count as f64, 1.0)?;
            for _ in 0..sets / TASKS {
                let rank = |_| zipf.sample(&mut rng) as usize - 1;
                let keys = (0..SET).map(rank).map(|rank| key_of(rank, count)).collect();
                reader.read(keys).await?;
            }
            anyhow::Ok(())
        })
    });
    for task in join_all(tasks).await {
        task??;
    }
    let sets = (sets / TASKS * TASKS) as f64;
    Ok((began.elapsed().as_nanos() as f64 / sets, (process_cpu_ns() - cpu) / sets))
}

/// What this process is to be, if it is a child of P13: it has joined its group then.
pub(crate) fn role() -> anyhow::Result<Option<Vec<String>>> {
    let Ok(role) = std::env::var(CHILD) else { return Ok(None) };
    // It may stand still when its parent is killed.
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if let Ok(group) = std::env::var(GROUP) {
        std::fs::write(group, std::process::id().to_string())?;
    }
    Ok(Some(role.split(' ').map(str::to_owned).collect()))
}

/// Serves the parent's rounds until it says no more: a line with sets and seed each, answered by
/// what they cost, what is resident, and the hit ratio.
pub(crate) async fn serve(reader: impl Reader, count: usize) -> anyhow::Result<()> {
    println!("ready {}", resident_bytes()?);
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (sets, seed) = line.split_once(' ').context("sets and a seed")?;
        let (wall, cpu) = round(&reader, count, sets.parse()?, seed.parse()?).await?;
        println!("{wall} {cpu} {} {}", resident_bytes()?, reader.hit_ratio()?);
    }
    Ok(())
}

/// A child that has loaded its objects.
pub(crate) struct Side {
    child: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// After its last round.
    pub(crate) resident_bytes: f64,
    pub(crate) hit_ratio: f64,
    pub(crate) group: Option<Group>,
    /// Removed when the child has ended.
    _directory: tempfile::TempDir,
}

impl Side {
    /// Starts a child, in a group if there is one, and waits until it has loaded.
    pub(crate) fn start(
        role: &str,
        count: usize,
        options: &str,
        group: Option<Group>,
    ) -> anyhow::Result<Self> {
        let place = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target"));
        let directory = tempfile::tempdir_in(place)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.env(CHILD, format!("{role} {count} {} {options}", directory.path().display()));
        if let Some(group) = &group {
            command.env(GROUP, group.processes());
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let asks = child.stdin.take().context("its input")?;
        let answers = BufReader::new(child.stdout.take().context("its output")?);
        let resident_bytes = 0.0;
        let hit_ratio = 0.0;
        let mut side =
            Side { child, asks, answers, resident_bytes, hit_ratio, group, _directory: directory };
        let ready = side.answer()?;
        side.resident_bytes = ready.strip_prefix("ready ").context(role.to_owned())?.parse()?;
        side.signal(Signal::STOP)?;
        Ok(side)
    }

    /// One round of it.
    pub(crate) fn round(&mut self, sets: usize, seed: u64) -> anyhow::Result<Cost> {
        self.signal(Signal::CONT)?;
        writeln!(self.asks, "{sets} {seed}")?;
        let answer = self.answer()?;
        self.signal(Signal::STOP)?;
        let figures: Vec<f64> =
            answer.split(' ').map(str::parse).collect::<Result<_, _>>().context(answer.clone())?;
        anyhow::ensure!(figures.len() == 4, "{answer}");
        (self.resident_bytes, self.hit_ratio) = (figures[2], figures[3]);
        Ok((figures[0], figures[1]))
    }

    /// What it takes in all: what is charged to its group, where it has one, or what is resident.
    pub(crate) fn memory_bytes(&self) -> anyhow::Result<f64> {
        let charged = self.group.as_ref().map_or(Ok(0.0), Group::used_bytes)?;
        Ok(charged.max(self.resident_bytes))
    }

    fn answer(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        anyhow::ensure!(!line.is_empty(), "a side of P13 ended: {:?}", self.child.wait()?);
        Ok(line.trim().to_owned())
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = Pid::from_raw(self.child.id() as i32).context("a process id")?;
        Ok(kill_process(pid, signal)?)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // What it stored is of no use any more, so it is killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
