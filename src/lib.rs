//! vmem.
