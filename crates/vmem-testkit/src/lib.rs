//! Test tools of vmem.
