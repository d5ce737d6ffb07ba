//! Integration tests, the lab and the benchmarks.
