//! Bodies that are not what was written, or of another format: errors of that name alone.

use std::ops::Bound;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use vmem_core::VirtualMemoryError;
use vmem_core::backend::{Catalog, crc32c};

use super::{World, object, put, remove, version};

/// The path of a generation of the name `n`.
fn path(generation: u64) -> Path {
    Path::from(format!("vmem/names/6e/{generation:016x}"))
}

/// The body of a generation of `n`, with its checksum made again after this change.
async fn resealed(world: &World, generation: u64, change: impl Fn(&mut Vec<u8>)) -> Bytes {
    let mut body = stored(world, generation).await.to_vec();
    body.truncate(body.len() - 4);
    change(&mut body);
    let key = [&1_u32.to_le_bytes()[..], b"n", &generation.to_le_bytes()].concat();
    let sum = crc32c(&[&key[..], &body].concat());
    body.extend_from_slice(&sum.to_le_bytes());
    body.into()
}

async fn stored(world: &World, generation: u64) -> Bytes {
    world.store.get(&path(generation)).await.unwrap().bytes().await.unwrap()
}

/// Everything in the bucket.
async fn all(world: &World) -> Vec<(Path, Bytes)> {
    let listed: Vec<_> = world.store.list(None).try_collect().await.unwrap();
    let mut all = Vec::new();
    for meta in listed {
        let body = world.store.get(&meta.location).await.unwrap().bytes().await.unwrap();
        all.push((meta.location, body));
    }
    all
}

/// Two versions of `n`, the second of which is replaced by what `change` makes of it.
async fn spoiled(change: impl AsyncFnOnce(&World) -> Bytes) -> World {
    let world = World::new();
    let writer = world.open().await;
    for number in [10, 11] {
        writer.commit(put("n", &object(1, number, 2))).await.unwrap();
    }
    writer.commit(put("other", &object(2, 20, 1))).await.unwrap();
    let body = change(&world).await;
    world.store.put(&path(2), body.into()).await.unwrap();
    world
}

fn is_damage(error: &VirtualMemoryError) -> bool {
    let VirtualMemoryError::Damaged { path: at, .. } = error else { return false };
    at.to_str() == Some(path(2).as_ref())
}

fn is_unknown_format(error: &VirtualMemoryError) -> bool {
    let VirtualMemoryError::UnknownFormat { path: at, found: 2, known: 1 } = error else {
        return false;
    };
    at.to_str() == Some(path(2).as_ref())
}

/// All calls about `n` fail so, those about the other name succeed, and nothing is put.
async fn concerns_one_name(world: &World, is_expected: fn(&VirtualMemoryError) -> bool) {
    let before = all(world).await;
    let catalog = world.open().await;
    let errors = [
        catalog.find("n".into()).await.unwrap_err(),
        catalog.record("n".into()).await.unwrap_err(),
        catalog.commit(put("n", &object(1, 12, 2))).await.unwrap_err(),
        catalog.commit(remove("n")).await.unwrap_err(),
        catalog.names("n".into(), Bound::Unbounded, 9).await.unwrap_err(),
    ];
    for error in &errors {
        assert!(is_expected(error), "{error:?}");
    }
    assert!(!catalog.is_shut());
    assert!(all(world).await == before, "nothing was overwritten");
    assert_eq!(version(&catalog, "other").await, Some(20));
    catalog.commit(put("other", &object(2, 21, 1))).await.unwrap();
    let page = catalog.names("o".into(), Bound::Unbounded, 9).await.unwrap();
    assert_eq!(page.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn flipped_bit_is_damage_of_its_name() {
    let world = spoiled(async |world: &World| {
        let mut body = stored(world, 2).await.to_vec();
        let half = body.len() / 2;
        body[half] ^= 1;
        body.into()
    });
    concerns_one_name(&world.await, is_damage).await;
}

#[tokio::test(start_paused = true)]
async fn body_of_another_generation_is_damage() {
    let world = spoiled(async |world: &World| stored(world, 1).await);
    concerns_one_name(&world.await, is_damage).await;
}

#[tokio::test(start_paused = true)]
async fn empty_body_is_damage_of_its_name() {
    concerns_one_name(&spoiled(async |_: &World| Bytes::new()).await, is_damage).await;
}

#[tokio::test(start_paused = true)]
async fn later_format_is_an_error_of_its_own() {
    let world = spoiled(async |world: &World| resealed(world, 2, |body| body[8] = 2).await);
    concerns_one_name(&world.await, is_unknown_format).await;
}

#[tokio::test(start_paused = true)]
async fn writer_that_loses_to_a_later_format_knows_that_it_lost() {
    let world = World::new();
    let writer = world.open().await;
    writer.commit(put("n", &object(1, 10, 2))).await.unwrap();
    // Another process, of a later format.
    let mut body = stored(&world, 1).await.to_vec();
    body[8] = 2;
    let end = body.len() - 4;
    let sum = crc32c(&[&[1, 0, 0, 0, b'n', 2, 0, 0, 0, 0, 0, 0, 0][..], &body[..end]].concat());
    body[end..].copy_from_slice(&sum.to_le_bytes());
    world.store.put(&path(2), body.into()).await.unwrap();
    let lost = writer.commit(put("n", &object(1, 11, 2))).await.unwrap_err();
    assert!(is_unknown_format(&lost), "{lost:?}");
    assert!(!writer.is_shut(), "it has written no such format");
}

#[tokio::test(start_paused = true)]
async fn writer_that_meets_damage_does_not_know_whose_it_is() {
    let world = World::new();
    let writer = world.open().await;
    writer.commit(put("n", &object(1, 10, 2))).await.unwrap();
    world.store.put(&path(2), Bytes::from_static(b"damage").into()).await.unwrap();
    let lost = writer.commit(put("n", &object(1, 11, 2))).await.unwrap_err();
    assert!(is_damage(&lost), "{lost:?}");
    assert!(writer.is_shut());
    assert_eq!(stored(&world, 2).await, "damage");
}

#[tokio::test(start_paused = true)]
async fn objects_of_others_among_the_names_are_none() {
    let world = World::new();
    let catalog = world.open().await;
    catalog.commit(put("n", &object(1, 10, 2))).await.unwrap();
    for foreign in ["vmem/names/README", "vmem/names/6e/x", "vmem/names/zz/0000000000000001"] {
        world.store.put(&Path::from(foreign), Bytes::from_static(b"x").into()).await.unwrap();
    }
    assert_eq!(version(&catalog, "n").await, Some(10));
    assert_eq!(catalog.names("".into(), Bound::Unbounded, 9).await.unwrap().len(), 1);
    catalog.collect().await.unwrap();
    assert_eq!(all(&world).await.len(), 4);
}
