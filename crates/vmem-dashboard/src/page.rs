//! The document, and what it may load.
//!
//! Invariant: the document holds its style and its script, and its policy names both by their
//! hashes: nothing else runs, and nothing is loaded but its own data. So it works under any path,
//! and needs no other route. Called by the router.

use std::sync::LazyLock;

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

const FRAME: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/app.js");

/// The whole document.
static DOCUMENT: LazyLock<String> =
    LazyLock::new(|| FRAME.replace("/*STYLE*/", STYLE).replace("/*SCRIPT*/", SCRIPT));

static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let style = hash(STYLE);
    let script = hash(SCRIPT);
    let policy = format!(
        "default-src 'none'; style-src '{style}'; script-src '{script}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    policy.parse().expect("invariant: the policy is plain ASCII")
});

/// What the policy calls a text.
fn hash(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text)))
}

pub(crate) async fn page() -> Response {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_SECURITY_POLICY, POLICY.clone());
    let fixed = [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    for (name, value) in fixed {
        headers.insert(name, HeaderValue::from_static(value));
    }
    (StatusCode::OK, headers, Html(DOCUMENT.as_str())).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn document_has_what_its_policy_names_and_asks_nobody_else() {
        let part = |from: &str, to: &str| {
            let rest = DOCUMENT.split_once(from).expect("it is there").1;
            rest.split_once(to).expect("it ends").0
        };
        let policy = POLICY.to_str().unwrap();
        assert!(policy.contains(&hash(part("<style>", "</style>"))), "{policy}");
        assert!(policy.contains(&hash(part("<script>", "</script>"))), "{policy}");
        assert!(!policy.contains("unsafe"));
        // The names of SVG's elements are no address that is asked.
        let document = DOCUMENT.replace("http://www.w3.org/2000/svg", "");
        for address in ["http://", "https://", "//cdn", "src=", "@import", "url("] {
            assert!(!document.contains(address), "{address}");
        }
        assert!(!DOCUMENT.contains(" style="), "the policy refuses it");
    }
}
