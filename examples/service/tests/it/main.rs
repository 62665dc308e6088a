//! The service over real HTTP.
//!
//! - `objects`: what each request answers, with its status.
//! - `conditions`: ETags, dates and ranges.
//! - `limits`: sizes, times and counts; slow clients.
//! - `pages`: pages of other origins, and names that lead here.
//! - `places`: pins and prefetches.
//! - `life`: restart, shutdown, `kill -9`, over the real program.
//! - `config`: the file, the environment, what is refused.
//! - `load`: many clients that compare every body; a client in Python.
//! - `seeing`: metrics and the dashboard.
//! - `otel`: the spans that a collector gets, and one that is not there.
//! - `support`: a service on a port of its own.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod conditions;
mod config;
mod connections;
mod life;
mod limits;
mod load;
mod objects;
mod otel;
mod pages;
mod places;
mod seeing;
mod support;
