//! Threads for calls that block, of this crate's own: no runtime is needed or burdened.
//!
//! Invariant: every job that was handed in is called exactly once, with `Ok` on a thread of the
//! pool, or with an error if it is refused; and a job that panics takes no thread with it. Idle
//! threads are parked. Called by the blocking driver and by the catalog.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use crate::driver::closed_error;
use crate::process::Origin;

/// A job; the argument says whether it runs.
pub(crate) type Job = Box<dyn FnOnce(io::Result<()>) + Send>;

/// What the last thread does before it ends.
type Finish = Box<dyn FnOnce() + Send>;

/// A bounded number of threads, started when there is work for them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    name: &'static str,
    threads_max: usize,
}

struct Shared {
    origin: Origin,
    state: Mutex<State>,
    work: Condvar,
    ended: Notify,
}

struct State {
    queue: VecDeque<Job>,
    /// Threads that are parked, or were just woken and have not taken a job yet.
    idle: usize,
    live: usize,
    started: usize,
    closing: bool,
    finish: Option<Finish>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of threads of this name, with none yet. `finish` runs once: after the last job of a
    /// closed pool.
    pub(crate) fn new(name: &'static str, threads_max: usize, finish: Finish) -> Self {
        let state = State {
            queue: VecDeque::new(),
            idle: 0,
            live: 0,
            started: 0,
            closing: false,
            finish: Some(finish),
            threads: Vec::new(),
        };
        Pool {
            shared: Arc::new(Shared {
                origin: Origin::here(),
                state: Mutex::new(state),
                work: Condvar::new(),
                ended: Notify::new(),
            }),
            name,
            threads_max: threads_max.max(1),
        }
    }

    /// Hands a job in; a closed pool, or one that can start no thread at all, refuses it.
    pub(crate) fn submit(&self, job: Job) {
        if let Err((job, error)) = self.enqueue(job) {
            job(Err(error));
        }
    }

    fn enqueue(&self, job: Job) -> Result<(), (Job, io::Error)> {
        let mut state = self.shared.state.lock();
        if state.closing {
            return Err((job, closed_error()));
        }
        if state.idle <= state.queue.len() && state.live < self.threads_max {
            match self.start_thread(state.started) {
                Ok(thread) => {
                    state.threads.push(thread);
                    state.started += 1;
                    state.live += 1;
                }
                // Fewer threads than wished for are enough; none is not.
                Err(error) if state.live == 0 => return Err((job, error)),
                Err(_) => {}
            }
        }
        state.queue.push_back(job);
        self.shared.work.notify_one();
        Ok(())
    }

    fn start_thread(&self, number: usize) -> io::Result<JoinHandle<()>> {
        let shared = Arc::clone(&self.shared);
        let name = self.name;
        thread::Builder::new().name(format!("{name}-{number}")).spawn(move || shared.serve())
    }

    /// Refuses what comes after; what was handed in before is still done.
    pub(crate) fn begin_close(&self) {
        if self.shared.origin.is_inherited() {
            // Its threads are not here, and what ends it is the parent's matter.
            return std::mem::forget(Arc::clone(&self.shared));
        }
        let finish = {
            let mut state = self.shared.state.lock();
            state.closing = true;
            self.shared.work.notify_all();
            if state.live > 0 {
                return;
            }
            // Its last step may block, and the thread that closes it must not.
            if state.finish.is_some()
                && let Ok(thread) = self.start_thread(state.started)
            {
                state.threads.push(thread);
                state.started += 1;
                state.live += 1;
                return;
            }
            state.finish.take()
        };
        if let Some(finish) = finish {
            finish();
        }
    }

    /// Waits, without blocking, until a pool that closes has done its last job; then joins.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let shared = Arc::clone(&self.shared);
        async move {
            loop {
                let ended = shared.ended.notified();
                tokio::pin!(ended);
                ended.as_mut().enable();
                if shared.state.lock().live == 0 {
                    break;
                }
                ended.await;
            }
            // They have nothing left to do, so this takes no time worth yielding for.
            shared.join();
        }
    }

    /// Waits, blocking, for the same.
    pub(crate) fn shut_down(&self) {
        self.begin_close();
        if self.shared.origin.is_inherited() {
            return;
        }
        self.shared.join();
    }

    /// How many threads run.
    #[cfg(test)]
    pub(crate) fn live(&self) -> usize {
        self.shared.state.lock().live
    }
}

impl Shared {
    fn join(&self) {
        let threads = std::mem::take(&mut self.state.lock().threads);
        for thread in threads {
            // The last owner of a pool may be a job, dropped on one of its own threads, which ends
            // right after.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }

    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                // A job reports its own failure; that of its report must not end the thread.
                let _ = catch_unwind(AssertUnwindSafe(|| job(Ok(()))));
                state = self.state.lock();
            } else if state.closing {
                break;
            } else {
                state.idle += 1;
                self.work.wait(&mut state);
                state.idle -= 1;
            }
        }
        if state.live == 1
            && let Some(finish) = state.finish.take()
        {
            drop(state);
            let _ = catch_unwind(AssertUnwindSafe(finish));
            state = self.state.lock();
        }
        state.live -= 1;
        drop(state);
        self.ended.notify_waiters();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state.lock();
        f.debug_struct("Pool")
            .field("threads_max", &self.threads_max)
            .field("live", &state.live)
            .field("queued", &state.queue.len())
            .field("closing", &state.closing)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn pool(threads: usize) -> (Pool, mpsc::Receiver<&'static str>) {
        let (sender, receiver) = mpsc::channel();
        let finish = Box::new(move || sender.send("finished").unwrap());
        (Pool::new("test", threads, finish), receiver)
    }

    #[test]
    fn threads_start_with_work_and_end_with_the_pool() {
        let (pool, finished) = pool(3);
        assert_eq!(pool.live(), 0);
        let gate = Arc::new(Mutex::new(()));
        let entered = mpsc::channel();
        let held = gate.lock();
        for _ in 0..8 {
            let gate = Arc::clone(&gate);
            let sender = entered.0.clone();
            pool.submit(Box::new(move |run| {
                sender.send(run.is_ok()).unwrap();
                drop(gate.lock());
            }));
        }
        for _ in 0..3 {
            assert_eq!(entered.1.recv(), Ok(true));
        }
        assert_eq!(pool.live(), 3, "no more than allowed");
        pool.begin_close();
        pool.submit(Box::new(|run| assert!(crate::driver::is_closed(&run.unwrap_err()))));
        drop(held);
        pool.shut_down();
        assert_eq!(entered.1.try_iter().count(), 5, "what was accepted was done");
        assert_eq!((pool.live(), finished.try_recv()), (0, Ok("finished")));
    }

    #[test]
    fn one_thread_serves_work_that_comes_one_by_one() {
        let (pool, _finished) = pool(8);
        for _ in 0..20 {
            let (sender, receiver) = mpsc::channel();
            pool.submit(Box::new(move |_| sender.send(()).unwrap()));
            receiver.recv().unwrap();
            while pool.shared.state.lock().idle == 0 {
                thread::yield_now();
            }
        }
        assert_eq!(pool.live(), 1);
        pool.shut_down();
    }

    #[test]
    fn a_panic_takes_no_thread_along() {
        let (pool, _finished) = pool(1);
        pool.submit(Box::new(|_| panic!("expected by the test")));
        let (sender, receiver) = mpsc::channel();
        pool.submit(Box::new(move |_| sender.send(()).unwrap()));
        receiver.recv().unwrap();
        pool.shut_down();
    }

    #[test]
    fn a_pool_without_work_ends_at_once() {
        let (pool, finished) = pool(1);
        futures::executor::block_on(async {
            pool.begin_close();
            pool.closed().await;
        });
        assert_eq!(finished.try_recv(), Ok("finished"));
    }

    #[test]
    fn dropped_by_its_own_thread() {
        let (pool, finished) = pool(2);
        let pool = Arc::new(pool);
        let own = Arc::clone(&pool);
        let (sender, receiver) = mpsc::channel::<()>();
        pool.submit(Box::new(move |_| {
            let _ = receiver.recv();
            own.shut_down();
        }));
        drop(pool);
        drop(sender);
        assert_eq!(finished.recv(), Ok("finished"));
    }
}
