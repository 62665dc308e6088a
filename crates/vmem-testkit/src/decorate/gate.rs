//! Completions that wait for the test.
//!
//! Invariant: what is held at the gate has ended in the driver below and is unknown to the caller,
//! with its buffers still owned here. Called by tests of ownership and of what may happen
//! meanwhile.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::channel::oneshot;
use parking_lot::Mutex;
use tokio::sync::Notify;
use vmem_io::driver::Driver;

use super::{After, Around, Hook, OpKind, Span};

/// A driver whose completions are let through by the test.
pub type GateDriver = Around<Gate>;

/// The hook of [`GateDriver`].
#[derive(Debug, Default)]
pub struct Gate {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    shut: Vec<OpKind>,
    held: VecDeque<(OpKind, oneshot::Sender<()>)>,
}

impl GateDriver {
    /// Holds the completions of these kinds of operation; others pass. To drop the driver lets
    /// everything through.
    pub fn new(inner: Arc<dyn Driver>, shut: &[OpKind]) -> Arc<Self> {
        let gate = Gate::default();
        gate.shared.state.lock().shut = shut.to_vec();
        Around::with_hook(inner, gate)
    }

    /// How many completions are held now.
    pub fn held(&self) -> usize {
        self.hook.shared.state.lock().held.len()
    }

    /// Waits until at least `count` completions are held.
    pub async fn wait_held(&self, count: usize) {
        loop {
            let changed = self.hook.shared.changed.notified();
            if self.held() >= count {
                return;
            }
            changed.await;
        }
    }

    /// Lets the completion through that came first; its kind, or `None` where none is held.
    pub fn release_one(&self) -> Option<OpKind> {
        let (kind, pass) = self.hook.shared.state.lock().held.pop_front()?;
        let _nobody_waits = pass.send(());
        Some(kind)
    }

    /// Lets the completion through that came last, past the others.
    pub fn release_last(&self) -> Option<OpKind> {
        let (kind, pass) = self.hook.shared.state.lock().held.pop_back()?;
        let _nobody_waits = pass.send(());
        Some(kind)
    }

    /// Lets through what is held now; how many those were.
    pub fn release_all(&self) -> usize {
        std::iter::from_fn(|| self.release_one()).count()
    }

    /// Lets everything through, from now on too.
    pub fn open(&self) {
        self.shut(&[]);
        self.release_all();
    }

    /// From now on holds the completions of these kinds, and no others.
    pub fn shut(&self, kinds: &[OpKind]) {
        self.hook.shared.state.lock().shut = kinds.to_vec();
    }
}

impl Shared {
    fn arrive(&self, kind: OpKind) -> Option<oneshot::Receiver<()>> {
        let mut state = self.state.lock();
        if !state.shut.contains(&kind) {
            return None;
        }
        let (pass, passed) = oneshot::channel();
        state.held.push_back((kind, pass));
        drop(state);
        self.changed.notify_waiters();
        Some(passed)
    }
}

impl Hook for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn start(&self, kind: OpKind, _spans: &[Span]) -> After {
        let shared = Arc::downgrade(&self.shared);
        Box::new(move |_| {
            Box::pin(async move {
                let held = shared.upgrade().and_then(|shared| shared.arrive(kind));
                if let Some(passed) = held {
                    // The gate was dropped: everything passes.
                    let _passed_or_gone = passed.await;
                }
            })
        })
    }
}
