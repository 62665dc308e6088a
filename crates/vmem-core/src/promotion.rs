//! The rule for promotion: when what was read or gathered often enough comes to stay.
//!
//! Invariant: pure, and one rule for every way to read. What counts is the cost so far: what reads,
//! or gathers, moved of this object since it was last in the faster tier. Once that comes to
//! `n - 1` times the object, one more promotes it. For whole reads that is the n-th; an object that
//! is read in ranges moves at most `n` times its length before it is resident. Called by each read
//! that host memory did not serve, in chunks, and by each gather that the device did not serve, in
//! bytes.

use crate::config::Promotion;

/// Whether an object as long as `whole` is promoted, of which `moved` was moved before; both in the
/// same unit.
pub(crate) fn promotes(rule: Promotion, moved: u64, whole: u64) -> bool {
    match rule {
        Promotion::Never => false,
        Promotion::OnNthRead(n) | Promotion::OnNthGather(n) => {
            moved >= u64::from(n.saturating_sub(1)).saturating_mul(whole)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_reads_promote_at_the_nth() {
        for (n, chunks) in [(1, 1), (2, 1), (2, 100), (3, 7)] {
            for rule in [Promotion::OnNthRead(n), Promotion::OnNthGather(n)] {
                let mut moved = 0;
                let mut reads = 1;
                while !promotes(rule, moved, chunks) {
                    moved += chunks;
                    reads += 1;
                }
                assert_eq!(reads, n);
            }
        }
    }

    #[test]
    fn ranges_move_at_most_the_object_before_the_second_read_promotes() {
        let chunks = 128;
        let mut moved = 0;
        while !promotes(Promotion::OnNthRead(2), moved, chunks) {
            moved += 1;
        }
        assert_eq!(moved, 128);
    }

    #[test]
    fn never_is_never_and_no_count_overflows() {
        assert!(!promotes(Promotion::Never, u64::MAX, 1));
        assert!(!promotes(Promotion::OnNthRead(u32::MAX), u64::MAX - 1, u64::MAX));
    }
}
