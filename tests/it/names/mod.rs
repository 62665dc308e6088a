//! Named objects: what a name stands for, and what survives a restart, a kill, a power cut or
//! damage.
//!
//! Invariant: what was acknowledged is there, whole. Run in `it`.

mod closed;
mod damage;
mod directory;
mod entries;
mod failing;
mod faults;
mod kills;
mod life;
mod power_cuts;
mod stuck;
