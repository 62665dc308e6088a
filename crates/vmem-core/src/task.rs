//! Tasks with names that tokio-console shows.
//!
//! Invariant: a name costs nothing where the console is not compiled in. Called wherever a task is
//! started, by backends too.

use std::future::Future;

use tokio::runtime::Handle;
use tokio::task::{JoinHandle, JoinSet};

/// Spawns a task with a name that tokio-console shows.
#[track_caller]
pub fn spawn_named<F>(runtime: &Handle, name: &str, future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    #[cfg(all(tokio_unstable, feature = "tokio-console"))]
    {
        let spawned = tokio::task::Builder::new().name(name).spawn_on(future, runtime);
        spawned.expect("invariant: tokio refuses threads alone")
    }
    #[cfg(not(all(tokio_unstable, feature = "tokio-console")))]
    {
        let _ = name;
        runtime.spawn(future)
    }
}

/// As `spawn_named`, into a set.
#[track_caller]
pub(crate) fn spawn_into<F>(tasks: &mut JoinSet<F::Output>, name: &str, future: F)
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    #[cfg(all(tokio_unstable, feature = "tokio-console"))]
    {
        let spawned = tasks.build_task().name(name).spawn(future);
        drop(spawned.expect("invariant: tokio refuses threads alone"));
    }
    #[cfg(not(all(tokio_unstable, feature = "tokio-console")))]
    {
        let _ = name;
        drop(tasks.spawn(future));
    }
}
