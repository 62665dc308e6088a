//! The name of an object, out of the path of a request.
//!
//! Invariant: a name was decoded once, and is the same for every client and proxy: there is no
//! second way to write it, and no way out of the objects. Called by the handlers.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use percent_encoding::percent_decode_str;

use crate::error::ApiError;

/// The longest name, in bytes.
pub(crate) const NAME_LEN_MAX: usize = 1024;

/// A name that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name(String);

impl Name {
    /// The name that a path, as it was sent, stands for.
    ///
    /// # Errors
    ///
    /// 400 with the reason.
    pub(crate) fn parse(path: &str) -> Result<Name, ApiError> {
        let refuse = |why| Err(ApiError::bad_request("invalid_name", why));
        let mut rest = path;
        while let Some(at) = rest.find('%') {
            let code = rest.as_bytes().get(at + 1..at + 3);
            if !code.is_some_and(|code| code.iter().all(u8::is_ascii_hexdigit)) {
                return refuse("a % in a name is written as %25");
            }
            rest = &rest[at + 3..];
        }
        let Ok(name) = percent_decode_str(path).decode_utf8() else {
            return refuse("a name is UTF-8");
        };
        if name.len() > NAME_LEN_MAX {
            return refuse("a name has at most 1024 bytes");
        }
        if name.chars().any(|letter| letter.is_control() || letter == '\\') {
            return refuse("a name has no control characters and no backslash");
        }
        // Clients and proxies change such paths before they send them.
        if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return refuse("between the slashes of a name is something other than . and ..");
        }
        Ok(Name(name.into_owned()))
    }

    /// The name.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        // The extractor `Path` would decode, and say of what it cannot decode nothing of ours.
        let path = parts.uri.path().trim_start_matches('/');
        let (_, path) = path.split_once('/').unwrap_or_default();
        Name::parse(path)
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;

    use super::*;

    #[test]
    fn names_are_decoded_once() {
        let of = |path| Name::parse(path).map(|name| name.0).ok();
        assert_eq!(of("a/b.txt").as_deref(), Some("a/b.txt"));
        assert_eq!(of("a%2Fb%20c").as_deref(), Some("a/b c"));
        assert_eq!(of("a%252e").as_deref(), Some("a%2e"));
        assert_eq!(of("%C3%A9").as_deref(), Some("\u{e9}"));
        // Dots that are no segment of their own.
        assert_eq!(of("..a/b..").as_deref(), Some("..a/b.."));
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for path in [
            "",
            "/",
            "a/",
            "a//b",
            ".",
            "..",
            "a/../b",
            "a/%2e%2e/b",
            "..%2fetc",
            "a%00",
            "a%0ab",
            "a%5cb",
            "%ff",
            "%",
            "a%2",
            "a%zz",
        ] {
            let refused = Name::parse(path).unwrap_err().into_response();
            assert_eq!(refused.status(), 400, "{path:?}");
        }
        assert!(Name::parse(&"a".repeat(NAME_LEN_MAX)).is_ok());
        assert!(Name::parse(&"a".repeat(NAME_LEN_MAX + 1)).is_err());
    }
}
