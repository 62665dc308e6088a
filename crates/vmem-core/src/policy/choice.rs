//! Which policy a store is to have: a built-in one, or one of the user's.
//!
//! Invariant: a choice builds a new, empty policy each time, for each tier one. Set in the
//! configuration; built when the store opens.

use std::fmt;
use std::sync::Arc;

use super::{Policy, PolicyKind, Protected, build};

/// A policy for the tiers of a store.
///
/// ```
/// use vmem::policy::{Lru, PolicyChoice, PolicyKind};
///
/// let built_in = PolicyChoice::from(PolicyKind::Sieve);
/// assert_eq!(built_in, PolicyKind::Sieve);
/// let own = PolicyChoice::custom("my-lru", || Box::<Lru>::default());
/// assert_eq!(own.to_string(), "my-lru");
/// assert!(own.build(1 << 20).is_empty());
/// ```
#[derive(Clone)]
pub struct PolicyChoice(Choice);

#[derive(Clone)]
enum Choice {
    BuiltIn(PolicyKind),
    Custom { name: Arc<str>, make: Arc<Make> },
}

type Make = dyn Fn() -> Box<dyn Policy> + Send + Sync;

impl PolicyChoice {
    /// A policy of the user's: `make` is called once for each tier that has an order of eviction.
    pub fn custom(
        name: impl Into<Arc<str>>,
        make: impl Fn() -> Box<dyn Policy> + Send + Sync + 'static,
    ) -> Self {
        PolicyChoice(Choice::Custom { name: name.into(), make: Arc::new(make) })
    }

    /// Which of the built-in ones it is; none for one of the user's.
    pub fn kind(&self) -> Option<PolicyKind> {
        match self.0 {
            Choice::BuiltIn(kind) => Some(kind),
            Choice::Custom { .. } => None,
        }
    }

    /// An empty policy for a tier of `capacity_bytes`. What is prefetched is protected in it:
    /// [`Protected`].
    pub fn build(&self, capacity_bytes: u64) -> Box<dyn Policy> {
        let inner = match &self.0 {
            Choice::BuiltIn(kind) => build(*kind),
            Choice::Custom { make, .. } => make(),
        };
        Box::new(Protected::new(inner, capacity_bytes))
    }
}

impl Default for PolicyChoice {
    fn default() -> Self {
        PolicyKind::default().into()
    }
}

impl From<PolicyKind> for PolicyChoice {
    fn from(kind: PolicyKind) -> Self {
        PolicyChoice(Choice::BuiltIn(kind))
    }
}

impl PartialEq<PolicyKind> for PolicyChoice {
    fn eq(&self, kind: &PolicyKind) -> bool {
        self.kind() == Some(*kind)
    }
}

impl fmt::Display for PolicyChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Choice::BuiltIn(kind) => kind.fmt(f),
            Choice::Custom { name, .. } => f.write_str(name),
        }
    }
}

impl fmt::Debug for PolicyChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyChoice({self})")
    }
}
