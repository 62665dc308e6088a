//! Rounds, one case each.

use std::io;

use vmem_remote::RequestError;

use super::*;

/// How many segments another instance deletes.
async fn deleted_by(other: &Instance) -> u64 {
    other.names.collect_segments().await.unwrap().deleted
}

/// What superseded generations led to is no longer led to.
async fn forget_superseded(instance: &Instance) {
    tokio::time::sleep(GRACE * 4 + GRACE / 2).await;
    instance.names.collect().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn segments_of_superseded_versions_are_deleted() {
    let bucket = Bucket::new();
    let one = Instance::open(&bucket).await;
    let other = Instance::open(&bucket).await;
    for version in 10..20 {
        drop(one.put("n", version).await);
    }
    drop(one.put("gone", 20).await);
    one.remove("gone").await;
    assert_eq!(segments(&bucket), 11);
    assert_eq!(deleted_by(&other).await, 0, "superseded versions stay for a time");
    forget_superseded(&one).await;
    assert_eq!(deleted_by(&other).await, 10);
    assert_eq!(segments(&bucket), 1);
    let found = other.find("n").await.unwrap().unwrap();
    assert_eq!(found.version, 19);
    other.check(&found).await.unwrap();
    assert_eq!(count(&bucket, |path| path.contains("/rounds/")), 0);
    drop(found);
    one.close().await;
    other.close().await;
    assert_eq!(count(&bucket, |path| path.contains("/instances/")), 0);
}

#[tokio::test(start_paused = true)]
async fn segments_in_hands_stay() {
    let bucket = Bucket::new();
    let one = Instance::open(&bucket).await;
    let other = Instance::open(&bucket).await;
    let own = one.put("n", 11).await;
    let found = other.find("n").await.unwrap().unwrap();
    let unnamed = one.upload(12).await.unwrap();
    one.remove("n").await;
    forget_superseded(&one).await;
    let collected = other.names.collect_segments().await.unwrap();
    assert_eq!((collected.candidates, collected.kept, collected.deleted), (2, 2, 0));
    drop(own);
    assert_eq!(deleted_by(&one).await, 0, "the other one has it still");
    other.check(&found).await.unwrap();
    one.check(&unnamed).await.unwrap();
    // It gets a name again, and is led to.
    other.names.record("again".into()).await.unwrap();
    other.names.commit(found.named("again", 30)).await.unwrap();
    drop(found);
    assert_eq!(deleted_by(&one).await, 0);
    let again = one.find("again").await.unwrap().unwrap();
    one.check(&again).await.unwrap();
    drop((again, unnamed));
    one.close().await;
    other.close().await;
}

/// Excluded: a look-up whose caller went keeps a segment for good.
#[tokio::test(start_paused = true)]
async fn look_up_that_nobody_follows_keeps_nothing() {
    let bucket = Bucket::new();
    let one = Instance::open(&bucket).await;
    let other = Instance::open(&bucket).await;
    drop(one.put("n", 11).await);
    drop(other.names.find("n".into()));
    other.names.find("n".into()).await.unwrap();
    let found = other.find("n").await.unwrap().unwrap();
    one.remove("n").await;
    forget_superseded(&one).await;
    assert_eq!(deleted_by(&one).await, 0);
    other.check(&found).await.unwrap();
    drop(found);
    assert_eq!(deleted_by(&one).await, 1);
    one.close().await;
    other.close().await;
}

#[tokio::test(start_paused = true)]
async fn segments_of_killed_instances_are_deleted() {
    let bucket = Bucket::new();
    let other = Instance::open(&bucket).await;
    let killed = Instance::open(&bucket).await;
    let named = killed.put("n", 11).await;
    let unnamed = killed.upload(12).await.unwrap();
    killed.desk.crash();
    tokio::time::sleep(2 * GRACE).await;
    assert_eq!(deleted_by(&other).await, 1, "once its lease has run out");
    assert_eq!(segments(&bucket), 1);
    assert_eq!(count(&bucket, |path| path.contains("/instances/")), 1, "that of the other one");
    let found = other.find("n").await.unwrap().unwrap();
    other.check(&found).await.unwrap();
    drop((named, unnamed, found));
    other.close().await;
}

fn cause(error: &VirtualMemoryError) -> &RequestError {
    let VirtualMemoryError::Io { source, .. } = error else { panic!("{error:?}") };
    let inner = io::Error::get_ref(source).unwrap();
    inner.downcast_ref().unwrap()
}

/// An instance that could not reach the bucket for long learns that it was ended, and changes no
/// name and puts nothing any more.
#[tokio::test(start_paused = true)]
async fn instance_that_was_ended_changes_nothing() {
    let bucket = Bucket::new();
    let other = Instance::open(&bucket).await;
    let one = Instance::open(&bucket).await;
    let held = one.put("n", 11).await;
    other.names.record("n".into()).await.unwrap();
    other.remove("n").await;
    one.desk.change(Weather { failed: 1000, ..Weather::default() });
    forget_superseded(&other).await;
    let expired = one.names.find("n".into()).await.unwrap_err();
    assert!(matches!(cause(&expired), RequestError::Failed { .. }), "{expired:?}");
    assert_eq!(deleted_by(&other).await, 1);
    one.desk.change(Weather::default());
    tokio::time::sleep(GRACE).await;
    assert!(one.tier.stats().is_lease_ended);
    for error in [
        one.names.find("n".into()).await.unwrap_err(),
        one.names.commit(held.named("n", 30)).await.unwrap_err(),
    ] {
        assert_eq!(cause(&error), &RequestError::LeaseEnded);
    }
    let refused = one.upload(12).await.unwrap_err();
    assert!(format!("{refused:?}").contains("LeaseEnded"), "{refused:?}");
    assert!(other.find("n").await.unwrap().is_none());
    drop(held);
    one.close().await;
    other.close().await;
}

/// Excluded: a commit that nobody awaits, or whose answer was lost, leads to what was deleted.
#[tokio::test(start_paused = true)]
async fn segments_of_commits_under_way_stay() {
    let bucket = Bucket::new();
    let other = Instance::open(&bucket).await;
    let one = Instance::open(&bucket).await;
    let object = one.upload(11).await.unwrap();
    tokio::time::sleep(2 * GRACE).await;
    let collecting = tokio::spawn({
        let names = other.names.clone();
        async move { names.collect_segments().await.unwrap() }
    });
    // The put arrives shortly before the round ends, and nobody learns of it.
    tokio::time::sleep(GRACE / 8).await;
    one.names.record("n".into()).await.unwrap();
    one.desk.change(Weather { silent: 1000, late: 0, ..Weather::default() });
    let commit = one.names.commit(object.named("n", 11));
    drop(object);
    let lost = commit.await;
    one.desk.change(Weather::default());
    assert!(lost.is_err());
    let collected = collecting.await.unwrap();
    assert_eq!((collected.candidates, collected.deleted), (1, 0));
    let found = other.find("n").await.unwrap().unwrap();
    other.check(&found).await.unwrap();
    drop(found);
    one.close().await;
    other.close().await;
}

/// Excluded: a put that was given up arrives once what it leads to was deleted. Whenever it arrives
/// and whenever the instance answers.
#[tokio::test(start_paused = true)]
async fn segments_of_puts_that_may_arrive_stay() {
    let mut arrived = 0;
    for nth in 0..3000 {
        let bucket = Bucket::new();
        let other = Instance::open(&bucket).await;
        let desk = bucket.desk(SmallRng::seed_from_u64(nth), Weather::default());
        let once = RemoteOptions { tries: 1, ..options() };
        let one = Instance::open_with(desk, once).await.unwrap();
        let object = one.upload(11).await.unwrap();
        tokio::time::sleep(2 * GRACE).await;
        let collecting = tokio::spawn({
            let names = other.names.clone();
            async move { names.collect_segments().await.unwrap() }
        });
        tokio::time::sleep(GRACE / 500 * (nth as u32 % 125)).await;
        one.names.record("n".into()).await.unwrap();
        let late = options().request_timeout + GRACE / 2;
        let late = late.as_millis() as u64;
        one.desk.change(Weather { silent: 1000, late, of_names: true, ..Weather::default() });
        let commit = one.names.commit(object.named("n", 11));
        drop(object);
        commit.await.unwrap_err();
        let before = bucket.generations("n").len();
        collecting.await.unwrap();
        tokio::time::sleep(GRACE).await;
        if let Some(found) = other.find("n").await.unwrap() {
            other.check(&found).await.unwrap();
            arrived += 1 - before;
        }
        one.desk.crash();
        other.desk.crash();
    }
    assert!(arrived > 100, "{arrived} puts arrived after their commit had ended");
}

#[tokio::test(start_paused = true)]
async fn collector_that_died_leaves_no_round_for_good() {
    let bucket = Bucket::new();
    let one = Instance::open(&bucket).await;
    let unnamed = one.upload(12).await.unwrap();
    let dying = Instance::open(&bucket).await;
    tokio::time::sleep(2 * GRACE).await;
    let collecting = tokio::spawn({
        let names = dying.names.clone();
        async move { names.collect_segments().await }
    });
    tokio::time::sleep(GRACE / 8).await;
    assert_eq!(count(&bucket, |path| path.contains("/rounds/")), 1);
    dying.desk.crash();
    collecting.abort();
    assert_eq!(deleted_by(&one).await, 0);
    assert_eq!(count(&bucket, |path| path.contains("/rounds/")), 1, "it may run still");
    tokio::time::sleep(GRACE * 20).await;
    assert_eq!(deleted_by(&one).await, 0);
    assert_eq!(count(&bucket, |path| path.contains("/rounds/")), 0);
    one.check(&unnamed).await.unwrap();
    drop(unnamed);
    one.close().await;
}

/// Excluded: a name that cannot be read counts as one that leads nowhere.
#[tokio::test(start_paused = true)]
async fn nothing_is_deleted_past_a_damaged_name() {
    let bucket = Bucket::new();
    let one = Instance::open(&bucket).await;
    drop(one.put("n", 11).await);
    let path = bucket.paths().into_iter().find(|path| path.contains("/names/")).unwrap();
    let store: &dyn ObjectStore = &*one.desk;
    let damaged = object_store::PutPayload::from("not what was put");
    object_store::ObjectStoreExt::put(store, &path.as_str().into(), damaged).await.unwrap();
    tokio::time::sleep(2 * GRACE).await;
    let refused = one.names.collect_segments().await;
    assert!(matches!(refused, Err(VirtualMemoryError::Damaged { .. })), "{refused:?}");
    assert_eq!(segments(&bucket), 1);
    one.close().await;
}

#[tokio::test(start_paused = true)]
async fn close_ends_a_collection() {
    let bucket = Bucket::new();
    let one = Instance::open(&bucket).await;
    let unnamed = one.upload(12).await.unwrap();
    tokio::time::sleep(2 * GRACE).await;
    let collecting = one.names.collect_segments();
    let closing = async {
        tokio::time::sleep(GRACE / 8).await;
        let began = tokio::time::Instant::now();
        one.names.close().await.unwrap();
        began.elapsed()
    };
    let (collected, waited) = futures::join!(collecting, closing);
    assert!(matches!(collected, Err(VirtualMemoryError::Closed)), "{collected:?}");
    assert!(waited < GRACE / 8, "{waited:?}");
    drop(unnamed);
    one.tier.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn instance_that_is_to_collect_does_so_by_itself() {
    let bucket = Bucket::new();
    let desk = bucket.desk(SmallRng::seed_from_u64(1), Weather::default());
    let collects = RemoteOptions { collect: Some(2 * GRACE), ..options() };
    let one = Instance::open_with(desk, collects).await.unwrap();
    let other = Instance::open(&bucket).await;
    for version in 10..20 {
        drop(other.put("n", version).await);
    }
    let killed = Instance::open(&bucket).await;
    killed.upload(12).await.unwrap();
    killed.desk.crash();
    tokio::time::sleep(40 * GRACE).await;
    assert_eq!(segments(&bucket), 1);
    assert_eq!(count(&bucket, |path| path.contains("/names/")), 1);
    let found = other.find("n").await.unwrap().unwrap();
    other.check(&found).await.unwrap();
    drop(found);
    one.close().await;
    other.close().await;
}
