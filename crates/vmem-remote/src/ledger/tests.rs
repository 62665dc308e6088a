//! The ledger against a model that looks at every chunk.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

/// Extents that exist, with what was put into them.
#[derive(Default)]
struct Model {
    extents: Vec<(u64, u32, Option<Placed>)>,
    /// Segments that were put.
    begun: usize,
}

impl Model {
    fn live(&self, id: u64) -> u64 {
        let placed = self.extents.iter().filter_map(|(_, _, placed)| *placed);
        placed.filter(|placed| placed.segment == id).map(|placed| u64::from(placed.len)).sum()
    }

    /// A segment of some extents, also of such that were written before.
    fn put(&mut self, rng: &mut SmallRng, ledger: &mut Ledger) {
        let segment = ledger.begin_segment();
        self.begun += 1;
        let mut at = 0;
        let mut chunks = Vec::new();
        for (offset, len, placed) in &mut self.extents {
            if *len > 0 && rng.random_bool(0.2) {
                let put = Placed { segment, at, len: *len, sum: rng.random() };
                *placed = Some(put);
                chunks.push((*offset, put));
                at += u64::from(*len);
            }
        }
        ledger.publish(segment, &chunks);
    }

    fn check(&self, ledger: &Ledger) {
        let used: u64 = self.extents.iter().map(|(_, len, _)| u64::from(*len)).sum();
        let usage = ledger.usage();
        assert_eq!((usage.used_bytes, usage.extents), (used, self.extents.len() as u64));
        assert!(usage.used_bytes <= usage.capacity_bytes);
        let mut garbage = 0;
        for (&id, segment) in &ledger.segments {
            assert_eq!(segment.live, self.live(id), "segment {id}");
            assert!(segment.live > 0 || segment.readers > 0, "segment {id} is dead");
            let is_sparse = segment.live > 0 && !segment.stays && segment.live * 2 < segment.bytes;
            assert_eq!(ledger.sparse.contains(&id), is_sparse, "segment {id}");
            garbage += u64::from(is_sparse) * (segment.bytes - segment.live);
        }
        assert_eq!(ledger.sparse_garbage, garbage);
        let stored: u64 = ledger.segments.values().map(|segment| segment.bytes).sum();
        assert_eq!(ledger.stored(), (ledger.segments.len() as u64, stored));
        for (offset, _, placed) in self.extents.iter().filter(|(_, len, _)| *len > 0) {
            assert_eq!(ledger.find(*offset), *placed, "extent {offset}");
        }
    }
}

/// Random extents, segments, readers and compactions: every figure is that of the model, and each
/// segment dies once, when nothing is left of it.
#[test]
fn figures_equal_a_model() {
    let mut rng = SmallRng::seed_from_u64(7);
    let mut ledger = Ledger::new(5000, 1000, 0.5);
    let mut model = Model::default();
    let mut pins: Vec<u64> = Vec::new();
    let mut dead = Vec::new();
    let mut compactions = 0;
    for _ in 0..20_000 {
        match rng.random_range(0..10) {
            0..3 => {
                let lens: Vec<u32> =
                    (0..rng.random_range(1..8)).map(|_| rng.random_range(0..200)).collect();
                let requested: u64 = lens.iter().map(|len| u64::from(*len)).sum();
                let free = 5000 - ledger.usage().used_bytes;
                match ledger.reserve(&lens) {
                    Ok(offsets) => {
                        let extents = offsets.into_iter().zip(lens);
                        model.extents.extend(extents.map(|(offset, len)| (offset, len, None)));
                    }
                    Err(TierError::Full { requested_bytes, free_bytes, .. }) => {
                        assert_eq!((requested_bytes, free_bytes), (requested, free));
                        assert!(requested > free);
                    }
                    Err(error) => panic!("{error:?}"),
                }
            }
            3..5 => model.put(&mut rng, &mut ledger),
            5..8 if !model.extents.is_empty() => {
                let gone = rng.random_range(0..model.extents.len());
                let (offset, len, _) = model.extents.swap_remove(gone);
                ledger.release(offset, len);
            }
            8 => {
                let alive: Vec<u64> = ledger.segments.keys().copied().collect();
                if !alive.is_empty() {
                    let id = alive[rng.random_range(0..alive.len())];
                    ledger.pin(id);
                    pins.push(id);
                }
                if pins.len() > 3 {
                    ledger.unpin(pins.swap_remove(rng.random_range(0..pins.len())));
                }
            }
            _ => match ledger.next_chore() {
                Some(Chore::Delete(ids)) => dead.extend(ids),
                Some(Chore::Compact(compaction)) => {
                    compactions += 1;
                    copy(&mut rng, &mut ledger, &mut model, compaction);
                }
                None => assert!(!ledger.has_chore()),
            },
        }
        model.check(&ledger);
    }
    for (offset, len, _) in model.extents.drain(..) {
        ledger.release(offset, len);
    }
    pins.drain(..).for_each(|id| ledger.unpin(id));
    while let Some(Chore::Delete(ids)) = ledger.next_chore() {
        dead.extend(ids);
    }
    assert!(compactions > 20, "{compactions} compactions");
    assert_eq!(ledger.stored(), (0, 0));
    assert_eq!(dead.len(), model.begun, "each segment dies once");
    let distinct: BTreeSet<u64> = dead.iter().copied().collect();
    assert_eq!(distinct.len(), dead.len());
}

/// A compaction, during which some extents go and others are written again.
fn copy(rng: &mut SmallRng, ledger: &mut Ledger, model: &mut Model, compaction: Compaction) {
    let live: u64 = compaction.segments.iter().map(|&id| model.live(id)).sum();
    let found: u64 = compaction.chunks.iter().map(|(_, placed)| u64::from(placed.len)).sum();
    assert_eq!(found, live, "all that is alive is copied");
    for _ in 0..rng.random_range(0..3) {
        if !model.extents.is_empty() {
            let (offset, len, _) =
                model.extents.swap_remove(rng.random_range(0..model.extents.len()));
            ledger.release(offset, len);
        }
    }
    if rng.random_bool(0.5) {
        model.put(rng, ledger);
    }
    if rng.random_bool(0.8) {
        let segment = ledger.begin_segment();
        model.begun += 1;
        let mut at = 0;
        let mut copies = Vec::new();
        for &(offset, placed) in &compaction.chunks {
            let moved = Placed { segment, at, ..placed };
            copies.push((offset, moved));
            at += u64::from(placed.len);
            let extent = model.extents.iter_mut().find(|(at, len, _)| *at == offset && *len > 0);
            if let Some((_, _, place)) = extent.filter(|(_, _, place)| *place == Some(placed)) {
                *place = Some(moved);
            }
        }
        ledger.switch(segment, &copies, &compaction);
    }
    for id in compaction.segments {
        ledger.end_compaction(id, true);
    }
}

#[test]
fn damaged_segment_is_copied_once() {
    let mut ledger = Ledger::new(1000, 100, 0.5);
    let offsets = ledger.reserve(&[50, 50, 10]).unwrap();
    let segment = ledger.begin_segment();
    let places: Vec<_> = [(0, 50), (50, 50), (100, 10)]
        .into_iter()
        .zip(&offsets)
        .map(|((at, len), offset)| (*offset, Placed { segment, at, len, sum: 0 }))
        .collect();
    ledger.publish(segment, &places);
    ledger.release(offsets[0], 50);
    assert!(!ledger.has_chore());
    ledger.release(offsets[1], 50);
    let Some(Chore::Compact(compaction)) = ledger.next_chore() else { panic!("it is sparse") };
    assert_eq!(compaction.chunks, [places[2]]);
    assert!(!ledger.has_chore(), "it is under way");
    ledger.end_compaction(segment, false);
    assert!(!ledger.has_chore(), "it is damaged");
    ledger.release(offsets[2], 10);
    assert!(matches!(ledger.next_chore(), Some(Chore::Delete(ids)) if ids == [segment]));
}

#[test]
fn segment_is_in_use_until_the_last_extent_and_look_up_have_gone() {
    let me = uuid::Uuid::from_u128(1);
    let origin = (uuid::Uuid::from_u128(2), 7);
    let mut ledger = Ledger::new(1000, 100, 0.5);
    let now = tokio::time::Instant::now();
    let later = now + std::time::Duration::from_secs(1);
    assert!(!ledger.uses(me, origin));
    let segment = ledger.number(origin);
    let placed = Placed { segment, at: 0, len: 50, sum: 0 };
    let offset = ledger.enter_named(placed, now);
    assert_eq!(ledger.enter_named(placed, later), offset);
    ledger.adopted(offset);
    ledger.forget_awaited(later);
    assert!(ledger.uses(me, origin), "a look-up was just now");
    ledger.release(offset, 50);
    assert!(ledger.uses(me, origin), "its extent is to come");
    ledger.forget_awaited(later + std::time::Duration::from_nanos(1));
    assert!(!ledger.uses(me, origin) && ledger.find(offset).is_none());
    assert_eq!(ledger.origin(segment), None);
    // What is being put.
    let own = ledger.begin_segment();
    assert!(ledger.uses(me, (me, own)));
    ledger.abandon_segment(own, true);
    assert!(!ledger.uses(me, (me, own)));
}
