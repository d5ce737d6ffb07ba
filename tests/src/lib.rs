//! Integration tests, the lab and the benchmarks.
#![forbid(unsafe_code)]

pub mod device;
