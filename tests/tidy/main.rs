//! The rules of the house, checked: one test for each, over the text of every file.
//!
//! Invariant: a rule that finds something names each place as `path:line: what`, and says what to
//! do. Each rule is also shown a bad sample, which it must find: one that cannot fail is worse than
//! none. Nothing is parsed beyond telling code, comments and strings apart.
//!
//! The subjects of commits are not checked: history stays as it is. Run by
//! `cargo test --test tidy`.

#![allow(missing_docs)]

mod documents;
mod files;
mod glossary;
mod guide;
mod lets;
mod names;
mod planted;
mod prose;
mod public;
mod rust;
mod shape;
mod traces;
mod words;

use files::{File, files};

/// A place where a rule is broken.
#[derive(Debug)]
struct Finding {
    path: String,
    line: usize,
    what: String,
}

impl Finding {
    fn new(file: &File, line: usize, what: impl Into<String>) -> Finding {
        Finding { path: file.path.clone(), line, what: what.into() }
    }
}

/// Fails with every place, and with what to do.
fn expect_none(found: &[Finding], remedy: &str) {
    let places: Vec<_> =
        found.iter().map(|Finding { path, line, what }| format!("{path}:{line}: {what}")).collect();
    assert!(
        found.is_empty(),
        "{}\n{} places. What to do: {remedy}",
        places.join("\n"),
        found.len()
    );
}

/// What a rule finds in all files.
fn everywhere(rule: impl Fn(&File) -> Vec<Finding>) -> Vec<Finding> {
    files().flat_map(rule).collect()
}
