//! One number that drives a test.
//!
//! Invariant: everything random in a test derives from its [`Seed`] through named forks, so that
//! adding a consumer does not shift what the others draw, and a printed seed replays the run.
//! Called at the top of every randomised test.

use std::env;
use std::future::Future;
use std::thread;

use rand::SeedableRng;
use rand::rngs::SmallRng;

/// The variable that overrides the seed of every test: decimal, or hexadecimal after `0x`.
pub const SEED_VARIABLE: &str = "VMEM_SEED";

/// The source of all chance in one test.
///
/// ```
/// use rand::Rng;
/// use vmem_testkit::Seed;
///
/// let seed = Seed::new(7);
/// let first: u64 = seed.fork("reads").rng().random();
/// assert_eq!(first, seed.fork("reads").rng().random());
/// assert_ne!(first, seed.fork("writes").rng().random());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(u64);

impl Seed {
    /// A fixed seed.
    pub fn new(value: u64) -> Self {
        Seed(value)
    }

    /// The seed in `VMEM_SEED`, or what `default` gives.
    ///
    /// # Panics
    ///
    /// When the variable holds something that is not a number: a replay that silently ran another
    /// seed would be worse than none.
    pub fn from_env_or(default: impl FnOnce() -> u64) -> Self {
        match env::var(SEED_VARIABLE) {
            Ok(text) => match parse(&text) {
                Some(value) => Seed(value),
                None => panic!("{SEED_VARIABLE}={text:?} is not a u64, decimal or 0x hex"),
            },
            Err(_) => Seed(default()),
        }
    }

    /// The number itself.
    pub fn value(self) -> u64 {
        self.0
    }

    /// A seed of its own for one consumer, fixed by this seed and the label.
    #[must_use]
    pub fn fork(self, label: &str) -> Seed {
        // FNV-1a spreads the label, the finaliser separates labels that differ in one bit.
        let spread = label.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Seed(mix(self.0 ^ mix(spread)))
    }

    /// As [`fork`](Self::fork), for one of many numbered consumers.
    #[must_use]
    pub fn fork_nth(self, label: &str, n: u64) -> Seed {
        Seed(mix(self.fork(label).0.wrapping_add(mix(n))))
    }

    /// A generator that starts from this seed.
    pub fn rng(self) -> SmallRng {
        SmallRng::seed_from_u64(self.0)
    }

    /// Prints the seed and how to replay if the thread panics while the guard lives.
    #[must_use = "the guard prints the seed when a panic drops it"]
    pub fn guard(self, name: &str) -> SeedGuard {
        SeedGuard { seed: self, name: name.to_owned() }
    }

    /// Runs a test named `name` with the seed of the environment, or one fixed by the name.
    pub fn run<T>(name: &str, test: impl FnOnce(Seed) -> T) -> T {
        let seed = Seed::from_env_or(|| Seed(0).fork(name).value());
        let _guard = seed.guard(name);
        test(seed)
    }

    /// As [`run`](Self::run), for a test that awaits: on a current-thread runtime whose clock is
    /// paused, so that waiting costs no time and the run replays.
    pub fn simulate<F: Future>(name: &str, test: impl FnOnce(Seed) -> F) -> F::Output {
        Seed::run(name, |seed| {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .start_paused(true)
                .build()
                .expect("a current-thread runtime needs nothing that could be missing")
                .block_on(test(seed))
        })
    }
}

/// Prints the seed of a test that panics. Made by [`Seed::guard`].
#[derive(Debug)]
pub struct SeedGuard {
    seed: Seed,
    name: String,
}

impl SeedGuard {
    /// What is printed when the test panics.
    pub fn message(&self) -> String {
        let name = &self.name;
        let seed = self.seed.0;
        format!(
            "{SEED_VARIABLE}={seed} was the seed of {name}; \
                 replay it with: {SEED_VARIABLE}={seed} cargo test {name}"
        )
    }
}

impl Drop for SeedGuard {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.message());
        }
    }
}

/// Scrambles 64 bits, one to one (the finaliser of SplitMix64).
pub(crate) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn parse(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_read_in_both_notations() {
        assert_eq!(parse("255"), Some(255));
        assert_eq!(parse(" 0xfF\n"), Some(255));
        assert_eq!(parse("18446744073709551615"), Some(u64::MAX));
        assert_eq!(parse("-1"), None);
        assert_eq!(parse("0x"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn forks_are_stable_and_apart() {
        let seed = Seed::new(1);
        assert_eq!(seed.fork("a"), seed.fork("a"));
        assert_ne!(seed.fork("a"), seed.fork("b"));
        assert_ne!(seed.fork("a"), Seed::new(2).fork("a"));
        assert_ne!(seed.fork_nth("a", 0), seed.fork_nth("a", 1));
    }

    #[test]
    fn the_message_names_what_replays() {
        let message = Seed::new(42).guard("some_test").message();
        assert!(message.contains("VMEM_SEED=42 cargo test some_test"), "{message}");
    }
}
