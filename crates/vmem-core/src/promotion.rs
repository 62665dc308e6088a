//! The rule for promotion: when what was read often enough comes to stay.
//!
//! Invariant: pure, and one rule for every way to read. What counts is the cost so far: the chunks
//! that reads moved for this object since it was last in the faster tier. Once they come to `n - 1`
//! times its own, one more read promotes it. For whole reads that is the n-th; an object that is
//! read in ranges moves at most `n` times its length before it is resident. Called by each read
//! that the faster tier did not serve.

use crate::config::Promotion;

/// Whether a read promotes an object of `chunks` chunks, of which `moved` were moved by reads
/// before.
pub(crate) fn promotes(rule: Promotion, moved: u32, chunks: usize) -> bool {
    match rule {
        Promotion::Never => false,
        Promotion::OnNthRead(n) => {
            let chunks = u64::try_from(chunks).unwrap_or(u64::MAX);
            u64::from(moved) >= u64::from(n.saturating_sub(1)).saturating_mul(chunks)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_reads_promote_at_the_nth() {
        for (n, chunks) in [(1, 1), (2, 1), (2, 100), (3, 7)] {
            let rule = Promotion::OnNthRead(n);
            let mut moved = 0;
            let mut reads = 1;
            while !promotes(rule, moved, chunks) {
                moved += chunks as u32;
                reads += 1;
            }
            assert_eq!(reads, n);
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
        assert!(!promotes(Promotion::Never, u32::MAX, 1));
        assert!(!promotes(Promotion::OnNthRead(u32::MAX), u32::MAX, usize::MAX));
    }
}
