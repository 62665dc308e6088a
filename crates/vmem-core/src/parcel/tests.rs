//! Invariant under test: a value leaves its parcel once, and stays unclaimed no longer than the
//! grace.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_value_that_is_not_claimed_is_recalled_after_the_grace_only() {
    let unclaimed = Arc::new(Unclaimed::default());
    let (delivery, parcel) = parcel();
    let counted = Arc::new(());
    delivery.deliver(counted.clone(), Some(&unclaimed)).expect("it is wanted");
    assert!(unclaimed.recall().is_some(), "too young");
    assert_eq!(Arc::strong_count(&counted), 2);
    tokio::time::advance(GRACE * 2).await;
    assert!(unclaimed.recall().is_none(), "nothing is left");
    assert_eq!(Arc::strong_count(&counted), 1);
    assert_eq!(parcel.claim().await, Err(Unkept::Recalled));
}

/// The thread that delivers stands still after it has entered the value.
#[tokio::test(start_paused = true)]
async fn a_value_that_is_entered_long_before_it_is_there_is_recalled() {
    let unclaimed = Arc::new(Unclaimed::default());
    let (delivery, parcel) = parcel();
    let weak: Weak<Inner<_>> = Arc::downgrade(&delivery.0);
    let ticket = unclaimed.enter(weak);
    tokio::time::advance(GRACE * 2).await;
    assert!(unclaimed.recall().is_some(), "it is looked at again");
    let counted = Arc::new(());
    drop(delivery.0.replace(State::Ready(counted.clone(), Some(ticket))));
    tokio::time::advance(GRACE * 2).await;
    assert!(unclaimed.recall().is_none(), "nothing is left");
    assert_eq!(Arc::strong_count(&counted), 1);
    assert_eq!(parcel.claim().await, Err(Unkept::Recalled));
}

#[tokio::test]
async fn a_claimed_value_leaves_no_entry() {
    let unclaimed = Arc::new(Unclaimed::default());
    let (delivery, parcel) = parcel();
    delivery.deliver(7, Some(&unclaimed)).expect("it is wanted");
    assert_eq!(parcel.claim().await, Ok(7));
    assert!(unclaimed.entries.lock().by_age.is_empty());
}

#[tokio::test]
async fn a_shared_value_goes_with_its_last_parcel() {
    let unclaimed = Arc::new(Unclaimed::default());
    let (delivery, parcel) = parcel();
    let weak = parcel.downgrade();
    let other = weak.upgrade().expect("a caller waits");
    let counted = Arc::new(());
    delivery.deliver(counted.clone(), Some(&unclaimed)).expect("it is wanted");
    drop(parcel.share().await);
    drop(parcel);
    assert_eq!(Arc::strong_count(&counted), 2);
    drop(other);
    assert_eq!(Arc::strong_count(&counted), 1);
    assert!(weak.upgrade().is_none());
    assert!(unclaimed.entries.lock().by_age.is_empty());
}

#[tokio::test]
async fn an_abandoned_or_unwanted_parcel_says_so() {
    let (delivery, receiver) = parcel::<u8>();
    drop(delivery);
    assert_eq!(receiver.claim().await, Err(Unkept::Abandoned));
    let (delivery, receiver) = parcel::<u8>();
    assert!(!delivery.is_unwanted());
    drop(receiver);
    delivery.unwanted().await;
    assert_eq!(delivery.deliver(1, None), Err(1));
}

#[tokio::test(start_paused = true)]
async fn a_value_set_aside_is_taken_back_unless_its_caller_comes() {
    let unclaimed = Arc::new(Unclaimed::default());
    let kept = Parcel::set_aside(1, &unclaimed);
    let left = Parcel::set_aside(2, &unclaimed);
    assert_eq!(kept.take_back(), Some(1));
    tokio::time::advance(GRACE * 2).await;
    assert!(unclaimed.recall().is_none(), "nothing is left");
    assert_eq!(left.take_back(), None);
}
