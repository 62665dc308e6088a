//! The suite of the catalog passes over redb and over the simulated one, and fails what is broken.

use std::ops::Bound;
use std::sync::Arc;
use std::time::SystemTime;

use redb::backends::InMemoryBackend;
use vmem_core::backend::{Answer, Catalog, CatalogChange, CatalogObject, CatalogRecord};
use vmem_io::catalog::NameCatalog;
use vmem_testkit::conformance::catalog;
use vmem_testkit::tape::Image;
use vmem_testkit::{Seed, SimCatalog, Tape, TapeStorage};

use crate::message_of;

#[test]
fn the_catalog_of_redb_passes() {
    Seed::run("the catalog of redb", |seed| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let memory = || Arc::new(InMemoryBackend::new());
            let make = async || Arc::new(NameCatalog::over(memory(), 512).unwrap().0);
            catalog::all(seed, make).await;
            let tape = Tape::of(Image::default());
            let over = |tape: &Arc<Tape>| {
                let storage = Arc::new(TapeStorage(tape.clone()));
                Arc::new(NameCatalog::over(storage, 512).unwrap().0)
            };
            let reopen = async || over(&Tape::of(tape.image()));
            catalog::survives_a_restart(over(&tape), reopen).await;
        });
    });
}

#[test]
fn the_simulated_catalog_passes() {
    Seed::simulate("the_simulated_catalog_passes", |seed| async move {
        catalog::all(seed, async || SimCatalog::new()).await;
        let first = SimCatalog::new();
        let reopen = {
            let first = first.clone();
            async move || first.reopened()
        };
        catalog::survives_a_restart(first, reopen).await;
    });
}

/// What is wrong with a catalog.
#[derive(Clone, Copy, Debug)]
enum Bug {
    /// A rename gives another version.
    RenameIsNew,
    /// A new record forgets where the chunks are.
    PutForgets,
    /// It stores whole seconds.
    ShortTime,
    /// The bound of a page is taken for one of what was listed.
    ListsTheBound,
    /// Numbers of versions are not counted.
    VersionsAgain,
}

#[derive(Debug)]
struct Broken(Arc<SimCatalog>, Bug);

impl Catalog for Broken {
    vmem_testkit::hand_on!(attempts, is_poisoned, is_shut, record, time, snapshot, close);

    fn commit(&self, mut changes: Vec<CatalogChange>) -> Answer<()> {
        let mut more = Vec::new();
        for change in &mut changes {
            match (self.1, change) {
                (Bug::PutForgets, CatalogChange::Put { record, .. }) => {
                    more.push(CatalogChange::Segment {
                        id: record.id,
                        segment: 0,
                        chunks: Vec::new(),
                    });
                }
                (Bug::ShortTime, CatalogChange::Put { record, .. }) => {
                    let since = record.modified.duration_since(SystemTime::UNIX_EPOCH);
                    let since = since.unwrap_or_default();
                    record.modified -= std::time::Duration::from_nanos(since.subsec_nanos().into());
                }
                _ => {}
            }
        }
        more.append(&mut changes);
        self.0.commit(more)
    }

    fn find(&self, name: Arc<str>) -> Answer<Option<CatalogObject>> {
        let renamed = matches!(self.1, Bug::RenameIsNew) && &*name == "to";
        let found = self.0.find(name);
        Box::pin(async move {
            let mut found = found.await?;
            if let Some(object) = found.as_mut().filter(|_| renamed) {
                object.record.version += 1;
            }
            Ok(found)
        })
    }

    fn names(
        &self,
        prefix: Arc<str>,
        from: Bound<Arc<str>>,
        limit: usize,
    ) -> Answer<Vec<(Arc<str>, CatalogRecord)>> {
        let from = match (self.1, from) {
            (Bug::ListsTheBound, Bound::Excluded(from)) => Bound::Included(from),
            (_, from) => from,
        };
        self.0.names(prefix, from, limit)
    }

    fn next_id(&self) -> u64 {
        match self.1 {
            Bug::VersionsAgain => self.0.next_id() - 1,
            _ => self.0.next_id(),
        }
    }
}

#[test]
fn every_planted_bug_of_a_catalog_fails() {
    let bugs = [
        (Bug::RenameIsNew, "the object of \"to\""),
        (Bug::PutForgets, "the object of \"a\""),
        (Bug::ShortTime, "the object of \"a\""),
        (Bug::ListsTheBound, "from Excluded"),
        (Bug::VersionsAgain, "was used"),
    ];
    for (bug, symptom) in bugs {
        let message = message_of(|| {
            Seed::simulate("every_planted_bug_of_a_catalog", |seed| async move {
                catalog::all(seed, async || Arc::new(Broken(SimCatalog::new(), bug))).await;
            });
        });
        assert!(message.contains(symptom), "{bug:?}: {message}");
    }
}
