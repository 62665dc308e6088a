//! Listings compared with a model: prefixes, delimiters, bounds, limits, pages.
//!
//! Invariant: the model computes a listing from all names, and knows nothing of how the store reads
//! them.

use std::collections::BTreeMap;

use futures::TryStreamExt;
use rand::Rng;
use rand::rngs::SmallRng;
use vmem::{ListOptions, Listed, MemoryTier::Disk, VirtualMemory};
use vmem_testkit::Seed;

use super::open;

/// The listing expected of these names.
fn model(names: &BTreeMap<String, u64>, options: &ListOptions) -> Vec<(String, Option<u64>)> {
    let mut items = BTreeMap::new();
    for (name, version) in names.iter().filter(|(name, _)| name.starts_with(&options.prefix)) {
        let rest = &name[options.prefix.len()..];
        let end = options.delimiter.as_ref().and_then(|d| rest.find(&**d).map(|at| at + d.len()));
        match end {
            Some(end) => items.insert(name[..options.prefix.len() + end].to_owned(), None),
            None => items.insert(name.clone(), Some(*version)),
        };
    }
    let behind = |key: &String| options.start_after.as_ref().is_none_or(|after| key > after);
    let items = items.into_iter().filter(|(key, _)| behind(key));
    items.take(options.limit.unwrap_or(usize::MAX)).collect()
}

async fn listing(vmem: &VirtualMemory, options: &ListOptions) -> Vec<(String, Option<u64>)> {
    let items = vmem.names_with(options.clone()).map_ok(|listed| match listed {
        Listed::Entry(entry) => (entry.name.to_string(), Some(entry.version)),
        Listed::Prefix(prefix) => (prefix.to_string(), None),
    });
    items.try_collect().await.unwrap()
}

fn random_key(rng: &mut SmallRng) -> String {
    const PARTS: [&str; 10] =
        ["a", "b", "/", "//", "-", "a/b/", "\u{10ffff}", "\u{e9}", "\0", "photos"];
    (0..rng.random_range(1..5)).map(|_| PARTS[rng.random_range(0..PARTS.len())]).collect()
}

#[test]
fn listings_equal_a_model_under_random_inserts_page_by_page() {
    Seed::run("listings", |seed| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let mut vmem = open(directory.path()).await;
            let mut names = BTreeMap::new();
            let mut rng = seed.rng();
            for round in 0..60 {
                for _ in 0..10 {
                    let name = random_key(&mut rng);
                    if names.contains_key(&name) {
                        vmem.remove_named(&name).await.unwrap();
                        names.remove(&name);
                        continue;
                    }
                    // Some objects are not flushed when they are listed.
                    if rng.random_bool(0.3) {
                        drop(vmem.allocate_named(&name, 10, Disk).await.unwrap());
                    } else {
                        drop(vmem.put_named(&name, &name, Disk).await.unwrap());
                    }
                    let version = vmem.entry(&name).await.unwrap().version;
                    names.insert(name, version);
                }
                for _ in 0..10 {
                    listed_as_modelled(&vmem, &names, &mut rng).await;
                }
                if round % 20 == 19 {
                    vmem.flush_all().await.unwrap();
                    vmem.close().await.unwrap();
                    vmem = open(directory.path()).await;
                    for (name, version) in &mut names {
                        *version = vmem.entry(name).await.unwrap().version;
                    }
                }
            }
            vmem.close().await.unwrap();
        });
    });
}

/// One listing with random options, at once and in pages.
async fn listed_as_modelled(
    vmem: &VirtualMemory,
    names: &BTreeMap<String, u64>,
    rng: &mut SmallRng,
) {
    let mut options = ListOptions::new();
    if rng.random_bool(0.5) {
        options = options.prefix(random_key(rng));
    }
    if rng.random_bool(0.7) {
        options = options.delimiter(["/", "//", "a", "\u{10ffff}"][rng.random_range(0..4)]);
    }
    if rng.random_bool(0.5) {
        options = options.start_after(random_key(rng));
    }
    let all = model(names, &options);
    assert_eq!(listing(vmem, &options).await, all, "{options:?}");
    let mut page = options.clone().limit(rng.random_range(0..4));
    assert_eq!(listing(vmem, &page).await, model(names, &page), "{page:?}");
    page.limit = Some(rng.random_range(1..4));
    let mut paged = Vec::new();
    loop {
        let items = listing(vmem, &page).await;
        let Some((last, _)) = items.last() else { break };
        page.start_after = Some(last.clone());
        paged.extend(items);
        assert!(paged.len() <= all.len(), "in pages {paged:?}: {options:?}");
    }
    assert_eq!(paged, all, "in pages: {options:?}");
}
