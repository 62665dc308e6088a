//! How one read differs from the usual one.
//!
//! Invariant: the default options are those of `VirtualMemory::read`. Called by users.

use std::ops::Range;
use std::time::Duration;

/// Options of `VirtualMemory::read_with`.
///
/// ```
/// use std::time::Duration;
/// use vmem::{ReadClass, ReadOptions};
///
/// let options = ReadOptions::new()
///     .range(0..4096)
///     .class(ReadClass::Background)
///     .timeout(Duration::from_secs(1))
///     .promote(false);
/// # let _ = options;
/// ```
#[derive(Clone, Debug, Default)]
pub struct ReadOptions {
    pub(crate) range: Option<Range<usize>>,
    pub(crate) class: ReadClass,
    pub(crate) timeout: Option<Duration>,
    pub(crate) promote: Option<bool>,
    pub(crate) copy_small: Option<usize>,
}

/// How urgent a read is.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadClass {
    /// A caller waits for it.
    #[default]
    Demand,
    /// It gives way to demand, and evicts nothing that is in use.
    Background,
}

impl ReadOptions {
    /// The options of an ordinary read.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only these bytes of the object. Default: all.
    pub fn range(mut self, range: Range<usize>) -> Self {
        self.range = Some(range);
        self
    }

    /// How urgent it is. Default: [`ReadClass::Demand`].
    pub fn class(mut self, class: ReadClass) -> Self {
        self.class = class;
        self
    }

    /// How long to wait for space. Default: the store's `wait_timeout`.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Whether the read promotes the object. Default: as the store's `promotion` says.
    pub fn promote(mut self, promote: bool) -> Self {
        self.promote = Some(promote);
        self
    }

    /// The largest part, in bytes, that is copied rather than held, so that it keeps no more than
    /// itself in memory. Default: an eighth of the object, at most 4 KiB.
    pub fn copy_small(mut self, bytes: usize) -> Self {
        self.copy_small = Some(bytes);
        self
    }
}
