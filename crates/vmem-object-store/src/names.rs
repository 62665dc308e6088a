//! Paths and the names that they stand for.
//!
//! Invariant: two paths never have one name, and the path of a name leads back to it. Called by
//! `store.rs`, `listing.rs` and `upload.rs`.

use object_store::path::{self, DELIMITER, Path};
use vmem_core::backend::NAME_LEN_MAX;

use crate::error::RequestError;

/// Where in the store the paths begin.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    prefix: Path,
    /// What all names start with: nothing, or the prefix and a delimiter.
    base: String,
}

impl Names {
    pub(crate) fn new(prefix: Path) -> Self {
        let base = if prefix.is_root() { String::new() } else { format!("{prefix}{DELIMITER}") };
        Names { prefix, base }
    }

    pub(crate) fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// The name of an object.
    ///
    /// # Errors
    ///
    /// `InvalidPath` for the root, which is no object; `NameTooLong`.
    pub(crate) fn name(&self, path: &Path) -> object_store::Result<String> {
        if path.is_root() {
            return Err(path::Error::EmptySegment { path: path.to_string() }.into());
        }
        let name = self.key(path.as_ref());
        let len = name.len();
        let max = NAME_LEN_MAX;
        if len > max {
            return Err(RequestError::NameTooLong { len, max }.into());
        }
        Ok(name)
    }

    /// What stands for a path, or the beginning of one, in a listing; it need be no name.
    pub(crate) fn key(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// What the names of all objects below a directory start with.
    pub(crate) fn directory(&self, path: Option<&Path>) -> String {
        match path {
            Some(path) if !path.is_root() => format!("{}{path}{DELIMITER}", self.base),
            _ => self.base.clone(),
        }
    }

    /// The path of a name; none if no path stands for it.
    pub(crate) fn path(&self, name: &str) -> Option<Path> {
        let relative = name.strip_prefix(&self.base)?;
        let path = Path::parse(relative).ok()?;
        (!path.is_root() && path.as_ref() == relative).then_some(path)
    }

    /// The directory that a common prefix stands for; none if no path stands for it.
    pub(crate) fn common_prefix(&self, prefix: &str, delimiter: &str) -> Option<Path> {
        self.path(prefix.strip_suffix(delimiter)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_paths_below_a_prefix() {
        for prefix in ["", "a", "a/b"] {
            let names = Names::new(Path::from(prefix));
            for raw in ["x", "a", "a/b/c", "%48/x", "\u{1f640}/\u{1f600}.parquet"] {
                let path = Path::parse(raw).unwrap();
                assert_eq!(names.path(&names.name(&path).unwrap()), Some(path));
            }
        }
    }

    #[test]
    fn names_that_no_path_stands_for_have_none() {
        let names = Names::new(Path::from("a"));
        for name in ["", "a", "a/", "b/c", "ab/c", "a//b", "a/b/", "a/./b", "a/b\u{7}"] {
            assert_eq!(names.path(name), None, "{name:?}");
        }
        assert_eq!(names.path("a/b"), Some(Path::from("b")));
        assert_eq!(names.common_prefix("a/b/", "/"), Some(Path::from("b")));
        assert_eq!(names.common_prefix("a//", "/"), None);
    }

    #[test]
    fn the_longest_name_counts_the_prefix() {
        let names = Names::new(Path::from("abc"));
        let len = NAME_LEN_MAX - "abc/".len();
        assert!(names.name(&Path::from("x".repeat(len))).is_ok());
        let error = names.name(&Path::from("x".repeat(len + 1))).unwrap_err();
        let object_store::Error::Generic { source, .. } = error else { panic!("{error}") };
        assert!(matches!(
            source.downcast_ref(),
            Some(RequestError::NameTooLong { len: 1025, max: 1024 })
        ));
        let root = names.name(&Path::ROOT).unwrap_err();
        assert!(matches!(root, object_store::Error::InvalidPath { .. }), "{root}");
    }
}
