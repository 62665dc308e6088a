//! Tasks with names that tokio-console shows.
//!
//! Invariant: a name costs nothing where the console is not compiled in. Called wherever a task is
//! started.

use std::future::Future;

use tokio::runtime::Handle;

/// Spawns a task with a name that tokio-console shows.
pub(crate) fn spawn_named<F>(runtime: &Handle, name: &str, future: F)
where
    F: Future<Output = ()> + Send + 'static,
{
    #[cfg(all(tokio_unstable, feature = "tokio-console"))]
    let spawned = tokio::task::Builder::new().name(name).spawn_on(future, runtime).map(drop);
    #[cfg(not(all(tokio_unstable, feature = "tokio-console")))]
    let spawned = {
        drop(runtime.spawn(future));
        Ok::<(), std::io::Error>(())
    };
    if let Err(error) = spawned {
        tracing::error!(target: "vmem::actor", name, %error, "not spawned");
    }
}
