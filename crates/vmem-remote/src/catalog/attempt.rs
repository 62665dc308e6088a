//! One attempt to create the next generation of a name.
//!
//! Invariant: an attempt that ends without an outcome, whether its request got no answer, its
//! commit failed at another name, or its task was dropped, leaves the name unknown: what it made is
//! found out before the name is used again. Made by commits.

use std::sync::Arc;

use tokio::time::Instant;
use uuid::Uuid;

use super::body::Token;
use super::generations::{Generation, Known};
use super::inner::Inner;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Attempt {
    inner: Arc<Inner>,
    name: Arc<str>,
    /// What it makes.
    pub(super) generation: Generation,
    began: Instant,
    /// When the generation before it was confirmed.
    pub(super) confirmed: Instant,
    is_settled: bool,
}

impl Attempt {
    /// At the generation behind the newest that is known.
    pub(super) fn begin(
        inner: &Arc<Inner>,
        name: &Arc<str>,
        known: &Known,
        object: Option<(u64, u64)>,
    ) -> Self {
        let token: Token = Uuid::new_v4().into_bytes();
        let generation = Generation { number: known.newest.number + 1, token, object };
        inner.generations.lock().begin(name, generation.number, token);
        Attempt {
            inner: inner.clone(),
            name: name.clone(),
            generation,
            began: Instant::now(),
            confirmed: known.confirmed,
            is_settled: false,
        }
    }

    /// It was made, and so was all of its commit.
    pub(super) fn acknowledge(mut self) {
        self.is_settled = true;
        // It was created after the attempt began, and was the newest then.
        self.inner.generations.lock().show(&self.name, self.generation, self.began);
    }

    /// It was not made, and never will be.
    pub(super) fn refuse(mut self) {
        self.is_settled = true;
        self.inner.generations.lock().refuse(&self.name, self.generation.token);
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.is_settled {
            self.inner.generations.lock().lose_sight(&self.name);
        }
    }
}
