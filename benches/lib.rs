//! Nothing: the bars are in `bars/`.
