//! What the machine offers, as found when the store opened.
//!
//! Invariant: each line is the outcome of a real operation, not of a guess. Filled in by the
//! facade.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::config::IoDriver;

/// What serves each tier, and why not something better.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// The driver of the disk tier, and what it found.
    pub disk: Arc<str>,
    /// Which driver serves; `None` for a backend of the caller.
    pub disk_driver: Option<IoDriver>,
    /// Whether the disk tier bypasses the page cache (`O_DIRECT`). If not, each write is followed
    /// by a sync, shared with others, before memory relies on it.
    pub disk_direct: bool,
    /// Whether staging memory is registered with the driver, which then moves large pieces through
    /// it at less cost.
    pub staging_registered: bool,
    /// The better options that were refused, each with its cause.
    pub disk_notes: Vec<Arc<str>>,
    /// The directory of the store.
    pub disk_path: Option<PathBuf>,
    /// Whether that directory lies in memory (tmpfs): then the disk tier takes RAM that no budget
    /// here counts.
    pub disk_is_tmpfs: bool,
    /// What serves the tier below the disk, if there is one.
    pub remote: Option<Arc<str>>,
    /// What serves the VRAM tier.
    pub vram: Option<Arc<str>>,
    /// Every device, in words, by its number; `vram` is the first.
    pub devices: Vec<Arc<str>>,
    /// Why there is no VRAM tier, or in what it is not as good as it could be.
    pub vram_reason: Arc<str>,
}

impl Capabilities {
    /// The capabilities of a store over other backends: what serves the disk tier, and why there is
    /// no VRAM tier.
    pub fn new(disk: Arc<str>, vram_reason: Arc<str>) -> Self {
        Capabilities {
            disk,
            disk_driver: None,
            disk_direct: false,
            staging_registered: false,
            disk_notes: Vec::new(),
            disk_path: None,
            disk_is_tmpfs: false,
            remote: None,
            vram: None,
            devices: Vec::new(),
            vram_reason,
        }
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "disk: {}", self.disk)?;
        for note in &self.disk_notes {
            writeln!(f, "disk: unavailable: {note}")?;
        }
        if let Some(path) = &self.disk_path {
            writeln!(f, "directory: {}", path.display())?;
        }
        if self.disk_is_tmpfs {
            writeln!(f, "warning: the directory is a tmpfs; its files take memory, not disk")?;
        }
        if let Some(remote) = &self.remote {
            writeln!(f, "remote: {remote}")?;
        }
        match &self.vram {
            None => write!(f, "vram: none: {}", self.vram_reason),
            Some(vram) if self.vram_reason.is_empty() => write!(f, "vram: {vram}"),
            Some(vram) => write!(f, "vram: {vram} ({})", self.vram_reason),
        }
    }
}
