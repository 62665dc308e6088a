//! Temporary.
#![allow(missing_docs, missing_debug_implementations)]
use std::collections::*;
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyKind {
    #[default]
    Lru,
    Sieve,
    S3Fifo,
}
#[derive(Clone, Copy, Debug)]
pub struct Token(u64);
impl From<u64> for Token {
    fn from(v: u64) -> Self {
        Token(v)
    }
}
impl From<Token> for u64 {
    fn from(v: Token) -> Self {
        v.0
    }
}
pub enum Probe {
    Evictable { stamp: u64, touches: u32 },
    Busy { stamp: u64 },
    Pinned,
    Gone,
}
pub enum Pick {
    Victim(u64),
    Retry,
    Empty,
}
pub trait Policy: std::fmt::Debug + Send {
    fn insert(&mut self, id: u64, stamp: u64, footprint: u64) -> Token;
    fn remove(&mut self, id: u64, token: Token);
    fn victim(&mut self, probe: &mut dyn FnMut(u64) -> Probe) -> Pick;
    fn settle(&mut self, steps: usize, probe: &mut dyn FnMut(u64) -> Probe) -> bool;
    fn coldest(&mut self, limit: usize, visit: &mut dyn FnMut(u64));
    fn unpark(&mut self, id: u64);
}
#[derive(Debug, Default)]
struct Lru {
    order: BTreeSet<(u64, u64)>,
    at: HashMap<u64, u64>,
}
impl Policy for Lru {
    fn insert(&mut self, id: u64, stamp: u64, _f: u64) -> Token {
        self.order.insert((stamp, id));
        self.at.insert(id, stamp);
        Token(id)
    }
    fn remove(&mut self, id: u64, _t: Token) {
        if let Some(s) = self.at.remove(&id) {
            self.order.remove(&(s, id));
        }
    }
    fn victim(&mut self, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        let all: Vec<_> = self.order.iter().copied().collect();
        for (s, id) in all {
            match probe(id) {
                Probe::Evictable { stamp, .. } if stamp == s => return Pick::Victim(id),
                Probe::Evictable { stamp, .. } => {
                    self.order.remove(&(s, id));
                    self.order.insert((stamp, id));
                    self.at.insert(id, stamp);
                }
                _ => {}
            }
        }
        for (_, id) in self.order.iter() {
            if let Probe::Evictable { .. } = probe(*id) {
                return Pick::Victim(*id);
            }
        }
        Pick::Empty
    }
    fn settle(&mut self, _steps: usize, _probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        false
    }
    fn coldest(&mut self, limit: usize, visit: &mut dyn FnMut(u64)) {
        for (_, id) in self.order.iter().take(limit) {
            visit(*id)
        }
    }
    fn unpark(&mut self, _id: u64) {}
}
pub fn build(_k: PolicyKind) -> Box<dyn Policy> {
    Box::new(Lru::default())
}
