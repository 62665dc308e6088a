//! The files that are checked.
//!
//! Invariant: what a build makes, what other projects wrote (licences, locks) and what a compiler
//! wrote (PTX) is never among them.

use std::path::Path;
use std::sync::OnceLock;

use walkdir::WalkDir;

use crate::rust::{Piece, pieces};

/// What a file is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Rust,
    Markdown,
    /// Scripts and settings.
    Other,
}

/// A file with its text.
#[derive(Debug)]
pub(crate) struct File {
    /// From the root of the repository on.
    pub(crate) path: String,
    pub(crate) kind: Kind,
    pub(crate) text: String,
    /// Code, comments and strings of a file in Rust.
    pub(crate) pieces: Vec<Piece>,
}

impl File {
    pub(crate) fn new(path: &str, text: &str) -> Option<File> {
        let kind = match path.rsplit_once('.')?.1 {
            "rs" => Kind::Rust,
            "md" => Kind::Markdown,
            "sh" | "toml" => Kind::Other,
            _ if path == ".ci/run" => Kind::Other,
            _ => return None,
        };
        let pieces = if kind == Kind::Rust { pieces(text) } else { Vec::new() };
        Some(File { path: path.to_owned(), kind, text: text.to_owned(), pieces })
    }

    /// Lines with their numbers, which begin with 1.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(at, line)| (at + 1, line))
    }
}

/// A sample for a rule.
pub(crate) fn sample(path: &str, text: &str) -> File {
    File::new(path, text).expect("a kind of file that is checked")
}

/// All files that are checked.
pub(crate) fn files() -> impl Iterator<Item = &'static File> {
    all().iter()
}

/// All files, read once.
pub(crate) fn all() -> &'static [File] {
    static ALL: OnceLock<Vec<File>> = OnceLock::new();
    ALL.get_or_init(|| read(root()).collect())
}

/// The folders of the repository.
pub(crate) const ROOTS: &[&str] =
    &["tests", "crates", "docs", "scripts", "examples", "benches", "checks", "src", ".ci"];

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Each file below `root`.
fn read(root: &Path) -> impl Iterator<Item = File> {
    let entries = WalkDir::new(root).sort_by_file_name().into_iter().filter_entry(|entry| {
        let name = entry.file_name().to_string_lossy();
        // A folder beside these is not of this repository.
        let is_ours = entry.depth() != 1 || entry.file_type().is_file() || ROOTS.contains(&&*name);
        is_ours && name != "target"
    });
    entries.filter_map(move |entry| {
        let entry = entry.expect("the repository can be read");
        let path = entry.path().strip_prefix(root).expect("below the root").to_str()?;
        if !entry.file_type().is_file() {
            return None;
        }
        File::new(path, &std::fs::read_to_string(entry.path()).ok()?)
    })
}

#[test]
fn walk_finds_sources_and_documents() {
    let found: Vec<_> = all().iter().map(|file| &file.path).collect();
    for path in [
        "src/lib.rs",
        "README.md",
        ".ci/run",
        "Cargo.toml",
        "crates/vmem-core/src/object/shared/mod.rs",
    ] {
        assert!(
            found.iter().any(|file| *file == path),
            "{path} is not among {} files",
            found.len()
        );
    }
}
