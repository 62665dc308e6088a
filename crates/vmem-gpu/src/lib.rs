//! The VRAM tier of vmem.
