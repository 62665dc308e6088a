//! Jobs against a kernel that the test plays: short, interrupted and refused operations, in any
//! order; every byte, and every alignment, checked.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::op::{INTERRUPTS_MAX, SHORTAGES_MAX};
use super::plan::TRANSFER_MAX;
use super::*;

const EINTR: i32 = 4;
const EAGAIN: i32 = 11;
const EIO: i32 = 5;
const ECANCELED: i32 = 125;
const EOPNOTSUPP: i32 = 95;

const DIRECT: Alignment = Alignment { offset: 512, memory: 512 };

fn rng() -> SmallRng {
    let seed = std::env::var("VMEM_SEED").map_or(11, |text| text.parse().expect("a number"));
    eprintln!("VMEM_SEED={seed}");
    SmallRng::seed_from_u64(seed)
}

/// Plays the kernel: a file in memory, and a whim for each operation.
struct Kernel {
    file: Vec<u8>,
    align: Alignment,
    rng: SmallRng,
    /// Out of a hundred operations, this many fall short or are refused for a moment.
    trouble: u32,
    calls: usize,
}

impl Kernel {
    fn new(file: Vec<u8>, align: Alignment, rng: SmallRng, trouble: u32) -> Self {
        Kernel { file, align, rng, trouble, calls: 0 }
    }

    /// Runs a job wave by wave, its operations in any order.
    fn run(&mut self, mut job: Box<Job>) -> Box<Job> {
        let budget = BounceBudget::new();
        while !job.is_settled() {
            let bytes = job.plan_wave();
            assert!(bytes <= BOUNCE_JOB_BYTES.max(BOUNCE_MAX), "a wave within its part");
            job.equip(&budget, None);
            let mut running = Vec::new();
            while !job.wave_is_over() {
                while let Some(op) = job.start_op() {
                    running.push(op);
                }
                assert!(running.len() <= WINDOW);
                let nth = self.rng.random_range(0..running.len());
                let result = self.perform(&mut job, running[nth]);
                if job.complete(running[nth], result) == Step::Ended {
                    running.swap_remove(nth);
                }
            }
            assert!(running.is_empty(), "a wave that is over runs nothing");
            job.unload();
        }
        job
    }

    fn perform(&mut self, job: &mut Job, op: usize) -> i32 {
        self.calls += 1;
        let Submission { kind, offset, len, memory } = job.submission(op);
        if let Some(memory) = memory {
            assert_eq!(memory.len() as u64, len);
            assert!(len > 0 && len <= TRANSFER_MAX as u64);
            assert!(memory.is_aligned(self.align.memory as usize), "memory");
            assert!(offset.is_multiple_of(self.align.offset.into()), "offset");
            assert!(len.is_multiple_of(self.align.offset.into()), "length");
        }
        let mut most = usize::MAX;
        if self.rng.random_range(0..100) < self.trouble {
            match self.rng.random_range(0..4) {
                0 => return -EINTR,
                1 => return -EAGAIN,
                2 => return -ECANCELED,
                _ => most = self.rng.random_range(self.align.offset as usize..5000),
            }
        }
        let at = offset as usize;
        match kind {
            Kind::Read => {
                let target = job.target(op);
                let there = self.file.get(at..).unwrap_or_default();
                let count = target.len().min(there.len()).min(most);
                target[..count].copy_from_slice(&there[..count]);
                count as i32
            }
            Kind::Write => {
                let bytes: Vec<u8> =
                    job.sources(op).iter().flat_map(|s| s.iter().copied()).take(most).collect();
                if self.file.len() < at + bytes.len() {
                    self.file.resize(at + bytes.len(), 0);
                }
                self.file[at..at + bytes.len()].copy_from_slice(&bytes);
                bytes.len() as i32
            }
            Kind::Punch => {
                self.file[at..at + len as usize].fill(0);
                0
            }
            Kind::Sync => 0,
        }
    }
}

/// Bytes that begin at a multiple of `align` in memory, or just beside one.
fn bytes_at(rng: &mut SmallRng, len: usize, align: usize, aligned: bool) -> Bytes {
    let mut all = vec![0; len + 2 * align];
    rng.fill(&mut all[..]);
    let all = Bytes::from(all);
    let start = all.as_ptr().align_offset(align) + usize::from(!aligned);
    all.slice(start..start + len)
}

#[test]
fn random_writes_arrive_whole() {
    let mut rng = rng();
    for round in 0..300 {
        let align = if round % 2 == 0 { DIRECT } else { Alignment::NONE };
        let block = align.offset as usize;
        let mut expected = Vec::new();
        let mut runs = Vec::new();
        for _ in 0..rng.random_range(1..5) {
            expected.resize(expected.len() + rng.random_range(0..4) * block, 0);
            let mut run = WriteRun { offset: expected.len() as u64, parts: Vec::new() };
            for _ in 0..rng.random_range(0..12) {
                let len = match rng.random_range(0..4) {
                    0 => 0,
                    1 => rng.random_range(1..2000),
                    2 => rng.random_range(1..80_000),
                    _ => 65_536 * rng.random_range(1..30),
                };
                let aligned = rng.random_bool(0.7);
                let part = bytes_at(&mut rng, len, 4096, aligned);
                match rng.random_bool(0.4) {
                    // Neighbours in memory, as the chunks of a large object are.
                    true => {
                        let cut = rng.random_range(0..=len);
                        run.parts.extend([part.slice(..cut), part.slice(cut..)]);
                    }
                    false => run.parts.push(part),
                }
            }
            let odd = run.len() as usize % block;
            run.parts.push(vec![0; (block - odd) % block].into());
            expected.extend(run.parts.iter().flatten());
            runs.push(run);
        }
        let mut kernel = Kernel::new(Vec::new(), align, SmallRng::from_rng(&mut rng), 20);
        let job = kernel.run(Job::write(runs, Keep::new(7_u8), align));
        let (_, keep, result) = job.into_result();
        result.expect("every operation succeeds in the end");
        assert_eq!(keep.take::<u8>(), Some(7));
        expected.truncate(expected.len().max(kernel.file.len()));
        kernel.file.resize(expected.len(), 0);
        assert!(kernel.file == expected, "round {round}: other bytes on disk");
    }
}

#[test]
fn random_reads_fill_their_pieces_and_nothing_else() {
    let mut rng = rng();
    for round in 0..300 {
        let align = if round % 2 == 0 { DIRECT } else { Alignment::NONE };
        let mut file = vec![0; 3 << 20];
        rng.fill(&mut file[..]);
        let mut buf = vec![0xee; 2 << 20];
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < buf.len() {
            let longest = if rng.random_bool(0.3) { 1 << 20 } else { 9000 };
            let len = rng.random_range(0..longest).min(buf.len() - at);
            let any = rng.random_range(0..(file.len() - len) as u64);
            let offset = if rng.random_bool(0.6) { any - any % 512 } else { any };
            pieces.push(ReadPiece { offset, range: at..at + len });
            at += len + rng.random_range(1..4096);
        }
        let mut expected = buf.clone();
        for piece in &pieces {
            let from = piece.offset as usize;
            expected[piece.range.clone()].copy_from_slice(&file[from..from + piece.range.len()]);
        }
        buf.shrink_to_fit();
        let mut kernel = Kernel::new(file, align, SmallRng::from_rng(&mut rng), 20);
        let job = kernel.run(Job::read(IoBuf::from_vec(buf), &pieces, Keep::none(), align));
        let (buf, _, result) = job.into_result();
        result.expect("every operation succeeds in the end");
        assert!(buf.expect("comes back")[..] == expected[..], "round {round}: other bytes");
    }
}

#[test]
fn the_end_of_the_file_is_an_error_and_what_is_before_it_arrives() {
    for (align, end) in [(DIRECT, 100_000), (DIRECT, 2 * 512), (Alignment::NONE, 70_001)] {
        let file: Vec<u8> = (0..end).map(|n| n as u8).collect();
        let mut kernel = Kernel::new(file.clone(), align, rng(), 0);
        let pieces = [
            ReadPiece { offset: 0, range: 0..1000 },
            ReadPiece { offset: 512, range: 1000..1000 + end },
        ];
        let buf = IoBuf::from_vec(vec![0xee; end + 2000]);
        let job = kernel.run(Job::read(buf, &pieces, Keep::none(), align));
        let (buf, _, result) = job.into_result();
        assert_eq!(result.map_err(|error| error.kind()), Err(io::ErrorKind::UnexpectedEof));
        let buf = buf.expect("comes back");
        assert!(buf[..1000] == file[..1000] && buf[1000 + end..].iter().all(|&b| b == 0xee));
    }
}

/// Answers the same to each operation.
fn answer(mut job: Job, result: i32) -> (io::Result<()>, usize) {
    job.plan_wave();
    job.equip(&BounceBudget::new(), None);
    let mut calls = 0;
    while let Some(op) = job.start_op() {
        loop {
            calls += 1;
            if job.complete(op, result) == Step::Ended {
                break;
            }
        }
    }
    (job.into_result().2, calls)
}

fn write_of(len: usize) -> Box<Job> {
    let runs = vec![WriteRun { offset: 0, parts: vec![vec![1; len].into()] }];
    Job::write(runs, Keep::none(), Alignment::NONE)
}

#[test]
fn refusals_keep_their_errno_and_end() {
    for (errno, calls_max) in [(EIO, 1), (EINTR, INTERRUPTS_MAX + 1), (EAGAIN, SHORTAGES_MAX + 1)] {
        let (result, calls) = answer(*write_of(3), -errno);
        assert_eq!(result.expect_err("refused").raw_os_error(), Some(errno));
        assert_eq!(calls, calls_max as usize);
    }
    let (result, _) = answer(*write_of(3), 0);
    assert_eq!(result.expect_err("no progress").kind(), io::ErrorKind::WriteZero);
    let (result, calls) = answer(*Job::sync(), -EIO);
    assert_eq!((result.expect_err("refused").raw_os_error(), calls), (Some(EIO), 1));
}

#[test]
fn a_file_system_that_cannot_punch_is_asked_once() {
    let refused = Arc::new(AtomicBool::new(false));
    let ranges = [0..4096, 8192..16384];
    let job = Job::punch(&ranges, Keep::none(), Arc::clone(&refused));
    let (result, calls) = answer(*job, -EOPNOTSUPP);
    assert!(result.is_ok() && calls == 1 && refused.load(Ordering::Relaxed));
    assert!(Job::punch(&ranges, Keep::none(), refused).is_settled());
}

#[test]
fn impossible_requests_are_refused() {
    let refused = |job: Box<Job>| {
        assert!(job.is_settled());
        let (buf, _, result) = job.into_result();
        assert_eq!(result.expect_err("impossible").kind(), io::ErrorKind::InvalidInput);
        buf
    };
    let read = |offset, range| {
        let buf = IoBuf::from_vec(vec![0; 8]);
        Job::read(buf, &[ReadPiece { offset, range }], Keep::none(), DIRECT)
    };
    #[allow(clippy::reversed_empty_ranges, reason = "what a careless caller hands in")]
    let bad = [(0, 4..9), (0, 5..4), (u64::MAX - 2, 0..8), (i64::MAX as u64, 0..8)];
    for (offset, range) in bad {
        assert_eq!(refused(read(offset, range)).expect("comes back").len(), 8);
    }
    let write = |offset, len| {
        let parts = vec![vec![0; len].into()];
        Job::write(vec![WriteRun { offset, parts }], Keep::none(), DIRECT)
    };
    for (offset, len) in [(1, 512), (0, 511), (u64::MAX - 511, 512)] {
        refused(write(offset, len));
    }
}

/// Not for a leak checker.
#[test]
fn leaks_on_purpose_what_a_running_job_owns() {
    let keep = Arc::new(());
    let life = Arc::new(());
    struct Owner(#[expect(dead_code, reason = "held for its drop")] Arc<()>);
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            &[7; 512]
        }
    }
    let parts = vec![Bytes::from_owner(Owner(Arc::clone(&life)))];
    let runs = vec![WriteRun { offset: 0, parts }];
    let mut job = Job::write(runs, Keep::new(Arc::clone(&keep)), Alignment::NONE);
    job.plan_wave();
    assert!(job.start_op().is_some());
    drop(job);
    assert_eq!((Arc::strong_count(&keep), Arc::strong_count(&life)), (2, 2));
}
