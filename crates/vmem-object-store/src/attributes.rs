//! Attributes as metadata: what is stored beside the bytes of an object.
//!
//! Invariant: attributes read back as they were stored, and any metadata read as some attributes,
//! foreign ones as none. Called by `store.rs` and `upload.rs`.

use std::collections::BTreeMap;

use bytes::Bytes;
use object_store::{Attribute, Attributes};
use serde::{Deserialize, Serialize};
use vmem_core::backend::METADATA_LEN_MAX;

use crate::error::{RequestError, generic};

/// Attributes by name, in an order, so that equal ones are equal bytes.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    /// Those with a name of the protocol.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    attributes: BTreeMap<String, String>,
    /// Those with a name of the user.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
}

const NAMES: [(&str, Attribute); 6] = [
    ("cache-control", Attribute::CacheControl),
    ("content-disposition", Attribute::ContentDisposition),
    ("content-encoding", Attribute::ContentEncoding),
    ("content-language", Attribute::ContentLanguage),
    ("content-type", Attribute::ContentType),
    ("storage-class", Attribute::StorageClass),
];

/// The metadata that say so; empty for no attributes.
///
/// # Errors
///
/// `NotSupported` for an attribute that is none of those; `AttributesTooLong`.
pub(crate) fn to_metadata(attributes: &Attributes) -> object_store::Result<Bytes> {
    if attributes.is_empty() {
        return Ok(Bytes::new());
    }
    let mut stored = Stored::default();
    for (attribute, value) in attributes {
        let value = value.as_ref().to_owned();
        if let Attribute::Metadata(key) = attribute {
            stored.metadata.insert(key.clone().into_owned(), value);
            continue;
        }
        let known = NAMES.iter().find(|(_, known)| known == attribute);
        let (name, _) = known.ok_or_else(|| RequestError::UnknownAttribute {
            attribute: format!("{attribute:?}"),
        })?;
        stored.attributes.insert((*name).to_owned(), value);
    }
    let bytes = serde_json::to_vec(&stored).map_err(generic)?;
    let len = bytes.len();
    let max = METADATA_LEN_MAX;
    if len > max {
        return Err(RequestError::AttributesTooLong { len, max }.into());
    }
    Ok(bytes.into())
}

/// What the metadata say.
pub(crate) fn from_metadata(metadata: &[u8]) -> Attributes {
    let Ok(stored) = serde_json::from_slice::<Stored>(metadata) else { return Attributes::new() };
    let mut attributes = Attributes::new();
    for (name, value) in stored.attributes {
        let known = NAMES.iter().find(|(known, _)| *known == name);
        // A later version of this crate may know more of them.
        if let Some((_, attribute)) = known {
            attributes.insert(attribute.clone(), value.into());
        }
    }
    for (key, value) in stored.metadata {
        attributes.insert(Attribute::Metadata(key.into()), value.into());
    }
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_metadata(len: usize) -> Attributes {
        Attributes::from_iter([(Attribute::Metadata("k".into()), "v".repeat(len))])
    }

    #[test]
    fn attributes_read_back_as_they_were_stored() {
        let mut all: Attributes =
            NAMES.iter().map(|(name, attribute)| (attribute.clone(), *name)).collect();
        all.insert(Attribute::Metadata("content-type".into()), "\"\u{e9}\u{0}\n".into());
        let metadata = to_metadata(&all).unwrap();
        assert_eq!(from_metadata(&metadata), all);
        assert!(to_metadata(&Attributes::new()).unwrap().is_empty());
    }

    #[test]
    fn foreign_metadata_read_as_no_attributes() {
        for metadata in [&b""[..], b"draft", b"{\"metadata\":3}", b"{\"a\":\"b\"}", b"\xff\xfe"] {
            assert!(from_metadata(metadata).is_empty(), "{metadata:?}");
        }
        assert!(from_metadata(b"{\"attributes\":{\"of-tomorrow\":\"x\"}}").is_empty());
    }

    #[test]
    fn attributes_are_bounded_to_the_byte() {
        let overhead = to_metadata(&with_metadata(1)).unwrap().len() - 1;
        let most = METADATA_LEN_MAX - overhead;
        assert_eq!(to_metadata(&with_metadata(most)).unwrap().len(), METADATA_LEN_MAX);
        let error = to_metadata(&with_metadata(most + 1)).unwrap_err();
        let object_store::Error::Generic { source, .. } = error else { panic!("{error}") };
        let reason = source.downcast_ref();
        assert!(matches!(
            reason,
            Some(RequestError::AttributesTooLong { len: 4097, max: METADATA_LEN_MAX })
        ));
    }
}
