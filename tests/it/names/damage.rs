//! Damage of a store at rest: flipped bits in every structure of its directory, and files that are
//! cut, missing, or another store's.
//!
//! Invariant: damage is reported by a typed error or does no harm; nothing panics through,
//! no name vanishes silently, and no read gives other bytes. A sample of the bits by default;
//! `VMEM_FLIPS=100000 cargo test --release --test it names::damage -- --nocapture` for more.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use futures::executor::block_on;
use rand::Rng;
use rand::rngs::SmallRng;
use vmem::backend::Catalog;
use vmem::{MemoryTier, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};
use vmem_io::catalog::NameCatalog;
use vmem_io::{CATALOG_FILE, DATA_FILE, LOCK_FILE};
use vmem_testkit::tape::Image;
use vmem_testkit::{Seed, Tape, TapeStorage, driver_under_test};

use crate::support::process::alone;

/// Name to bytes and metadata.
type Contents = BTreeMap<String, (Bytes, Bytes)>;

async fn open(directory: &Path) -> Result<VirtualMemory, VirtualMemoryError> {
    let config = VirtualMemoryConfig::builder()
        .disk_path(directory)
        .host_capacity(2 << 20)
        .disk_capacity(32 << 20)
        .io_driver(driver_under_test());
    vmem::open(config.build().unwrap()).await
}

/// A store with some names, with one that was removed and one that was moved over another; closed,
/// or as a crash leaves it.
async fn made(directory: &Path, crashed: bool) -> Contents {
    let place = tempfile::tempdir().unwrap();
    let home = if crashed { place.path() } else { directory };
    let vmem = open(home).await.unwrap();
    let mut contents = Contents::new();
    for n in 0..24_u32 {
        let name = format!("shelf {}/object {n}", n % 4);
        let len = [0, 1, 500, 4096, 66_000, 140_000][n as usize % 6];
        let bytes: Vec<u8> = (0..len).map(|at: u32| (at / 3 + n * 17) as u8).collect();
        vmem.put_named(&name, &bytes, MemoryTier::Disk).await.unwrap();
        let metadata = vec![n as u8; n as usize * 3];
        vmem.set_metadata(&name, &metadata).await.unwrap();
        contents.insert(name, (bytes.into(), metadata.into()));
    }
    let gone = "shelf 1/object 5";
    vmem.remove_named(gone).await.unwrap();
    contents.remove(gone);
    vmem.rename_named("shelf 2/object 2", "shelf 3/object 3").await.unwrap();
    let moved = contents.remove("shelf 2/object 2").unwrap();
    contents.insert("shelf 3/object 3".to_owned(), moved);
    if crashed {
        copy(home, directory);
    }
    vmem.close().await.unwrap();
    contents
}

fn copy(from: &Path, to: &Path) {
    for file in [CATALOG_FILE, DATA_FILE, LOCK_FILE] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

fn flips(default: usize) -> usize {
    std::env::var("VMEM_FLIPS").map_or(default, |text| text.parse().unwrap())
}

/// A bit of these bytes; mostly one of a byte that is not zero.
fn flip(bytes: &mut [u8], rng: &mut SmallRng) -> String {
    let mut at = rng.random_range(0..bytes.len());
    if rng.random_bool(0.8) {
        let used = |from: usize| bytes[from..].iter().position(|&byte| byte != 0);
        at = used(at).map_or(at, |further| at + further);
    }
    let bit = rng.random_range(0..8);
    bytes[at] ^= 1 << bit;
    format!("bit {bit} of byte {at}")
}

/// What a catalog says of its names, without the data.
fn rows(catalog: Vec<u8>) -> Result<String, VirtualMemoryError> {
    let tape = Tape::of(Image { data: Vec::new(), catalog });
    let (catalog, taken) = NameCatalog::over(Arc::new(TapeStorage(tape)), 512)?;
    let mut rows = format!("{taken:?}");
    for (name, record) in block_on(catalog.names("".into(), Bound::Unbounded, 1000))? {
        let object = block_on(catalog.find(name.clone()))?;
        rows += &format!("{name} {record:?} {object:?}");
    }
    Ok(rows)
}

#[test]
fn every_flipped_bit_of_the_catalog_is_seen_or_harmless() {
    // The panic hook is that of the process.
    let test = "every_flipped_bit_of_the_catalog_is_seen_or_harmless";
    alone(module_path!(), test, flip_bits_of_the_catalog);
}

fn flip_bits_of_the_catalog() {
    Seed::run("flips of the catalog", |seed| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        // redb gives up on some files by a panic, which the catalog makes an error of.
        std::panic::set_hook(Box::new(|info| {
            let ours = info.location().is_some_and(|at| at.file().contains("damage.rs"));
            if ours || !info.to_string().contains("redb") {
                eprintln!("{info}");
            }
        }));
        for crashed in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            runtime.block_on(made(directory.path(), crashed));
            let good = fs::read(directory.path().join(CATALOG_FILE)).unwrap();
            let expected = rows(good.clone()).unwrap();
            let mut rng = seed.fork_nth("flips", u64::from(crashed)).rng();
            let mut seen = 0;
            let mut harmless = 0;
            for _ in 0..flips(700) {
                let mut bytes = good.clone();
                let what = flip(&mut bytes, &mut rng);
                match rows(bytes) {
                    Ok(found) => {
                        assert!(found == expected, "{what} gives other rows");
                        harmless += 1;
                    }
                    Err(
                        VirtualMemoryError::Damaged { .. }
                        | VirtualMemoryError::UnknownFormat { .. },
                    ) => seen += 1,
                    Err(error) => panic!("{what}: {error:?}"),
                }
            }
            println!("catalog, crashed {crashed}: {seen} seen, {harmless} harmless");
            assert!(seen > 0);
        }
    });
}

/// Reads everything that opens; what does not open is a typed error. Whether all was right.
async fn read_all(directory: &Path, contents: &Contents, what: &str) -> bool {
    let vmem = match open(directory).await {
        Ok(vmem) => vmem,
        Err(
            VirtualMemoryError::Damaged { .. }
            | VirtualMemoryError::UnknownFormat { .. }
            | VirtualMemoryError::InvalidConfig { .. },
        ) => return false,
        Err(error) => panic!("{what}: {error:?}"),
    };
    let entries: Vec<_> = vmem.names("").try_collect().await.unwrap();
    let names: Vec<_> = entries.iter().map(|entry| &*entry.name).collect();
    assert!(names.iter().copied().eq(contents.keys()), "{what}: other names");
    let mut right = true;
    for entry in &entries {
        let (bytes, metadata) = &contents[&*entry.name];
        assert_eq!(&entry.metadata, metadata, "{what}: {}", entry.name);
        let handle = vmem.open_named(&entry.name).await.unwrap();
        match vmem.read(&handle).await {
            Ok(read) => assert!(read == bytes, "{what}: other bytes in {}", entry.name),
            Err(VirtualMemoryError::Corrupt { .. }) => right = false,
            Err(VirtualMemoryError::Io { source, .. }) => {
                assert_eq!(source.kind(), std::io::ErrorKind::UnexpectedEof, "{what}");
                right = false;
            }
            Err(error) => panic!("{what}: {error:?}"),
        }
    }
    vmem.close().await.unwrap();
    right
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flipped_bits_of_every_file() {
    let seed = Seed::from_env_or(|| 23);
    let mut rng = seed.fork("files").rng();
    for crashed in [false, true] {
        let good = tempfile::tempdir().unwrap();
        let contents = made(good.path(), crashed).await;
        for file in [DATA_FILE, CATALOG_FILE, LOCK_FILE] {
            let mut seen = 0;
            let mut harmless = 0;
            for _ in 0..flips(25).min(500) {
                let place = tempfile::tempdir().unwrap();
                copy(good.path(), place.path());
                let path = place.path().join(file);
                let mut bytes = fs::read(&path).unwrap();
                let what = format!("{file}: {}, seed {}", flip(&mut bytes, &mut rng), seed.value());
                fs::write(&path, &bytes).unwrap();
                let verified = vmem_io::verify(place.path());
                let right = read_all(place.path(), &contents, &what).await;
                match verified {
                    Ok(verified) => {
                        assert_eq!(verified.damaged.is_empty(), right, "{what}: {verified:?}");
                        assert!(verified.damaged.len() <= 1, "{what}: {verified:?}");
                    }
                    Err(error) => assert!(!right, "{what}: {error:?}"),
                }
                if right { harmless += 1 } else { seen += 1 }
            }
            println!("{file}, crashed {crashed}: {seen} seen, {harmless} harmless");
        }
    }
}

/// What is done to the files of a store that lies in the folder given.
type Damage = Box<dyn Fn(&Path)>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_are_cut_missing_or_swapped() {
    let good = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let contents = made(good.path(), false).await;
    {
        let vmem = open(other.path()).await.unwrap();
        for n in 0..40 {
            vmem.put_named(&format!("{n}"), vec![n; 50_000], MemoryTier::Disk).await.unwrap();
        }
        vmem.close().await.unwrap();
    }
    let catalog_len = fs::metadata(good.path().join(CATALOG_FILE)).unwrap().len();
    let data_len = fs::metadata(good.path().join(DATA_FILE)).unwrap().len();
    let cut = |file: &'static str, len: u64| {
        move |place: &Path| {
            fs::File::options().write(true).open(place.join(file)).unwrap().set_len(len).unwrap();
        }
    };
    let mut damages: Vec<(String, Damage)> = vec![
        ("no data".into(), Box::new(|place| fs::remove_file(place.join(DATA_FILE)).unwrap())),
        ("no bytes of data".into(), Box::new(cut(DATA_FILE, 0))),
        ("half of the data".into(), Box::new(cut(DATA_FILE, data_len / 2))),
    ];
    for len in [0, 1, 100, 512, 4096, 4097, catalog_len / 2, catalog_len - 1] {
        damages.push((format!("{len} bytes of catalog"), Box::new(cut(CATALOG_FILE, len))));
    }
    let from = other.path().to_owned();
    damages.push((
        "the data of another store".into(),
        Box::new(move |place| {
            fs::copy(from.join(DATA_FILE), place.join(DATA_FILE)).unwrap();
        }),
    ));
    damages.push((
        "a catalog that is text".into(),
        Box::new(|place| fs::write(place.join(CATALOG_FILE), "x".repeat(10_000)).unwrap()),
    ));
    for (what, damage) in damages {
        let place = tempfile::tempdir().unwrap();
        copy(good.path(), place.path());
        damage(place.path());
        assert!(!read_all(place.path(), &contents, &what).await, "{what} went unseen");
        // A failed open leaves the files, from which some of the bytes may be saved.
        assert!(place.path().join(CATALOG_FILE).exists(), "{what}");
    }
}

/// A damaged catalog is refused with what can still be read of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_told_with_what_is_left() {
    let place = tempfile::tempdir().unwrap();
    made(place.path(), false).await;
    let path = place.path().join(CATALOG_FILE);
    let good = fs::read(&path).unwrap();
    let mut told = 0;
    for at in (0..good.len()).step_by(512) {
        let mut bytes = good.clone();
        bytes[at..at + 16].iter_mut().for_each(|byte| *byte ^= 0x55);
        fs::write(&path, bytes).unwrap();
        match open(place.path()).await {
            Err(VirtualMemoryError::Damaged { path: named, reason }) => {
                assert_eq!(named.file_name(), path.file_name());
                told += u32::from(reason.contains("can still be read"));
            }
            Ok(vmem) => vmem.close().await.unwrap(),
            Err(error) => panic!("{error:?}"),
        }
    }
    assert!(told > 0, "nothing was said of what is left");
}
