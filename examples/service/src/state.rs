//! What the handlers share.
//!
//! Invariant: a change of a name that depends on what the name stood for before runs alone where
//! the store cannot check that itself, which is a DELETE on a condition. Made by `server`.

use std::sync::Arc;

use axum::http::uri::Authority;
use tokio::sync::{RwLock, Semaphore, watch};
use vmem::VirtualMemory;

use crate::config::Limits;
use crate::error::ApiError;
use crate::limits::Clients;
use crate::list::LISTED_KIB;
use crate::metrics::SCRAPES_MAX;
use crate::pins::Pins;

/// What the handlers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) vmem: VirtualMemory,
    pub(crate) limits: Limits,
    /// Whether other machines reach it only through something on this one.
    pub(crate) is_loopback: bool,
    /// Names that it answers to besides those of this machine.
    names: Vec<String>,
    pub(crate) requests: Arc<Semaphore>,
    pub(crate) clients: Arc<Clients>,
    pub(crate) pins: Arc<Pins>,
    pub(crate) prefetches: Arc<Semaphore>,
    /// KiB of memory for short responses.
    pub(crate) copied: Arc<Semaphore>,
    /// KiB of memory for listings.
    pub(crate) listed: Arc<Semaphore>,
    /// Those that list.
    pub(crate) listers: Arc<Clients>,
    /// Commits read it, and a DELETE on a condition writes it.
    pub(crate) changes: Arc<RwLock<()>>,
    pub(crate) scrapes: Arc<Semaphore>,
    closing: watch::Sender<bool>,
}

/// As handlers get it.
pub(crate) type App = Arc<Shared>;

impl Shared {
    pub(crate) fn new(
        vmem: VirtualMemory,
        limits: Limits,
        is_loopback: bool,
        names: Vec<String>,
    ) -> App {
        Arc::new(Shared {
            requests: Arc::new(Semaphore::new(limits.max_requests)),
            clients: Arc::default(),
            pins: Arc::new(Pins::new(limits.max_pins)),
            prefetches: Arc::new(Semaphore::new(limits.max_prefetches)),
            changes: Arc::default(),
            copied: Arc::new(Semaphore::new((limits.max_copied / 1024) as usize)),
            listed: Arc::new(Semaphore::new(LISTED_KIB)),
            listers: Arc::default(),
            scrapes: Arc::new(Semaphore::new(SCRAPES_MAX)),
            closing: watch::Sender::new(false),
            is_loopback,
            names,
            vmem,
            limits,
        })
    }

    /// Whether the configuration has this name, which may have a port.
    pub(crate) fn is_own_name(&self, host: &str) -> bool {
        let Ok(host) = host.parse::<Authority>() else { return false };
        self.names.iter().any(|own| own.eq_ignore_ascii_case(host.host()))
    }

    /// Whether the configuration says what it is called.
    pub(crate) fn has_names(&self) -> bool {
        !self.names.is_empty()
    }

    /// From now on the service is not ready.
    pub(crate) fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Whether the service is about to end.
    pub(crate) fn is_closing(&self) -> bool {
        *self.closing.borrow()
    }

    /// Changes once, when the service is about to end.
    pub(crate) fn closing(&self) -> watch::Receiver<bool> {
        self.closing.subscribe()
    }

    /// # Errors
    ///
    /// 503 once the service is about to end.
    pub(crate) fn check_open(&self) -> Result<(), ApiError> {
        if self.is_closing() {
            return Err(ApiError::unavailable("closing", "the service is shutting down"));
        }
        Ok(())
    }
}
