//! When the operations of a simulated device start and end.
//!
//! Invariant: time is exact. Events carry the order in which they would have happened on the
//! device, to the nanosecond, however late the query comes; so the coarse ticks of tokio's timer
//! delay the news of an end and never the device. A pure machine: no clock, no data. Called by the
//! simulated driver.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How fast a device is.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// Time before the first byte of a read moves.
    pub read_latency: Duration,
    /// Time before the first byte of a write moves, and of a punch.
    pub write_latency: Duration,
    /// Time that a sync takes.
    pub sync_latency: Duration,
    /// What all operations in service share equally; `None` is without limit.
    pub bytes_per_second: Option<u64>,
    /// How many operations are in service at once; at least 1. Others wait, in order.
    pub queue_depth: usize,
}

impl Default for Speed {
    /// Everything at once and at no cost: a device that is never the cause.
    fn default() -> Self {
        Speed {
            read_latency: Duration::ZERO,
            write_latency: Duration::ZERO,
            sync_latency: Duration::ZERO,
            bytes_per_second: None,
            queue_depth: 128,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Started(u64),
    Ended(u64),
}

#[derive(Debug)]
pub(super) struct Job {
    pub(super) id: u64,
    pub(super) latency: Duration,
    pub(super) bytes: u64,
}

#[derive(Debug)]
struct Moving {
    id: u64,
    // Bytes times a second in nanoseconds, so that shares of a nanosecond are whole numbers.
    left: u128,
}

const NANOS: u128 = 1_000_000_000;

#[derive(Debug)]
pub(super) struct Device {
    speed: Speed,
    clock: Instant,
    queue: VecDeque<Job>,
    seeking: Vec<(Instant, Job)>,
    moving: Vec<Moving>,
    events: VecDeque<Event>,
}

impl Device {
    pub(super) fn new(speed: Speed, now: Instant) -> Self {
        Device {
            speed,
            clock: now,
            queue: VecDeque::new(),
            seeking: Vec::new(),
            moving: Vec::new(),
            events: VecDeque::new(),
        }
    }

    pub(super) fn speed(&self) -> Speed {
        self.speed
    }

    pub(super) fn set_speed(&mut self, speed: Speed, now: Instant) {
        self.advance(now);
        self.speed = speed;
    }

    pub(super) fn submit(&mut self, job: Job, now: Instant) {
        self.advance(now);
        self.queue.push_back(job);
        self.admit();
    }

    /// Lets everything happen that happens until `now`.
    pub(super) fn advance(&mut self, now: Instant) {
        self.admit();
        while let Some(at) = self.next_event().filter(|at| *at <= now) {
            self.step(at);
            self.admit();
        }
        if now > self.clock {
            self.transfer(now - self.clock);
            self.clock = now;
        }
    }

    /// When the next event is due.
    pub(super) fn next_event(&self) -> Option<Instant> {
        let seek = self.seeking.iter().map(|(at, _)| *at).min();
        let least = self.moving.iter().map(|job| job.left).min();
        let end = least.map(|left| self.clock + self.time_for(left));
        seek.into_iter().chain(end).min()
    }

    pub(super) fn take_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(super) fn in_service(&self) -> usize {
        self.seeking.len() + self.moving.len()
    }

    fn admit(&mut self) {
        while self.in_service() < self.speed.queue_depth.max(1) {
            let Some(job) = self.queue.pop_front() else {
                return;
            };
            self.events.push_back(Event::Started(job.id));
            self.seeking.push((self.clock + job.latency, job));
        }
    }

    fn step(&mut self, at: Instant) {
        self.transfer(at.saturating_duration_since(self.clock));
        self.clock = self.clock.max(at);
        let arrived = self.seeking.extract_if(.., |(ready, _)| *ready <= at);
        let limited = self.speed.bytes_per_second.is_some();
        self.moving.extend(arrived.map(|(_, job)| Moving {
            id: job.id,
            left: if limited { u128::from(job.bytes) * NANOS } else { 0 },
        }));
        let ended = self.moving.extract_if(.., |job| job.left == 0);
        self.events.extend(ended.map(|job| Event::Ended(job.id)));
    }

    fn transfer(&mut self, elapsed: Duration) {
        let sharers = self.moving.len() as u128;
        let rate = u128::from(self.speed.bytes_per_second.unwrap_or(u64::MAX));
        for job in &mut self.moving {
            job.left = job.left.saturating_sub(elapsed.as_nanos() * rate / sharers);
        }
    }

    fn time_for(&self, left: u128) -> Duration {
        let rate = u128::from(self.speed.bytes_per_second.unwrap_or(u64::MAX).max(1));
        let nanos = (left * self.moving.len() as u128).div_ceil(rate);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX / 2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(bytes_per_second: u64, queue_depth: usize) -> (Device, Instant) {
        let speed =
            Speed { bytes_per_second: Some(bytes_per_second), queue_depth, ..Speed::default() };
        let start = Instant::now();
        (Device::new(speed, start), start)
    }

    fn job(id: u64, latency_us: u64, bytes: u64) -> Job {
        Job { id, latency: Duration::from_micros(latency_us), bytes }
    }

    /// Runs to the end; when each operation started and ended, in microseconds.
    fn run(device: &mut Device, start: Instant) -> Vec<(Event, u128)> {
        let mut seen = Vec::new();
        let mut now = start;
        loop {
            device.advance(now);
            while let Some(event) = device.take_event() {
                seen.push((event, (now - start).as_micros()));
            }
            match device.next_event() {
                Some(at) => now = at,
                None => return seen,
            }
        }
    }

    #[test]
    fn operations_share_the_bandwidth() {
        let (mut device, start) = device(1_000_000, 2);
        device.submit(job(0, 0, 1_000), start);
        device.submit(job(1, 0, 500), start);
        let seen = run(&mut device, start);
        assert!(seen.contains(&(Event::Ended(1), 1_000)), "{seen:?}");
        assert!(seen.contains(&(Event::Ended(0), 1_500)), "{seen:?}");
    }

    #[test]
    fn the_depth_bounds_what_is_in_service_and_order_is_kept() {
        let (mut device, start) = device(1_000_000, 1);
        for id in 0..3 {
            device.submit(job(id, 100, 100), start);
        }
        let seen = run(&mut device, start);
        let expected: Vec<(Event, u128)> = (0..3)
            .flat_map(|id| {
                let at = u128::from(id) * 200;
                [(Event::Started(id), at), (Event::Ended(id), at + 200)]
            })
            .collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn asking_late_changes_nothing() {
        let (mut device, start) = device(1_000_000, 1);
        for id in 0..100 {
            device.submit(job(id, 10, 90), start);
        }
        device.advance(start + Duration::from_micros(9_999));
        let ended = std::iter::from_fn(|| device.take_event())
            .filter(|event| matches!(event, Event::Ended(_)));
        assert_eq!(ended.count(), 99);
        assert_eq!(device.next_event(), Some(start + Duration::from_millis(10)));
    }
}
