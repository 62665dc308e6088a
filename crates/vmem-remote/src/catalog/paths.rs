//! Which object of the bucket is which generation of which name.
//!
//! Invariant: `<prefix>/names/<name in hex>/<generation in hex>`, and nothing else, is a
//! generation; hex keeps the order of bytes. Called by all of the catalog that makes requests.

use std::path::PathBuf;
use std::sync::Arc;

use object_store::path::Path;
use uuid::Uuid;
use vmem_core::VirtualMemoryError;

/// The longest key that object stores take, in bytes.
const KEY_LEN_MAX: usize = 1024;
/// The digits of a generation.
const DIGITS: usize = 16;

/// The paths of one bucket.
#[derive(Debug)]
pub(super) struct Paths {
    names: Path,
    probes: Path,
}

impl Paths {
    pub(super) fn new(prefix: &Path) -> Self {
        Paths { names: prefix.clone().join("names"), probes: prefix.clone().join("probes") }
    }

    /// What all generations of all names are below.
    pub(super) fn names(&self) -> &Path {
        &self.names
    }

    /// An object that nothing else uses.
    pub(super) fn probe(&self) -> Path {
        self.probes.clone().join(Uuid::new_v4().as_simple().to_string())
    }

    /// What all generations of a name are below.
    pub(super) fn folder(&self, name: &str) -> Path {
        self.names.clone().join(name.bytes().map(|byte| format!("{byte:02x}")).collect::<String>())
    }

    pub(super) fn generation(&self, name: &str, generation: u64) -> Path {
        self.folder(name).join(format!("{generation:016x}"))
    }

    /// Whether the bucket can have this name.
    ///
    /// # Errors
    ///
    /// `InvalidConfig` for a name that is empty, or whose key would be too long.
    pub(super) fn check(&self, name: &str) -> Result<(), VirtualMemoryError> {
        let names = self.names.as_ref().len();
        let key = names + 1 + 2 * name.len() + 1 + DIGITS;
        let reason = match name.len() {
            0 => "a name has at least one byte".to_owned(),
            len if key > KEY_LEN_MAX => {
                let len_max = (KEY_LEN_MAX + len * 2).saturating_sub(key) / 2;
                format!("a name in this bucket has at most {len_max} bytes, this one has {len}")
            }
            _ => return Ok(()),
        };
        Err(VirtualMemoryError::invalid_config("name", reason))
    }

    /// The name and generation of a path that was listed, if it is one.
    pub(super) fn parse(&self, path: &Path) -> Option<(Arc<str>, u64)> {
        let mut parts = path.prefix_match(&self.names)?;
        let folder = parts.next()?;
        let number = parts.next()?;
        if parts.next().is_some() {
            return None;
        }
        let name = String::from_utf8(unhex(folder.as_ref())?).ok()?;
        let number = number.as_ref();
        let generation = u64::from_str_radix(number, 16).ok()?;
        // Only the way in which it is written.
        let is_own = *path == self.generation(&name, generation) && generation > 0;
        is_own.then(|| (name.into(), generation))
    }
}

/// A path as errors show it.
pub(super) fn shown(path: &Path) -> PathBuf {
    PathBuf::from(path.as_ref())
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_as_they_are_written() {
        let paths = Paths::new(&Path::from("a/b"));
        let path = paths.generation("n\u{e9}", 0x2a);
        assert_eq!(path.as_ref(), "a/b/names/6ec3a9/000000000000002a");
        assert_eq!(paths.parse(&path), Some(("n\u{e9}".into(), 0x2a)));
        for foreign in [
            "a/b/names/6e",
            "a/b/names/6E/000000000000002a",
            "a/b/names/6/000000000000002a",
            "a/b/names/+6/000000000000002a",
            "a/b/names/ff/000000000000002a",
            "a/b/names/6e/2a",
            "a/b/names/6e/0000000000000000",
            "a/b/names/6e/000000000000002a/x",
            "a/b/other/6e/000000000000002a",
        ] {
            assert_eq!(paths.parse(&Path::from(foreign)), None, "{foreign}");
        }
    }

    #[test]
    fn names_fit_in_a_key_to_the_byte() {
        let paths = Paths::new(&Path::from("vmem"));
        let fits = (KEY_LEN_MAX - "vmem/names//".len() - DIGITS) / 2;
        assert!(paths.check(&"n".repeat(fits)).is_ok());
        assert!(paths.generation(&"n".repeat(fits), 1).as_ref().len() <= KEY_LEN_MAX);
        for name in ["n".repeat(fits + 1), String::new()] {
            let refused = paths.check(&name);
            let Err(VirtualMemoryError::InvalidConfig { field, reason }) = refused else {
                panic!("{refused:?}")
            };
            assert_eq!(field, "name");
            assert!(name.is_empty() || reason.contains(&format!("at most {fits} ")), "{reason}");
        }
    }
}
