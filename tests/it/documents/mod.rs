//! What the documents say of this repository, checked.
//!
//! Invariant: a document names nothing that is not there. Run in `it`.

mod readme;
