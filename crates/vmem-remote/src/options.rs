//! What a remote tier is opened with.
//!
//! Invariant: options that passed `check` let every request end, and let each segment be put.
//! Made by the facade's users, read by all modules.

use std::time::Duration;

use object_store::path::Path;

use crate::error::OpenError;

/// The capacity of a tier without one, in bytes: 1 EiB.
const BOUNDLESS: u64 = 1 << 60;

/// How a [`RemoteTier`](crate::RemoteTier) uses its object store.
///
/// ```
/// use vmem_remote::RemoteOptions;
///
/// let options = RemoteOptions { prefix: "spill".into(), ..RemoteOptions::default() };
/// assert_eq!(options.segment_bytes, 16 << 20);
/// ```
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    /// Where in the bucket the tier writes, as a path: each instance in a folder of its own below.
    /// Default: `vmem`.
    pub prefix: String,
    /// The most bytes that chunks may take, or none for no budget. Default: none. The bucket has
    /// more than that for a while: see [`compact_below`](Self::compact_below).
    pub capacity: Option<u64>,
    /// The most bytes of one object in the bucket, at least 64 KiB; a single write that is larger
    /// makes a larger one. Default: 16 MiB.
    pub segment_bytes: u64,
    /// From this many bytes on a segment is sent in parts of this size, several at once. S3 takes
    /// none below 5 MiB. Default: 8 MiB.
    pub part_bytes: u64,
    /// The most segments that are sent at once. Default: 4.
    pub puts: usize,
    /// The most bytes of memory, beside the budget of the store, for what waits to be put; what
    /// exceeds that waits in the store's staging memory, which all tiers need. Default: 64 MiB.
    pub buffer_bytes: u64,
    /// The most requests at once, at least one. Default: 64, as many as a store reads at once.
    pub requests: usize,
    /// Two ranges of a segment are read by one request if no more bytes than this lie between
    /// them. Default: 64 KiB.
    pub gap_bytes: u64,
    /// The most bytes that one request reads, at least 64 KiB. Default: 4 MiB.
    pub get_bytes: u64,
    /// How long a request may take before it is given up and made again. Default: 10 s.
    pub request_timeout: Duration,
    /// How long a request may take with everything that is tried again. Default: 30 s.
    pub total_timeout: Duration,
    /// How often a request is made before its failure is final, at least once. Default: 4.
    pub tries: u32,
    /// The pause before the second try; it doubles for each further one, and is shortened by up to
    /// a half at random. Default: 100 ms.
    pub backoff: Duration,
    /// After this many failures in a row, without a success between them, requests fail at once,
    /// until one that is let through succeeds. Default: 8.
    pub circuit_failures: u32,
    /// How long until a request is let through again; it doubles with each one that fails, up to
    /// eight times as long. Default: 2 s.
    pub circuit_pause: Duration,
    /// A segment of which less than this fraction is still in use is copied into a new one, and
    /// deleted. From 0, which is never, to below 1. Default: 0.5.
    pub compact_below: f64,
    /// The time within which everything that instances do in the bucket is taken to arrive there,
    /// and to be seen by the others. A generation of a name stays four times as long after another
    /// has superseded it; an instance that could not renew its lease for four times as long may be
    /// ended. At least four times [`total_timeout`](Self::total_timeout), and the same for all that
    /// share a bucket. Default: 15 minutes.
    pub grace: Duration,
    /// How long a store over a [`BucketCatalog`](crate::BucketCatalog) waits between two looks at
    /// the names that it has in memory: a name that another instance has changed is given up then,
    /// and the next call that opens it finds what it stands for. None: only a commit finds that
    /// out. At most half of [`grace`](Self::grace). Default: none.
    pub follow: Option<Duration>,
    /// How long, give or take a half, a store over a [`BucketCatalog`](crate::BucketCatalog) waits
    /// before it deletes, for all instances that share the bucket, what nobody needs any more, as
    /// [`collect`](crate::BucketCatalog::collect) and
    /// [`collect_segments`](crate::BucketCatalog::collect_segments) do. One instance is enough.
    /// Default: none, which is never.
    pub collect: Option<Duration>,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        RemoteOptions {
            prefix: "vmem".to_owned(),
            capacity: None,
            segment_bytes: 16 << 20,
            part_bytes: 8 << 20,
            puts: 4,
            buffer_bytes: 64 << 20,
            requests: 64,
            gap_bytes: 64 << 10,
            get_bytes: 4 << 20,
            request_timeout: Duration::from_secs(10),
            total_timeout: Duration::from_secs(30),
            tries: 4,
            backoff: Duration::from_millis(100),
            circuit_failures: 8,
            circuit_pause: Duration::from_secs(2),
            compact_below: 0.5,
            grace: Duration::from_secs(15 * 60),
            follow: None,
            collect: None,
        }
    }
}

impl RemoteOptions {
    /// The budget, in bytes.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.capacity.unwrap_or(BOUNDLESS)
    }

    /// What must be queued for another segment to be sent beside one in flight, in bytes.
    pub(crate) fn gather_bytes(&self) -> u64 {
        (self.segment_bytes / self.puts as u64).max(1)
    }

    /// The prefix as a path.
    pub(crate) fn prefix(&self) -> Result<Path, OpenError> {
        let expected = "a path without empty parts, `.` and `..`";
        let refused = |_| OpenError::InvalidOption { field: "prefix", expected };
        Path::parse(&self.prefix).map_err(refused)
    }

    /// The first field that cannot work.
    pub(crate) fn check(&self) -> Result<(), OpenError> {
        const CHUNK: u64 = vmem_core::backend::CHUNK_BYTES as u64;
        let rules = [
            ("capacity", self.capacity.is_none_or(|bytes| (1..=BOUNDLESS).contains(&bytes)), {
                "from 1 byte to 1 EiB, or none"
            }),
            ("segment_bytes", (CHUNK..=1 << 30).contains(&self.segment_bytes), {
                "from 64 KiB to 1 GiB"
            }),
            ("part_bytes", self.part_bytes >= CHUNK, "at least 64 KiB"),
            ("puts", (1..=1024).contains(&self.puts), "from 1 to 1,024"),
            ("requests", (1..=1024).contains(&self.requests), "from 1 to 1,024"),
            ("get_bytes", (CHUNK..=1 << 30).contains(&self.get_bytes), "from 64 KiB to 1 GiB"),
            ("request_timeout", !self.request_timeout.is_zero(), "more than nothing"),
            ("total_timeout", self.total_timeout >= self.request_timeout, {
                "at least the timeout of one request"
            }),
            ("tries", self.tries > 0, "at least 1"),
            ("circuit_failures", self.circuit_failures > 0, "at least 1"),
            ("circuit_pause", !self.circuit_pause.is_zero(), "more than nothing"),
            ("compact_below", (0.0..1.0).contains(&self.compact_below), "from 0 to below 1"),
            ("grace", !self.grace.is_zero() && self.grace / 4 >= self.total_timeout, {
                "at least four times the total timeout"
            }),
            ("collect", self.collect.is_none_or(|it| !it.is_zero()), "more than nothing, or none"),
            ("follow", self.follow.is_none_or(|it| !it.is_zero() && it <= self.grace / 2), {
                "more than nothing and at most half the grace, or none"
            }),
        ];
        match rules.into_iter().find(|(_, holds, _)| !holds) {
            Some((field, _, expected)) => Err(OpenError::InvalidOption { field, expected }),
            None => Ok(()),
        }
    }
}
