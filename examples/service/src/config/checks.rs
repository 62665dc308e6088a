//! What values a configuration may have.
//!
//! Invariant: what passes makes nothing that starts later panic or overflow: counts are those that
//! a semaphore has, times those that can be added to now. Called by `Config::check`.

use std::time::Duration;

use axum::http::Uri;
use axum::http::uri::{Authority, Scheme};

use super::{Config, ConfigError, Limits};

const ZERO: &str = "it has to be more than zero";
/// The largest count; a semaphore has more.
const COUNT_MAX: usize = 1 << 20;
const COUNT: &str = "it may be 1,048,576 at most";
/// The longest time: such a moment exists, and can be written as a date.
const TIME_MAX: Duration = Duration::from_secs(366 * 86_400);
const TIME: &str = "it may be a year at most";

/// # Errors
///
/// `Invalid` for the first field that cannot be used.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    let invalid = |field, reason| Err(ConfigError::Invalid { field, reason });
    for (field, count, may_be_zero) in counts(&config.limits) {
        if count == 0 && !may_be_zero {
            return invalid(field, ZERO);
        }
        if count > COUNT_MAX {
            return invalid(field, COUNT);
        }
    }
    for (field, time, may_be_zero) in times(config) {
        if time.is_zero() && !may_be_zero {
            return invalid(field, ZERO);
        }
        if time > TIME_MAX {
            return invalid(field, TIME);
        }
    }
    match others(config).into_iter().find(|(_, is_wrong, _)| *is_wrong) {
        Some((field, _, reason)) => invalid(field, reason),
        None => Ok(()),
    }
}

/// Each count, and whether it may be zero.
fn counts(limits: &Limits) -> [(&'static str, usize, bool); 7] {
    [
        ("limits.max_connections", limits.max_connections, false),
        ("limits.max_connections_per_client", limits.max_connections_per_client, true),
        ("limits.max_requests", limits.max_requests, false),
        ("limits.max_requests_per_client", limits.max_requests_per_client, true),
        ("limits.max_listed", limits.max_listed, false),
        ("limits.max_pins", limits.max_pins, true),
        ("limits.max_prefetches", limits.max_prefetches, true),
    ]
}

/// Each time, and whether it may be zero.
fn times(config: &Config) -> [(&'static str, Duration, bool); 9] {
    let limits = &config.limits;
    [
        ("limits.header_timeout", limits.header_timeout, false),
        ("limits.body_timeout", limits.body_timeout, false),
        ("limits.rate_grace", limits.rate_grace, false),
        ("limits.write_timeout", limits.write_timeout, false),
        ("limits.max_pin", limits.max_pin, false),
        ("limits.prefetch_timeout", limits.prefetch_timeout, false),
        ("limits.drain_timeout", limits.drain_timeout, true),
        ("limits.retry_after", limits.retry_after, true),
        ("otlp.timeout", config.otlp.timeout, false),
    ]
}

/// Each other field that can be wrong, whether it is, and why.
fn others(config: &Config) -> [(&'static str, bool, &'static str); 9] {
    let limits = &config.limits;
    let otlp = &config.otlp;
    [
        (
            "names",
            !config.names.iter().all(|name| is_name(name)),
            "each has to be a name without scheme, port and path",
        ),
        ("limits.max_object", limits.max_object == 0, ZERO),
        ("limits.max_headers", limits.max_headers < 8192, "it has to be 8 KiB at least"),
        ("limits.max_headers", limits.max_headers > 1 << 20, "it may be 1 MiB at most"),
        ("limits.max_copied", limits.max_copied > 1 << 40, "it may be 1 TiB at most"),
        (
            "otlp.endpoint",
            otlp.endpoint.as_deref().is_some_and(|text| !is_base(text)),
            "it has to be http://HOST:PORT, without TLS, credentials and a query",
        ),
        ("otlp.service_name", otlp.service_name.is_empty(), "it has to be a name"),
        (
            "otlp.sample_ratio",
            !(0.0..=1.0).contains(&otlp.sample_ratio),
            "it has to be between 0 and 1",
        ),
        (
            "store.disk_path",
            config.store.disk_path().is_none(),
            "it has to name a directory: without one, objects do not survive a restart",
        ),
    ]
}

/// Whether a Host header may say this, and no port.
fn is_name(text: &str) -> bool {
    let parsed = text.parse::<Authority>();
    parsed.is_ok_and(|authority| authority.host() == text && !text.is_empty())
}

/// Whether this is the address of a server that is spoken to without TLS.
fn is_base(text: &str) -> bool {
    let Ok(uri) = text.parse::<Uri>() else { return false };
    let host = uri.authority().filter(|authority| !authority.as_str().contains('@'));
    let is_plain = uri.scheme() == Some(&Scheme::HTTP) && uri.query().is_none();
    is_plain && !text.contains('#') && host.is_some_and(|host| !host.host().is_empty())
}
