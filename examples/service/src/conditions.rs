//! Conditions of a request: what HTTP calls preconditions, and ranges.
//!
//! Invariant: conditions are looked at in the order of RFC 9110, section 13.2.2, against one
//! version of the object. What is no valid range is no range, as section 14.2 has it. Called by the
//! handlers.

use std::ops::Range;

use axum::http::HeaderMap;
use axum::http::header::{IF_MATCH, IF_NONE_MATCH, IF_RANGE, RANGE};
use headers::{
    ETag, HeaderMapExt, IfMatch, IfModifiedSince, IfNoneMatch, IfRange, IfUnmodifiedSince,
};
use vmem::{NamedEntry, PutMode};

use crate::attributes::etag;
use crate::error::ApiError;

/// What the conditions of a read say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Send,
    NotModified,
}

/// The header, if there is one and it is valid.
fn typed<H: headers::Header>(
    headers: &HeaderMap,
    name: &axum::http::HeaderName,
) -> Result<Option<H>, ApiError> {
    if !headers.contains_key(name) {
        return Ok(None);
    }
    let why = || ApiError::bad_request("invalid_condition", format!("{name} is not valid"));
    headers.typed_try_get::<H>().map_err(|_| why())
}

/// What a GET or HEAD of this entry is to do.
///
/// # Errors
///
/// 412; 400 for a header that cannot be read.
pub(crate) fn of_read(headers: &HeaderMap, entry: &NamedEntry) -> Result<Verdict, ApiError> {
    let tag = etag(entry);
    if let Some(wanted) = typed::<IfMatch>(headers, &IF_MATCH)? {
        if !wanted.precondition_passes(&tag) {
            return Err(ApiError::precondition("the object has another ETag"));
        }
    } else if let Some(since) = headers.typed_get::<IfUnmodifiedSince>()
        && !since.precondition_passes(entry.modified)
    {
        return Err(ApiError::precondition("the object was modified since"));
    }
    if let Some(known) = typed::<IfNoneMatch>(headers, &IF_NONE_MATCH)? {
        if !known.precondition_passes(&tag) {
            return Ok(Verdict::NotModified);
        }
    } else if let Some(since) = headers.typed_get::<IfModifiedSince>()
        && !since.is_modified(entry.modified)
    {
        return Ok(Verdict::NotModified);
    }
    Ok(Verdict::Send)
}

/// The condition of a PUT or DELETE, as the store checks it in one step with the change. `current`
/// is what has the name when the request comes.
///
/// # Errors
///
/// 412 if it does not hold already; 400.
pub(crate) fn of_write(
    headers: &HeaderMap,
    current: Option<&NamedEntry>,
) -> Result<PutMode, ApiError> {
    let wanted = typed::<IfMatch>(headers, &IF_MATCH)?;
    let refused = typed::<IfNoneMatch>(headers, &IF_NONE_MATCH)?;
    // An ETag goes before a date, and what is no date is no condition.
    let since = headers.typed_get::<IfUnmodifiedSince>().filter(|_| wanted.is_none());
    if wanted.is_none() && refused.is_none() && since.is_none() {
        return Ok(PutMode::Overwrite);
    }
    if let (Some(since), Some(entry)) = (since, current)
        && !since.precondition_passes(entry.modified)
    {
        return Err(ApiError::precondition("the object was modified since"));
    }
    let tag = current.map(etag);
    let matches = |tag: &ETag| wanted.as_ref().is_none_or(|wanted| wanted.precondition_passes(tag));
    let differs =
        |tag: &ETag| refused.as_ref().is_none_or(|refused| refused.precondition_passes(tag));
    match (current, tag) {
        (Some(entry), Some(tag)) if matches(&tag) && differs(&tag) => {
            Ok(PutMode::Update(entry.version))
        }
        (Some(entry), _) => {
            let version = entry.version;
            Err(ApiError::precondition(format!("the object has the ETag \"{version}\"")))
        }
        (None, _) if wanted.is_some() => Err(ApiError::precondition("no object has this name")),
        (None, _) => Ok(PutMode::Create),
    }
}

/// The one range that is asked for; none for the whole object. Of several the whole is sent.
///
/// # Errors
///
/// 416.
pub(crate) fn range(
    headers: &HeaderMap,
    entry: &NamedEntry,
) -> Result<Option<Range<u64>>, ApiError> {
    let Some(text) = headers.get(RANGE).and_then(|value| value.to_str().ok()) else {
        return Ok(None);
    };
    if headers.contains_key(IF_RANGE) {
        // A date tells no two versions of one second apart: it is no validator for parts.
        let is_other = |known: IfRange| known.is_modified(Some(&etag(entry)), None);
        if headers.typed_get::<IfRange>().is_none_or(is_other) {
            return Ok(None);
        }
    }
    match parse_range(text, entry.len) {
        Parsed::Whole => Ok(None),
        Parsed::Part(range) => Ok(Some(range)),
        Parsed::Outside => Err(ApiError::range(entry.len)),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Parsed {
    /// There is no valid single range.
    Whole,
    Part(Range<u64>),
    Outside,
}

/// By hand: the crates at hand refuse a suffix that is longer than the object, which means all of
/// it.
fn parse_range(text: &str, len: u64) -> Parsed {
    let number = |text: &str| {
        let is_number = !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
        is_number.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let Some((unit, ranges)) = text.split_once('=') else { return Parsed::Whole };
    let Some((first, last)) = ranges.trim().split_once('-') else { return Parsed::Whole };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Parsed::Whole;
    }
    let range = match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(len),
        (Some(first), None) if last.is_empty() => first..len,
        (None, Some(suffix)) if first.is_empty() => len.saturating_sub(suffix)..len,
        _ => return Parsed::Whole,
    };
    if range.is_empty() { Parsed::Outside } else { Parsed::Part(range) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_the_standard() {
        let of = |text| parse_range(text, 10);
        assert_eq!(of("bytes=0-3"), Parsed::Part(0..4));
        assert_eq!(of("bytes=7-"), Parsed::Part(7..10));
        assert_eq!(of("bytes=-3"), Parsed::Part(7..10));
        assert_eq!(of("bytes=-30"), Parsed::Part(0..10));
        assert_eq!(of("Bytes=9-99999999999999999999999"), Parsed::Part(9..10));
        for outside in ["bytes=10-", "bytes=10-11", "bytes=-0"] {
            assert_eq!(of(outside), Parsed::Outside, "{outside}");
        }
        for whole in [
            "bytes=3-2",
            "bytes=0-1,3-4",
            "lines=0-1",
            "bytes=",
            "bytes=-",
            "bytes=a-b",
            "bytes=+1-2",
            "0-1",
        ] {
            assert_eq!(of(whole), Parsed::Whole, "{whole}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Parsed::Outside);
    }
}
