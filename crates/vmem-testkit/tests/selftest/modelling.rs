//! The reference model: what it accepts, and what it must refuse.

use bytes::Bytes;
use vmem_testkit::{Model, Seed, Settles, Violation};

const LEN: usize = 1000;

fn model() -> Model {
    let model = Model::new(Seed::new(5));
    model.create(1, LEN);
    model
}

/// A completed write of the whole object.
fn written(model: &Model) -> Bytes {
    let write = model.begin_write(1);
    let bytes = write.bytes();
    write.commit();
    bytes
}

fn patched(bytes: &[u8], at: usize, patch: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + patch.len()].copy_from_slice(patch);
    bytes
}

#[test]
fn a_new_object_is_zeros() {
    let model = model();
    assert_eq!(model.check_read(1, &[0; LEN]), Ok(()));
    let mut bytes = [0; LEN];
    bytes[700] = 1;
    let result = model.check_read(1, &bytes);
    assert!(matches!(result, Err(Violation::Foreign { .. })), "{result:?}");
    let result = model.check_read(1, &[0; LEN - 1]);
    assert!(matches!(result, Err(Violation::Length { .. })), "{result:?}");
}

#[test]
fn the_last_completed_write_is_read_and_no_other() {
    let model = model();
    let first = written(&model);
    let second = written(&model);
    assert_eq!(model.check_read(1, &second), Ok(()));
    for old in [&[0; LEN][..], &first] {
        let result = model.check_read(1, old);
        assert!(matches!(result, Err(Violation::Stale { .. })), "{result:?}");
    }
    let mut wrong = second.to_vec();
    wrong[LEN - 1] ^= 0x80;
    let result = model.check_read(1, &wrong);
    assert!(matches!(result, Err(Violation::Foreign { .. })), "{result:?}");
    assert_eq!(model.check_read(1, &second), Ok(()), "a refused read teaches nothing");
}

#[test]
fn bytes_of_another_object_or_place_are_foreign() {
    let model = model();
    model.create(2, LEN);
    let other = model.begin_write(2);
    let others = other.bytes();
    other.commit();
    let mine = written(&model);
    assert!(model.check_read(1, &others).is_err());
    let read = model.begin_read(1);
    assert!(read.check_at(10..20, &mine[11..21]).is_err(), "shifted by one");
    assert_eq!(model.begin_read(1).check_at(10..20, &mine[10..20]), Ok(()));
}

#[test]
fn torn_mixtures_are_refused() {
    let model = model();
    let old = written(&model);
    let write = model.begin_write(1);
    let new = write.bytes();
    for cut in [8, 500, 999] {
        let torn = [&new[..cut], &old[cut..]].concat();
        let result = model.check_read(1, &torn);
        assert!(matches!(result, Err(Violation::Mixed { .. })), "cut at {cut}: {result:?}");
    }
    drop(write);
}

#[test]
fn a_write_in_flight_may_be_seen_or_not_but_not_unseen() {
    let model = model();
    let old = written(&model);
    let write = model.begin_write(1);
    let new = write.bytes();
    assert_eq!(model.check_read(1, &old), Ok(()));
    assert_eq!(model.check_read(1, &new), Ok(()));
    let result = model.check_read(1, &old);
    assert!(matches!(result, Err(Violation::Stale { .. })), "older than before: {result:?}");
    write.commit();
    assert_eq!(model.check_read(1, &new), Ok(()));
}

#[test]
fn reads_that_overlap_may_disagree() {
    let model = model();
    let old = written(&model);
    let first = model.begin_read(1);
    let second = model.begin_read(1);
    let new = written(&model);
    assert_eq!(first.check(&new), Ok(()));
    assert_eq!(second.check(&old), Ok(()), "it began before the write ended");
    assert!(model.check_read(1, &old).is_err());
}

#[test]
fn two_writers_at_once_settle_on_one_order() {
    for first_seen in [0, 1] {
        let model = model();
        let writes = [model.begin_write(1), model.begin_write(1)];
        let bytes = writes.each_ref().map(|write| write.bytes());
        let a = &bytes[first_seen];
        let b = &bytes[1 - first_seen];
        assert_eq!(model.check_read(1, a), Ok(()));
        assert_eq!(model.check_read(1, b), Ok(()));
        assert!(model.check_read(1, a).is_err(), "back to what was overwritten");
        writes.into_iter().for_each(|write| write.commit());
        assert_eq!(model.check_read(1, b), Ok(()));
        assert!(model.check_read(1, a).is_err());
    }
}

#[test]
fn two_writers_at_once_end_as_either_when_nobody_looked() {
    for last in [0, 1] {
        let model = model();
        let writes = [model.begin_write(1), model.begin_write(1)];
        let bytes = writes.each_ref().map(|write| write.bytes());
        writes.into_iter().for_each(|write| write.commit());
        assert_eq!(model.check_read(1, &bytes[last]), Ok(()));
        assert!(model.check_read(1, &bytes[1 - last]).is_err(), "it was decided");
        assert!(model.check_read(1, &[0; LEN]).is_err());
    }
}

#[test]
fn partial_writes_lie_over_what_was_there() {
    let model = model();
    let base = written(&model);
    let part = model.begin_write_at(1, 100..300);
    let patch = part.bytes();
    let both = patched(&base, 100, &patch);
    assert_eq!(model.check_read(1, &base), Ok(()), "not yet");
    part.commit();
    assert_eq!(model.check_read(1, &both), Ok(()));
    assert!(model.check_read(1, &base).is_err(), "lost");
    let half = patched(&base, 100, &patch[..50]);
    assert!(model.check_read(1, &half).is_err(), "torn");
    let over = model.begin_write_at(1, 200..400);
    let overlay = over.bytes();
    over.commit();
    assert_eq!(model.check_read(1, &patched(&both, 200, &overlay)), Ok(()));
    let wrong_order = patched(&patched(&base, 200, &overlay), 100, &patch);
    assert!(model.check_read(1, &wrong_order).is_err(), "the older write on top");
    assert_eq!(model.begin_read(1).check_at(250..350, &overlay[50..150]), Ok(()));
    assert!(model.begin_read(1).check_at(250..300, &patch[150..200]).is_err());
}

#[test]
fn two_parts_in_flight_are_seen_in_one_order_by_all() {
    let model = model();
    let base = written(&model);
    let left = model.begin_write_at(1, 0..500);
    let right = model.begin_write_at(1, 500..LEN);
    let with_left = patched(&base, 0, &left.bytes());
    let with_right = patched(&base, 500, &right.bytes());
    let both = patched(&with_left, 500, &right.bytes());
    // Even reads that overlap cannot see the left part alone and the right part alone.
    let first = model.begin_read(1);
    let second = model.begin_read(1);
    let third = model.begin_read(1);
    assert_eq!(first.check(&with_left), Ok(()));
    let result = second.check(&with_right);
    assert!(matches!(result, Err(Violation::Mixed { .. })), "{result:?}");
    assert_eq!(third.check(&both), Ok(()));
    left.commit();
    right.commit();
    assert_eq!(model.check_read(1, &both), Ok(()));
}

#[test]
fn an_abandoned_write_is_undecided_until_the_next_one() {
    let model = model();
    let old = written(&model);
    let write = model.begin_write(1);
    let lost = write.bytes();
    drop(write);
    assert_eq!(model.check_read(1, &old), Ok(()));
    assert_eq!(model.check_read(1, &old), Ok(()));
    assert_eq!(model.check_read(1, &lost), Ok(()), "it came late");
    assert!(model.check_read(1, &old).is_err(), "and went again");

    let write = model.begin_write(1);
    let dead = write.bytes();
    drop(write);
    let newest = written(&model);
    assert_eq!(model.check_read(1, &newest), Ok(()));
    let result = model.check_read(1, &dead);
    assert!(matches!(result, Err(Violation::Stale { .. })), "over a later write: {result:?}");
}

#[test]
fn an_abandoned_part_is_whole_or_not_there() {
    let model = model();
    let base = written(&model);
    let part = model.begin_write_at(1, 100..300);
    let patch = part.bytes();
    drop(part);
    assert_eq!(model.check_read(1, &base), Ok(()));
    assert!(model.check_read(1, &patched(&base, 100, &patch[..199])).is_err());
    assert_eq!(model.check_read(1, &patched(&base, 100, &patch)), Ok(()));
    assert!(model.check_read(1, &base).is_err());
}

#[test]
fn strictness_decides_when_an_abandoned_write_is_dead() {
    let abandoned = |settles| {
        let model = Model::with_settles(Seed::new(6), settles);
        model.create(1, LEN);
        let write = model.begin_write(1);
        let bytes = write.bytes();
        drop(write);
        (model, bytes)
    };
    let (model, lost) = abandoned(Settles::AtDrop);
    assert_eq!(model.check_read(1, &[0; LEN]), Ok(()));
    assert!(model.check_read(1, &lost).is_err(), "the read after the drop decided");
    let (model, lost) = abandoned(Settles::AtDrop);
    assert_eq!(model.check_read(1, &lost), Ok(()), "or it was applied by then");

    let (model, lost) = abandoned(Settles::Whenever);
    let newer = written(&model);
    assert_eq!(model.check_read(1, &newer), Ok(()));
    assert_eq!(model.check_read(1, &lost), Ok(()), "allowed here, over a later write");
    assert!(model.check_read(1, &newer).is_err(), "but once only");
}

#[test]
fn a_late_abandoned_write_may_follow_a_concurrent_one() {
    // The abandoned write was called before the other ended, so it may come after it, even where
    // a read in between saw neither.
    let model = model();
    let other = model.begin_write(1);
    let others = other.bytes();
    let abandoned = model.begin_write(1);
    let late = abandoned.bytes();
    drop(abandoned);
    assert_eq!(model.check_read(1, &[0; LEN]), Ok(()));
    other.commit();
    assert_eq!(model.check_read(1, &others), Ok(()));
    assert_eq!(model.check_read(1, &late), Ok(()));
    assert!(model.check_read(1, &others).is_err());
}

#[test]
fn a_failed_write_must_not_be_seen() {
    let model = model();
    let old = written(&model);
    let write = model.begin_write(1);
    let failed = write.bytes();
    assert_eq!(write.fail(), Ok(()));
    assert_eq!(model.check_read(1, &old), Ok(()));
    assert!(model.check_read(1, &failed).is_err());
    let write = model.begin_write(1);
    assert_eq!(model.check_read(1, &write.bytes()), Ok(()));
    let result = write.fail();
    assert!(matches!(result, Err(Violation::AppliedThoughFailed { .. })), "{result:?}");
}

#[test]
fn short_objects_are_not_accused_by_chance() {
    let model = Model::new(Seed::new(7));
    for object in 0..300 {
        model.create(object, 1);
        let mut last = vec![0];
        for _ in 0..5 {
            let write = model.begin_write(object);
            last = write.bytes().to_vec();
            write.commit();
            assert_eq!(model.check_read(object, &last), Ok(()));
        }
        assert_eq!(model.check_read(object, &last), Ok(()));
    }
    model.create(1000, 0);
    let write = model.begin_write(1000);
    assert!(write.bytes().is_empty());
    write.commit();
    assert_eq!(model.check_read(1000, &[]), Ok(()));
}

#[test]
fn the_ledger_knows_what_exists() {
    let model = model();
    model.create(2, 50);
    model.create(3, 7);
    model.begin_remove(2).commit();
    model.begin_remove(3).fail();
    drop(model.begin_remove(3));
    let ledger = model.ledger();
    assert_eq!(ledger.live_bytes, LEN as u64);
    assert_eq!(ledger.check([1]), Ok(()));
    assert_eq!(ledger.check([1, 3]), Ok(()));
    assert!(ledger.check([3]).unwrap_err().contains("lost: [1]"));
    assert!(ledger.check([1, 2]).unwrap_err().contains("leaked: [2]"));
    assert_eq!(model.check_read(2, &[0; 50]), Err(Violation::Removed));
    model.create(2, 50);
    assert_eq!(model.check_read(2, &[0; 50]), Ok(()));
}
