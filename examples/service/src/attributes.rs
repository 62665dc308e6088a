//! What is kept with the bytes of an object: how they are to be read, and what its user says of it.
//!
//! Invariant: it is committed with the bytes, in the metadata of the name, and read as one version
//! with them. Called by the handlers.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use axum::http::header::{
    CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_TYPE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use headers::{ETag, HeaderMapExt, LastModified};
use mime::Mime;
use serde::{Deserialize, Serialize};
use vmem::NamedEntry;

use crate::error::{ApiError, metadata_too_large};

/// What begins the headers that a client keeps with an object.
pub(crate) const META_PREFIX: &str = "x-object-meta-";
/// Other headers that are kept as they are sent. Without the coding a client takes what was
/// compressed for the object itself.
const KEPT: [HeaderName; 4] =
    [CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LANGUAGE];
/// What the store keeps beside a name, in bytes.
const METADATA_LEN_MAX: usize = 4096;

/// Content type and metadata of an object.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
pub(crate) struct Attributes {
    /// The content type, as it was sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content_type: Option<String>,
    /// The headers of `KEPT`, in lower case.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) headers: BTreeMap<String, String>,
    /// The headers `x-object-meta-*`, without that.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) metadata: BTreeMap<String, String>,
}

impl Attributes {
    /// Those that a request brings.
    ///
    /// # Errors
    ///
    /// 400 for what no response could carry, 431 if they are too long.
    pub(crate) fn of_request(headers: &HeaderMap) -> Result<Attributes, ApiError> {
        let mut attributes = Attributes::default();
        if let Some(value) = headers.get(CONTENT_TYPE) {
            let text = value.to_str().ok().filter(|text| text.parse::<Mime>().is_ok());
            let why = "Content-Type is a type and a subtype, such as text/plain";
            let text = text.ok_or_else(|| ApiError::bad_request("invalid_content_type", why))?;
            attributes.content_type = Some(text.to_owned());
        }
        for (name, value) in headers {
            let (kept, key) = match name.as_str().strip_prefix(META_PREFIX) {
                Some(key) => (&mut attributes.metadata, key),
                None if KEPT.contains(name) => (&mut attributes.headers, name.as_str()),
                None => continue,
            };
            let invalid = |why| Err(ApiError::bad_request("invalid_metadata", why));
            let Ok(value) = value.to_str() else {
                return invalid(format!("{name} is not of visible ASCII characters"));
            };
            match kept.entry(key.to_owned()) {
                Entry::Vacant(free) => drop(free.insert(value.to_owned())),
                // Lines of a list are one list.
                Entry::Occupied(mut list) if KEPT.contains(name) => {
                    list.get_mut().extend([", ", value]);
                }
                Entry::Occupied(_) => return invalid(format!("{name} is given twice")),
            }
        }
        if attributes.to_bytes().len() > METADATA_LEN_MAX {
            return Err(metadata_too_large());
        }
        Ok(attributes)
    }

    /// Those of an object. An object that another program named has none of ours.
    pub(crate) fn of_entry(entry: &NamedEntry) -> Attributes {
        serde_json::from_slice(&entry.metadata).unwrap_or_default()
    }

    /// As the store keeps them.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings are JSON")
    }

    /// Adds what a response without a body carries too.
    pub(crate) fn add_caching(&self, headers: &mut HeaderMap) {
        let value = self.headers.get(CACHE_CONTROL.as_str());
        let value = value.and_then(|value| HeaderValue::try_from(value).ok());
        headers.extend(value.map(|value| (CACHE_CONTROL, value)));
    }

    /// Adds what a response carries.
    pub(crate) fn add_to(&self, headers: &mut HeaderMap) {
        let kind = self.content_type.as_deref().unwrap_or("application/octet-stream");
        headers.extend(HeaderValue::try_from(kind).ok().map(|value| (CONTENT_TYPE, value)));
        let own = self.metadata.iter().map(|(name, value)| (format!("{META_PREFIX}{name}"), value));
        // Another program may have named the object: no other header is sent.
        let is_kept =
            |(name, _): &(&String, &String)| KEPT.iter().any(|kept| kept.as_str() == *name);
        let kept = self.headers.iter().filter(is_kept).map(|(name, value)| (name.clone(), value));
        for (name, value) in own.chain(kept) {
            let Ok(name) = HeaderName::try_from(name) else { continue };
            headers.extend(HeaderValue::try_from(value).ok().map(|value| (name, value)));
        }
    }
}

/// The strong validator of an entry: its version, which no other state of any name has.
pub(crate) fn etag(entry: &NamedEntry) -> ETag {
    format!("\"{}\"", entry.version).parse().expect("a number in quotes is an ETag")
}

/// Adds the validators of an entry.
pub(crate) fn add_validators(entry: &NamedEntry, headers: &mut HeaderMap) {
    headers.typed_insert(etag(entry));
    headers.typed_insert(LastModified::from(entry.modified));
}
