//! Whether a read can be explained.
//!
//! Invariant: a read is refused only if no order of the writes, one that agrees with when each call
//! started and ended and with what earlier reads have shown, has a moment within the read at which
//! the object held these bytes. Not quite every other read is accepted with reason: what one read
//! leaves open about writes in flight and a later one would settle is not gone back to, so that a
//! few contradictions between two reads pass. The self tests count them against brute force: 1 to
//! 2 in 100 on histories made to be tricky, 3 to 4 with reads that overlap. Called by the model
//! when a read ends.
//!
//! The object is cut where a write begins or ends. In each such segment the bytes name the write
//! that is visible there. Whatever else was applied by then to the same segment must have come
//! before that write; if these demands, together with what is known, go round in a circle, then no
//! order exists: the read is stale, or it mixes versions.

use std::collections::BTreeSet;
use std::ops::Range;

use super::history::{History, Learned, Write};
use super::{Pattern, Violation};

/// Combinations that are tried where short segments fit several versions by chance. Beyond, the
/// read counts as explained, since a model must not accuse without proof.
const TRIES: usize = 4096;

/// A read that has ended.
pub(super) struct Read<'a> {
    pub(super) start: u64,
    pub(super) offset: usize,
    pub(super) bytes: &'a [u8],
}

/// What the read tells, or why it is wrong.
pub(super) fn explain(history: &History, read: &Read<'_>) -> Result<Learned, Violation> {
    let segments = segments(history, read);
    let mut choices = Vec::with_capacity(segments.len());
    for segment in &segments {
        let fitting = fitting(history, read, segment);
        if fitting.is_empty() {
            return Err(foreign(history, read, segment));
        }
        choices.push(fitting);
    }
    let combinations = choices.iter().try_fold(1_usize, |all, some| all.checked_mul(some.len()));
    let mut turn = vec![0; choices.len()];
    let mut first_violation = None;
    let mut explained = None;
    for _ in 0..TRIES.min(combinations.unwrap_or(TRIES)) {
        let visible: Vec<usize> = turn.iter().zip(&choices).map(|(at, some)| some[*at]).collect();
        match Order::of(history, read, &segments, &visible).check() {
            // More than one way to explain it tells nothing for sure.
            Ok(_) if explained.is_some() => return Ok(Learned::default()),
            Ok(learned) => explained = Some(learned),
            Err(violation) => first_violation = first_violation.or(Some(violation)),
        }
        advance(&mut turn, &choices);
    }
    match (explained, first_violation) {
        (Some(learned), _) if combinations.is_some_and(|all| all <= TRIES) => Ok(learned),
        (None, Some(violation)) if combinations.is_some_and(|all| all <= TRIES) => Err(violation),
        _ => Ok(Learned::default()),
    }
}

/// The next combination, as an odometer.
fn advance(turn: &mut [usize], choices: &[Vec<usize>]) {
    for (at, some) in turn.iter_mut().zip(choices) {
        *at += 1;
        if *at < some.len() {
            return;
        }
        *at = 0;
    }
}

fn segments(history: &History, read: &Read<'_>) -> Vec<Range<usize>> {
    let end = read.offset + read.bytes.len();
    let mut cuts = BTreeSet::from([read.offset, end]);
    for write in &history.writes {
        cuts.extend([write.range.start, write.range.end]);
    }
    let cuts: Vec<usize> = cuts.range(read.offset..=end).copied().collect();
    cuts.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

fn part<'a>(read: &Read<'a>, segment: &Range<usize>) -> &'a [u8] {
    &read.bytes[segment.start - read.offset..segment.end - read.offset]
}

/// Indices of the writes whose bytes are in this segment.
fn fitting(history: &History, read: &Read<'_>, segment: &Range<usize>) -> Vec<usize> {
    let bytes = part(read, segment);
    let writes = history.writes.iter().enumerate();
    writes
        .filter(|(_, write)| write.covers(segment) && write.matches(segment.start, bytes))
        .map(|(index, _)| index)
        .collect()
}

/// Why no live write has these bytes: an old one has, or several have parts of them, or none.
fn foreign(history: &History, read: &Read<'_>, segment: &Range<usize>) -> Violation {
    let bytes = part(read, segment);
    let known = known(history, segment);
    let mut versions = BTreeSet::new();
    let mut at = 0;
    while at < bytes.len() {
        let offset = segment.start + at;
        let fits = |pattern| matching(pattern, offset, &bytes[at..]);
        let best = known.iter().map(|(version, pattern)| (fits(*pattern), *version)).max();
        let (len, version) = best.unwrap_or((0, 0));
        // A few bytes fit anything; a version is recognised by a word, or by reaching the end.
        if len < 8.min(bytes.len() - at) {
            return Violation::Foreign {
                range: offset..segment.end,
                candidates: candidates(history, segment),
            };
        }
        versions.insert(version);
        at += len;
    }
    match versions.len() {
        1 => Violation::Stale {
            offset: segment.start,
            version: versions.first().copied().unwrap_or(0),
        },
        _ => Violation::Mixed { versions: versions.into_iter().collect() },
    }
}

/// All versions that are, or were, in this segment.
fn known(history: &History, segment: &Range<usize>) -> Vec<(u64, Option<Pattern>)> {
    let live = history.writes.iter().map(|write| (write.version, &write.range, write.pattern));
    let old =
        history.superseded.iter().map(|(version, range, pattern)| (*version, range, *pattern));
    let all = live.chain(old);
    let covering =
        all.filter(|(_, range, _)| range.start <= segment.start && segment.end <= range.end);
    covering.map(|(version, _, pattern)| (version, pattern)).collect()
}

/// How many of `bytes` are those of the pattern from `offset` on.
fn matching(pattern: Option<Pattern>, offset: usize, bytes: &[u8]) -> usize {
    let mismatch = match pattern {
        Some(pattern) => pattern.mismatch(offset as u64, bytes),
        None => bytes.iter().position(|byte| *byte != 0),
    };
    mismatch.unwrap_or(bytes.len())
}

fn candidates(history: &History, segment: &Range<usize>) -> Vec<u64> {
    let covering = history.writes.iter().filter(|write| write.covers(segment));
    covering.map(|write| write.version).collect()
}

/// The order that one reading of the bytes demands.
struct Order<'a> {
    writes: &'a [Write],
    segments: &'a [Range<usize>],
    visible: &'a [usize],
    // Applied before the moment of the read.
    applied: Vec<bool>,
    // Applied before the read started, if at all.
    decided: Vec<bool>,
    certain: Vec<bool>,
    // before[a][b]: a was applied before b.
    before: Vec<Vec<bool>>,
}

impl<'a> Order<'a> {
    fn of(
        history: &'a History,
        read: &Read<'_>,
        segments: &'a [Range<usize>],
        visible: &'a [usize],
    ) -> Self {
        let writes = &history.writes[..];
        let mut applied: Vec<bool> = writes.iter().map(|w| w.applied_before(read.start)).collect();
        let mut certain: Vec<bool> = writes.iter().map(|w| w.certain).collect();
        for index in visible {
            applied[*index] = true;
            certain[*index] = true;
        }
        let row = |a: &Write| writes.iter().map(|b| a.precedes(b)).collect();
        Order {
            before: writes.iter().map(row).collect(),
            decided: writes.iter().map(|w| w.by < read.start).collect(),
            writes,
            segments,
            visible,
            applied,
            certain,
        }
    }

    fn check(mut self) -> Result<Learned, Violation> {
        let seen = self.visible.iter().map(|index| self.version(*index));
        let mut learned = Learned { seen: seen.collect(), ..Learned::default() };
        while self.demand(&mut learned) | self.spread() {}
        if let Some(violation) = self.circle() {
            return Err(violation);
        }
        self.unseen(&mut learned);
        Ok(learned)
    }

    /// What was applied to a segment came before the write that is visible there.
    fn demand(&mut self, learned: &mut Learned) -> bool {
        let mut changed = false;
        for (segment, &top) in self.segments.iter().zip(self.visible) {
            for below in 0..self.writes.len() {
                let under = below != top
                    && (self.applied[below] || self.decided[below])
                    && !self.before[below][top]
                    && self.writes[below].covers(segment);
                if under {
                    self.before[below][top] = true;
                    learned.order.push((self.version(below), self.version(top)));
                    changed = true;
                }
            }
        }
        changed
    }

    /// What certainly comes before something applied was applied too.
    fn spread(&mut self) -> bool {
        let mut changed = false;
        for a in 0..self.writes.len() {
            let late = self.certain[a]
                && !self.applied[a]
                && (0..self.writes.len()).any(|b| self.applied[b] && self.before[a][b]);
            if late {
                self.applied[a] = true;
                changed = true;
            }
        }
        changed
    }

    /// A write that would have to come before itself.
    fn circle(&self) -> Option<Violation> {
        let mut left: Vec<usize> = (0..self.writes.len()).filter(|a| self.applied[*a]).collect();
        loop {
            let free = |a: &usize| !left.iter().any(|b| self.before[*b][*a]);
            let rest: Vec<usize> = left.iter().copied().filter(|a| !free(a)).collect();
            if rest.is_empty() {
                return None;
            }
            if rest.len() == left.len() {
                break;
            }
            left = rest;
        }
        let seen: BTreeSet<u64> = self.visible.iter().map(|index| self.version(*index)).collect();
        let at = self.visible.iter().position(|index| left.contains(index)).unwrap_or(0);
        let offset = self.segments.get(at).map_or(0, |segment| segment.start);
        Some(match seen.len() {
            1 => Violation::Stale {
                offset,
                version: self.visible.first().map_or(0, |index| self.version(*index)),
            },
            _ => Violation::Mixed { versions: seen.into_iter().collect() },
        })
    }

    /// Writes that come after what is visible and yet are not visible: they are later than this
    /// read, and so than all that it saw.
    fn unseen(&self, learned: &mut Learned) {
        for (segment, &top) in self.segments.iter().zip(self.visible) {
            let after = self.reach(top);
            for index in 0..self.writes.len() {
                let hidden = !self.applied[index]
                    && self.writes[index].covers(segment)
                    && (0..self.writes.len()).any(|a| after[a] && self.before[a][index]);
                if hidden && learned.unseen.insert(self.version(index)) {
                    let pairs =
                        self.visible.iter().map(|a| (self.version(*a), self.version(index)));
                    learned.order.extend(pairs);
                }
            }
        }
    }

    /// The write itself, and what certainly comes after it.
    fn reach(&self, from: usize) -> Vec<bool> {
        let mut reached = vec![false; self.writes.len()];
        let mut open = vec![from];
        while let Some(a) = open.pop() {
            if std::mem::replace(&mut reached[a], true) {
                continue;
            }
            open.extend((0..self.writes.len()).filter(|b| self.certain[*b] && self.before[a][*b]));
        }
        reached
    }

    fn version(&self, index: usize) -> u64 {
        self.writes[index].version
    }
}
