//! What a stream does in its turn.
//!
//! Invariant: the accesses of a piece of work are all that it does to device memory. Called by the
//! stream.

use crate::races::Access;
use crate::raw::{HostFunction, HostMemory};
use crate::world::{OpKind, Reach, World};

/// A piece of work in its turn, with what is known of host memory that it uses.
#[derive(Clone, Debug)]
pub(crate) struct Op {
    pub(crate) work: Work,
    /// What its source held when it was issued, or that its destination was spoiled.
    pub(super) watched: Option<u64>,
    /// What it does to device memory, once a stream has it.
    pub(super) accesses: Vec<Access>,
    /// How often its device had failed by then: after one more it has no effects.
    pub(super) failures: u64,
}

impl Op {
    /// Issued now: what it reads on the host is to stay, and what it writes there is spoiled.
    pub(crate) fn issued(work: Work, reach: Reach) -> Self {
        let watched = match (&work, reach) {
            (Work::Up { from, .. }, Reach::Pinned) => Some(from.checksum()),
            (Work::Down { to, .. }, Reach::Pinned) => {
                to.scribble();
                Some(0)
            }
            (Work::Pieces { table, .. }, _) => Some(table.checksum()),
            _ => None,
        };
        Op { work, watched, accesses: Vec::new(), failures: 0 }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Work {
    Up {
        to: u64,
        from: HostMemory,
    },
    Down {
        to: HostMemory,
        from: u64,
    },
    Copy {
        to: u64,
        from: u64,
        len: u64,
    },
    Fill {
        to: u64,
        pattern: Vec<u8>,
        len: u64,
    },
    Kernel {
        name: &'static str,
        arguments: [u64; 4],
    },
    /// A kernel that makes copies, which its table on the host lists.
    Pieces {
        table: HostMemory,
        copies: Vec<Op>,
    },
    HostFunction(HostFunction),
    Record {
        event: u64,
    },
    Wait {
        until: (u64, u64),
    },
    Free {
        address: u64,
    },
}

impl Work {
    pub(super) fn kind(&self) -> OpKind {
        match self {
            Work::Up { .. } => OpKind::Up,
            Work::Down { .. } => OpKind::Down,
            Work::Copy { .. } | Work::Fill { .. } => OpKind::Within,
            Work::Kernel { .. } => OpKind::Kernel,
            Work::Pieces { copies, .. } => {
                copies.first().map_or(OpKind::Kernel, |copy| copy.work.kind())
            }
            Work::HostFunction(_) => OpKind::HostFunction,
            Work::Record { .. } | Work::Wait { .. } | Work::Free { .. } => OpKind::Order,
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Work::Up { .. } => "a copy to the device",
            Work::Down { .. } => "a copy from the device",
            Work::Copy { .. } => "a copy within the device",
            Work::Fill { .. } => "a fill",
            Work::Kernel { name, .. } => name,
            Work::Pieces { .. } => "a kernel that copies",
            Work::HostFunction(_) => "a host function",
            Work::Record { .. } | Work::Wait { .. } => "an event",
            Work::Free { .. } => "a free",
        }
    }

    /// The host memory that it uses.
    pub(super) fn host(&self) -> Vec<HostMemory> {
        match self {
            Work::Up { from: memory, .. } | Work::Down { to: memory, .. } => vec![*memory],
            Work::Pieces { table, copies } => {
                let copies = copies.iter().flat_map(|copy| copy.work.host());
                copies.chain([*table]).collect()
            }
            _ => Vec::new(),
        }
    }

    /// How many copies, or pieces of other work, it is.
    pub(super) fn count(&self) -> u64 {
        match self {
            Work::Pieces { copies, .. } => copies.len() as u64,
            _ => 1,
        }
    }

    /// What it does to device memory.
    pub(super) fn accesses(&self, world: &World) -> Vec<Access> {
        let access =
            |address: u64, len: u64, writes| Access { range: address..address + len, writes };
        match *self {
            Work::Pieces { ref copies, .. } => {
                copies.iter().flat_map(|copy| copy.work.accesses(world)).collect()
            }
            Work::Up { to, from } => vec![access(to, from.len as u64, true)],
            Work::Down { to, from } => vec![access(from, to.len as u64, false)],
            Work::Copy { to, from, len } => vec![access(to, len, true), access(from, len, false)],
            Work::Fill { to, len, .. } => vec![access(to, len, true)],
            Work::Kernel { name, arguments: [a, b, c, _] } => match name {
                "vmem_copy" | "vmem_slow_copy" => vec![access(a, c, true), access(b, c, false)],
                "vmem_spin" => Vec::new(),
                _ => vec![access(a, b, true)],
            },
            Work::Free { address } => {
                let len = world.allocations.get(&address).map_or(0, |allocation| allocation.len);
                vec![access(address, len, true)]
            }
            Work::HostFunction(_) | Work::Record { .. } | Work::Wait { .. } => Vec::new(),
        }
    }
}
