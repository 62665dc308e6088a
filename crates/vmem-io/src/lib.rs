//! The disk tier of vmem.

pub mod driver;
