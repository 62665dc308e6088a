//! The documents name tests; each of them must exist.

use std::path::Path;

/// Every `path` or `path::test` in backquotes that lies under `tests` or `crates`.
fn named(text: &str) -> Vec<(String, Option<String>)> {
    // Fenced blocks are code, not names.
    let prose: String = text.split("```").step_by(2).collect();
    let prose = prose.as_str();
    let quoted = prose.split('`').skip(1).step_by(2);
    let inside = quoted.filter(|name| name.starts_with("tests/") || name.starts_with("crates/"));
    inside
        .map(|name| match name.split_once("::") {
            Some((path, test)) => (path.to_owned(), Some(test.to_owned())),
            None => (name.to_owned(), None),
        })
        .collect()
}

#[test]
fn every_test_that_the_documents_name_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut checked = 0;
    for document in ["docs/architecture.md", "README.md"] {
        let text = std::fs::read_to_string(root.join(document)).unwrap();
        for (path, test) in named(&text) {
            let at = root.join(&path);
            assert!(at.exists(), "{document} names {path}, which does not exist");
            if let Some(test) = test
                && at.is_file()
            {
                let code = std::fs::read_to_string(&at).unwrap();
                assert!(code.contains(&format!("fn {test}(")), "{document}: no {test} in {path}");
            }
            checked += 1;
        }
    }
    assert!(checked > 20, "{checked} names were found");
}
