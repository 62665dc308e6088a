//! The cards of one store, which share what the driver knows of host memory.
//!
//! What one of them registered is known to all, and any of them can have the driver forget it.
//!
//! Invariant: staging is registered once, whichever card asks first; and what is registered is
//! unregistered in a context that lives, as long as there is one, and all of it only once no other
//! card can copy from there. Called by `card` and `reach`.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::card::Card;

/// By where the staging memory is, which no two stores share.
static STORES: Mutex<BTreeMap<usize, Vec<Weak<Card>>>> = Mutex::new(BTreeMap::new());

/// A card joins those of a store. `first` is called for the first of them: where it fails, the card
/// does not join.
///
/// # Errors
///
/// That of `first`.
pub(crate) fn join<E>(
    store: usize,
    card: &Arc<Card>,
    first: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    let mut stores = STORES.lock();
    let cards = stores.entry(store).or_default();
    let joined =
        if cards.is_empty() || vmem_core::planted!("gpu-siblings") { first() } else { Ok(()) };
    match &joined {
        Ok(()) => cards.push(Arc::downgrade(card)),
        Err(_) if cards.is_empty() => drop(stores.remove(&store)),
        Err(_) => {}
    }
    joined
}

/// The cards of a store whose contexts live.
pub(crate) fn living(store: usize) -> Vec<Arc<Card>> {
    let stores = STORES.lock();
    let cards = stores.get(&store).into_iter().flatten().filter_map(Weak::upgrade);
    let cards: Vec<_> = cards.collect();
    drop(stores);
    // Outside of the lock: the last share of a card may end here.
    cards.into_iter().filter(|card| card.lost().is_none()).collect()
}

/// A card that is being dropped leaves its store. True for the last one whose context lives, which
/// has everything unregistered, or for the last of all.
pub(crate) fn leave(store: usize) -> bool {
    // One that is dropped at this moment counts no more.
    if !living(store).is_empty() {
        return false;
    }
    STORES.lock().remove(&store).is_some()
}
