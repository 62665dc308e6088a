//! Whether the object store is asked at all.
//!
//! Invariant: after enough failures in a row no request passes but one at a time, and the first
//! that succeeds lets all others pass again. Time passes here only when a request comes: nothing
//! polls. Called by the client, once for each try.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// How much longer than at first a pause becomes.
const PAUSE_GROWTH: u32 = 8;

/// A switch that opens when requests fail.
#[derive(Debug)]
pub(crate) struct Circuit {
    failures_max: u32,
    pause: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// In a row.
    failures: u32,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    until: Instant,
    pause: Duration,
    /// Whether a request is under way that decides.
    probing: bool,
}

/// Leave to make one request. Dropped without an outcome it says nothing.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    circuit: &'a Circuit,
    is_probe: bool,
}

impl Circuit {
    pub(crate) fn new(failures_max: u32, pause: Duration) -> Self {
        Circuit { failures_max, pause, state: Mutex::new(State { failures: 0, open: None }) }
    }

    /// Leave for a request, or how long there will be none.
    pub(crate) fn admit(&self) -> Result<Pass<'_>, Duration> {
        let now = Instant::now();
        let mut state = self.state.lock();
        let is_probe = match &mut state.open {
            None => false,
            Some(open) if open.probing || now < open.until => {
                return Err(open.until.saturating_duration_since(now));
            }
            Some(open) => {
                open.probing = true;
                true
            }
        };
        Ok(Pass { circuit: self, is_probe })
    }

    /// Whether requests fail at once.
    pub(crate) fn is_open(&self) -> bool {
        self.state.lock().open.is_some()
    }
}

impl Pass<'_> {
    /// The object store has answered.
    pub(crate) fn succeeded(mut self) {
        self.is_probe = false;
        *self.circuit.state.lock() = State { failures: 0, open: None };
    }

    /// The object store has failed.
    pub(crate) fn failed(mut self) {
        let circuit = self.circuit;
        let is_probe = std::mem::take(&mut self.is_probe);
        let mut state = circuit.state.lock();
        state.failures = state.failures.saturating_add(1);
        let pause = match &state.open {
            Some(open) if is_probe => (open.pause * 2).min(circuit.pause * PAUSE_GROWTH),
            None if state.failures >= circuit.failures_max => circuit.pause,
            _ => return,
        };
        state.open = Some(Open { until: Instant::now() + pause, pause, probing: false });
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if self.is_probe
            && let Some(open) = &mut self.circuit.state.lock().open
        {
            open.probing = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_secs(1);

    fn opened() -> Circuit {
        let circuit = Circuit::new(3, PAUSE);
        (0..3).for_each(|_| circuit.admit().unwrap().failed());
        circuit
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_open_it() {
        let circuit = Circuit::new(3, PAUSE);
        for _ in 0..5 {
            circuit.admit().unwrap().failed();
            circuit.admit().unwrap().failed();
            circuit.admit().unwrap().succeeded();
        }
        assert!(!circuit.is_open());
        assert_eq!(opened().admit().unwrap_err(), PAUSE);
    }

    #[tokio::test(start_paused = true)]
    async fn one_request_passes_after_the_pause() {
        let circuit = opened();
        tokio::time::advance(PAUSE).await;
        let probe = circuit.admit().unwrap();
        assert!(circuit.admit().is_err(), "one at a time");
        probe.failed();
        assert_eq!(circuit.admit().unwrap_err(), PAUSE * 2);
        tokio::time::advance(PAUSE * 2).await;
        drop(circuit.admit().unwrap());
        circuit.admit().expect("a probe that was given up decides nothing").succeeded();
        assert!(!circuit.is_open());
        assert!(circuit.admit().is_ok() && circuit.admit().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_are_bounded() {
        let circuit = opened();
        for _ in 0..20 {
            tokio::time::advance(PAUSE * PAUSE_GROWTH).await;
            circuit.admit().unwrap().failed();
        }
        assert_eq!(circuit.admit().unwrap_err(), PAUSE * PAUSE_GROWTH);
    }
}
