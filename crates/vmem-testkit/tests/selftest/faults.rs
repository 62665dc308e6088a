//! Each fault is really injected, once or as often as planned, and counted.

use vmem_io::driver::Driver;
use vmem_testkit::{Errno, Fault, FaultDriver, FaultPlan, OpKind, Pattern, Seed, When};

use crate::{Plain, instant_disk, message_of, piece, read, run, zeros};

const LEN: usize = 16 * 1024;

/// A disk with a pattern on it, under faults.
async fn prepared(seed: Seed) -> (std::sync::Arc<FaultDriver>, Vec<u8>) {
    let disk = instant_disk();
    let data = Pattern::new(seed.value(), 1).bytes(0, 2 * LEN).to_vec();
    disk.start_write(run(0, &data)).await.expect("an instant disk without limits");
    (FaultDriver::new(disk, seed.fork("faults")), data)
}

fn errno(result: &std::io::Result<Vec<u8>>) -> Option<i32> {
    result.as_ref().err().and_then(std::io::Error::raw_os_error)
}

#[test]
fn counted_errors_strike_where_they_are_planned() {
    Seed::simulate("counted_errors_strike_where_they_are_planned", |seed| async move {
        let (driver, data) = prepared(seed).await;
        for errno_of in [Errno::IO, Errno::NOSPC, Errno::INTR, Errno::TIMEDOUT] {
            let fault = Fault::Error(errno_of);
            driver.set(FaultPlan::new().on(OpKind::Read, When::Nth(3), fault));
            for n in 1..6 {
                let result = read(&*driver, 0, LEN).await;
                match n {
                    3 => assert_eq!(errno(&result), Some(errno_of.raw_os_error())),
                    _ => assert_eq!(result.unwrap(), data[..LEN]),
                }
            }
            assert_eq!(driver.injected(fault), 1);
        }
        let fault = Fault::Error(Errno::IO);
        driver.set(FaultPlan::new().on(OpKind::Sync, When::From(2), fault));
        assert!(driver.sync().await.is_ok());
        assert!(driver.sync().await.is_err() && driver.sync().await.is_err());
        driver.clear();
        assert!(driver.sync().await.is_ok());
        assert_eq!(driver.injected(fault), 3, "1 read and 2 syncs");
        assert_eq!(driver.injected_total(), 6);
    });
}

#[test]
fn chance_is_seeded() {
    Seed::simulate("chance_is_seeded", |seed| async move {
        let mut runs = Vec::new();
        for _ in 0..2 {
            let (driver, _) = prepared(seed).await;
            let fault = Fault::Error(Errno::IO);
            driver.set(FaultPlan::new().on(OpKind::Read, When::Chance(0.3), fault));
            let mut failed = Vec::new();
            for n in 0..200 {
                if read(&*driver, 0, 1).await.is_err() {
                    failed.push(n);
                }
            }
            assert_eq!(driver.injected(fault), failed.len() as u64);
            assert!(failed.len() > 20 && failed.len() < 120, "{} of 200", failed.len());
            runs.push(failed);
        }
        assert_eq!(runs[0], runs[1]);
    });
}

#[test]
fn a_bit_flips_in_silence() {
    Seed::simulate("a_bit_flips_in_silence", |seed| async move {
        let (driver, data) = prepared(seed).await;
        driver.set(FaultPlan::new().on(OpKind::Read, When::Nth(1), Fault::BitFlip));
        let bytes = read(&*driver, 0, LEN).await.unwrap();
        let flipped = bytes.iter().zip(&data).map(|(a, b)| (a ^ b).count_ones());
        assert_eq!(flipped.sum::<u32>(), 1);
        assert_eq!(read(&*driver, 0, LEN).await.unwrap(), data[..LEN], "on the way, not on disk");
    });
}

#[test]
fn wrong_reads_look_like_successes() {
    Seed::simulate("wrong_reads_look_like_successes", |seed| async move {
        for fault in [Fault::ShortRead, Fault::MisdirectedRead] {
            let (driver, data) = prepared(seed).await;
            driver.set(FaultPlan::new().on(OpKind::Read, When::ALWAYS, fault));
            assert_ne!(read(&*driver, 0, LEN).await.unwrap(), data[..LEN], "{fault:?}");
            assert_eq!(driver.injected(fault), 1);
            driver.clear();
            assert_eq!(read(&*driver, 0, LEN).await.unwrap(), data[..LEN]);
        }
    });
}

#[test]
fn garbage_comes_with_an_error() {
    Seed::simulate("garbage_comes_with_an_error", |seed| async move {
        let (driver, data) = prepared(seed).await;
        let fault = Fault::Garbage(Errno::IO);
        driver.set(FaultPlan::new().on(OpKind::Read, When::ALWAYS, fault));
        let (buf, result) = driver.start_read(zeros(LEN), piece(0, LEN)).await;
        assert!(result.is_err());
        assert_ne!(buf[..], data[..LEN]);
        assert!(buf.iter().any(|byte| *byte != 0), "the buffer was left alone");
    });
}

#[test]
fn writes_go_wrong_on_disk() {
    Seed::simulate("writes_go_wrong_on_disk", |seed| async move {
        let new = vec![0x11; LEN];
        let faults = [
            (Fault::LostWrite, true),
            (Fault::MisdirectedWrite, true),
            (Fault::TornWrite(Errno::IO), false),
            (Fault::Error(Errno::NOSPC), false),
        ];
        for (fault, succeeds) in faults {
            let (driver, data) = prepared(seed).await;
            driver.set(FaultPlan::new().on(OpKind::Write, When::Nth(1), fault));
            assert_eq!(driver.start_write(run(0, &new)).await.is_ok(), succeeds, "{fault:?}");
            assert_eq!(driver.injected(fault), 1);
            let stored = read(&*driver, 0, 2 * LEN).await.unwrap();
            assert_ne!(stored[..LEN], new, "{fault:?} was not injected");
            let written = stored.iter().filter(|byte| **byte == 0x11).count();
            match fault {
                Fault::MisdirectedWrite => assert_ne!(stored[LEN..], data[LEN..]),
                Fault::TornWrite(_) => {
                    let cut = stored.iter().zip(&new).position(|(a, b)| a != b);
                    let cut = cut.expect("the write is torn");
                    assert_eq!(stored[cut..], data[cut..], "a prefix and nothing else");
                }
                _ => assert!(written < LEN / 16, "{written} bytes of {fault:?}"),
            }
            driver.start_write(run(0, &new)).await.unwrap();
            assert_eq!(read(&*driver, 0, LEN).await.unwrap(), new);
        }
    });
}

#[test]
fn an_error_after_hides_what_was_done() {
    Seed::simulate("an_error_after_hides_what_was_done", |seed| async move {
        let (driver, _) = prepared(seed).await;
        let fault = Fault::ErrorAfter(Errno::TIMEDOUT);
        driver.set(FaultPlan::new().on(OpKind::Write, When::ALWAYS, fault));
        assert!(driver.start_write(run(0, &[0x11; 100])).await.is_err());
        assert_eq!(read(&*driver, 0, 100).await.unwrap(), [0x11; 100]);
    });
}

#[test]
fn a_rule_that_never_applies_is_refused() {
    let message = message_of(|| FaultPlan::new().on(OpKind::Sync, When::ALWAYS, Fault::BitFlip));
    assert!(message.contains("BitFlip cannot happen to a Sync"), "{message}");
    let fault = Fault::Error(Errno::IO);
    assert!(
        message_of(|| FaultPlan::new().on(OpKind::Read, When::Nth(0), fault)).contains("from 1")
    );
    message_of(|| FaultPlan::new().on(OpKind::Read, When::Chance(0.0), fault));
}
