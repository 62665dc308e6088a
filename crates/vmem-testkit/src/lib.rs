//! Test tools of vmem: everything that its tests share, and nothing that ships.
//!
//! Invariant: with one seed and a current-thread runtime on a paused clock, every tool here does
//! the same again. Called by the tests of all crates of the workspace.
//!
//! Reading order: [`seed`] starts a test; [`sim`] is the disk under it; [`fault`] and [`decorate`]
//! make that disk fail, wait, stand still or tell; [`catalog`] keeps names beside it; [`device`] is
//! the VRAM above; [`cancel`] drops futures at every point; [`model`] knows which bytes a read may
//! return; [`conformance`] is what every driver, disk tier and catalog has to pass; [`tape`] cuts
//! the power; [`place`] denies what machines deny; [`trace`] sees what is traced.

pub mod cancel;
pub mod catalog;
pub mod conformance;
mod cpu;
pub mod decorate;
pub mod device;
pub mod fault;
pub mod model;
#[cfg(target_os = "linux")]
pub mod place;
pub mod seed;
pub mod sim;
pub mod tape;
pub mod trace;

pub use cancel::{exhaust, exhaust_with, poll_then_drop, poll_wake_then_drop};
pub use catalog::{ClosedNames, SimCatalog};
pub use cpu::{process_cpu, thread_cpu};
pub use decorate::{DelayDriver, GateDriver, OpKind, ThrottleDriver, TraceDriver};
pub use device::SimDevice;
pub use fault::{Errno, Fault, FaultDriver, FaultPlan, When};
pub use model::{Model, Pattern, Settles, Violation};
#[cfg(target_os = "linux")]
pub use place::{Denied, driver_under_test, real_driver};
pub use seed::Seed;
pub use sim::{SimConfig, SimDriver, SparseImage};
pub use tape::{Tape, TapeDriver, TapeStorage};
pub use trace::{Seen, SeenEvent, SeenSpan};
