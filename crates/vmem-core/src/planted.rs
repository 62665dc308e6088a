//! Bugs that can be planted, so that the tests are seen to find them: `scripts/planted.sh`.
//!
//! Invariant: only a build with `--cfg vmem_planted` has any, and there `VMEM_PLANTED` chooses at
//! most one for the process; in every other build the macro is the literal `false`, of which
//! nothing is left. The list, `tests/planted.toml`, says of each what is wrong and which tests must
//! fail. Used where the bug would be, in this crate and in those above it.

/// Whether the bug of this name is planted: `false`, but for `scripts/planted.sh`.
#[cfg(not(vmem_planted))]
#[doc(hidden)]
#[macro_export]
macro_rules! planted {
    ($name:literal) => {
        false
    };
}

/// Whether the bug of this name is planted.
#[cfg(vmem_planted)]
#[doc(hidden)]
#[macro_export]
macro_rules! planted {
    ($name:literal) => {
        $crate::is_planted($name)
    };
}

/// Whether the environment names this bug.
#[cfg(vmem_planted)]
#[doc(hidden)]
pub fn is_planted(name: &str) -> bool {
    static PLANTED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    PLANTED.get_or_init(|| std::env::var("VMEM_PLANTED").ok()).as_deref() == Some(name)
}
